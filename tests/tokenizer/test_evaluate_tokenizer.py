"""The evaluate command: what it measures, names, says and writes, the same on every run."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tokenizer
from tokenizer import VQGANConfig, evaluate
from tokenizer.cli import CommandError, InputError
from tokenizer.evaluate import Evaluate, measure, stream
from tokenizer.fid import Moments, frechet
from tokenizer.images import read_image, save_image
from tokenizer.metrics import psnr
from tokenizer.perceptual import Perceptual
from tokenizer.quality import Meter
from tokenizer.vgg import IMAGENET, VGG16
from tokenizer.vqgan import VQGAN

MODEL = VQGANConfig(
    image_size=16,
    patch=2,
    channels=32,
    multipliers=(1, 2),
    res_blocks=1,
    latent_dim=16,
    code_dim=4,
    codebook_size=32,
    normalize_codes=True,
)
BROKEN = ("03.png", "11.png")


class Colours(nn.Module):
    """A stand-in for Inception: three features, and a note of what it was fed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return images.double().mean(dim=(2, 3))


@pytest.fixture(scope="module")
def model() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(MODEL).eval()


@pytest.fixture(scope="module")
def folder(model: VQGAN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tok")
    tokenizer.save(model, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty files 00.png … 19.png of ever stronger contrast, two of them broken."""
    path, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(20):
        noise = rng.integers(-6 * i, 6 * i + 1, (16, 20, 3))
        save_image(path / f"{i:02}.png", (128 + noise).astype(np.uint8))
    for name in BROKEN:
        (path / name).write_bytes(b"no image")
    return path


@pytest.fixture(scope="module")
def vgg() -> Perceptual:
    torch.manual_seed(0)
    return Perceptual(VGG16(IMAGENET), name="vgg")


def in_memory(data: Path) -> tuple[list[Path], Tensor]:
    files = [file for file in sorted(data.iterdir()) if file.name not in BROKEN]
    pixels = [read_image(file, size=16, preprocess="crop").transpose(2, 0, 1) for file in files]
    return files, torch.from_numpy(np.stack(pixels))


def test_images_stream_in_order_beside_their_names(data: Path) -> None:
    files, pixels = in_memory(data)
    bad = Counter[str]()
    parts = list(stream(sorted(data.iterdir()), size=16, preprocess="crop", batch=4, bad=bad))
    assert [len(names) for names, _ in parts] == [4, 4, 4, 4, 2]
    assert [name for names, _ in parts for name in names] == files
    assert torch.equal(torch.cat([images for _, images in parts]), pixels)
    assert bad == {"not an image": 2}


def test_images_are_decoded_a_bounded_number_ahead(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def decode(file: Path, size: int, preprocess: str) -> np.ndarray:
        started.append(file)
        return np.zeros((3, size, size), np.uint8)

    monkeypatch.setattr(evaluate, "decode", decode)
    parts = stream([data] * 500, size=16, preprocess="crop", batch=5, bad=Counter())
    next(parts)
    assert len(started) <= 5 + evaluate.AHEAD * 5
    assert sum(len(names) for names, _ in parts) == 495


def test_figures_equal_those_of_images_in_memory(
    model: VQGAN, folder: Path, data: Path, tmp_path: Path
) -> None:
    files, pixels = in_memory(data)
    evaluate.main(Evaluate(folder=folder, data=(data,), out=tmp_path, batch=4, device="cpu"))
    found = json.loads((tmp_path / "evaluation.json").read_text())
    quality = measure(model, pixels, batch=4)
    assert found.items() >= quality.summary().items()
    # Each named case has the score of the file of that name, though broken files were left out.
    order = quality.psnr.argsort().tolist()
    assert [case["file"] for case in found["worst"]] == [str(files[i]) for i in order[:12]]
    for case in found["worst"]:
        original = torch.tensor(read_image(case["file"], size=16, preprocess="crop"))
        image = original.permute(2, 0, 1)[None].float() / 255
        score = float(psnr(model.decode(model.encode(image)), image))
        assert case["psnr"] == pytest.approx(score, abs=1e-3)  # alone or in a batch, fp32
    assert found["psnr_worst"] == found["worst"][0]["psnr"]
    assert found["bad"] == {"not an image": 2}


def test_the_same_command_gives_the_same_figures(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, written = [], []
    for turn in range(2):
        out = tmp_path / str(turn)
        evaluate.main(Evaluate(folder=folder, data=(data,), out=out, device="cpu"))
        said.append([line for line in capsys.readouterr().out.split("\n") if "/s " not in line])
        written.append([(out / n).read_bytes() for n in ("evaluation.json", "worst.png")])
    assert said[0] == said[1] and written[0] == written[1]


@pytest.mark.parametrize(
    ("preprocess", "words"),
    [("crop", "shorter side resized bilinearly"), ("squash", "both sides resized bicubically")],
)
def test_output_states_how_images_were_prepared_and_what_was_not_measured(
    preprocess, words: str, folder: Path, data: Path, tmp_path: Path, capsys
) -> None:
    evaluate.main(
        Evaluate(folder=folder, data=(data,), out=tmp_path, preprocess=preprocess, device="cpu")
    )
    said = capsys.readouterr().out
    for part in (words, "at 16×16", "[0, 1]", "float32 on cpu", "over 18 images", "2 not an image"):
        assert part in said
    assert "LPIPS: not measured (no weights given" in said
    assert "rFID: not measured (no weights given" in said
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["lpips"] is None and found["rfid"] is None
    assert found["preprocess"] == preprocess and words in found["interpolation"]
    assert found["device"] == "cpu" and found["pixel_range"] == [0, 1]


def test_given_weights_are_measured_and_named_for_what_they_are(
    folder: Path, data: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, vgg
) -> None:
    monkeypatch.setattr(evaluate, "load_perceptual", lambda weights, heads: vgg)
    monkeypatch.setattr(evaluate, "load_inception", lambda path: Colours())
    evaluate.main(
        Evaluate(
            folder=folder,
            data=(data,),
            out=tmp_path,
            perceptual="vgg16.pth",
            inception=Path("inception.pth"),
            device="cpu",
        )
    )
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert f"vgg distance {found['vgg']:.4f}; LPIPS: not measured" in said
    assert found["lpips"] is None and found["vgg"] > 0
    assert all(case["vgg"] > 0 for case in found["worst"])
    assert found["rfid"] > 0 and f"rFID {found['rfid']:.2f}" in said
    assert "18 images are fewer than the 2048" in said and "singular" in found["rfid_caution"]


def test_rfid_is_the_distance_of_8_bit_originals_and_reconstructions(
    model: VQGAN, data: Path
) -> None:
    _, pixels = in_memory(data)
    inception = Colours()
    meter = Meter(model, inception=inception)  # type: ignore[arg-type]
    for part in pixels.split(7):
        meter.update(part)
    restored = (model.decode(model.encode(pixels.float() / 255)) * 255).round().to(torch.uint8)
    originals, reconstructions = torch.cat(inception.seen[::2]), torch.cat(inception.seen[1::2])
    assert torch.equal(originals, pixels)
    # In other batches a value may round the other way, rarely.
    assert float((reconstructions != restored).float().mean()) < 0.01
    one, two = Moments(), Moments()
    one.update(originals.double().mean(dim=(2, 3)))
    two.update(reconstructions.double().mean(dim=(2, 3)))
    assert meter.quality().rfid == pytest.approx(frechet(one, two), rel=1e-9)


def test_distance_of_each_image_is_that_of_the_perceptual_network(
    model: VQGAN, data: Path, vgg: Perceptual
) -> None:
    _, pixels = in_memory(data)
    quality = measure(model, pixels[:6], batch=3, perceptual=vgg)
    images = pixels[:6].float() / 255
    expected = vgg(model.decode(model.encode(images)), images)
    # fp32 convolutions in other batches
    torch.testing.assert_close(quality.distances["vgg"], expected, rtol=1e-3, atol=1e-6)
    assert quality.summary()["vgg"] == pytest.approx(float(expected.mean()), abs=1e-4)


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "decoder.conv_out.bias"])
def test_weights_that_are_no_numbers_are_refused(name: str, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    broken = VQGAN(MODEL)
    broken.get_parameter(name).detach().view(-1)[0] = float("nan")
    tokenizer.save(broken, tmp_path / "tok")
    with pytest.raises(CommandError, match="hold NaN or infinity"):
        evaluate.main(Evaluate(folder=tmp_path / "tok", data=(data,), device="cpu"))


def test_a_reconstruction_that_is_no_number_is_refused(data: Path) -> None:
    torch.manual_seed(0)
    model = VQGAN(MODEL).eval()
    model.decoder.conv_out.weight.detach().fill_(3e38)  # finite, and its sums are not
    _, pixels = in_memory(data)
    with pytest.raises(CommandError, match="gives back NaN"):
        measure(model, pixels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "more than 0"),
        ({"limit": 0}, "more than 0"),
        ({"lpips_heads": Path("vgg.pth")}, "give --perceptual"),
        ({"perceptual": "absent.pth"}, "no VGG16 weights at absent.pth"),
        ({"inception": Path("absent.pth")}, "no Inception weights at absent.pth"),
    ],
)
def test_wrong_options_are_refused(options: dict, words: str, folder: Path, data: Path) -> None:
    with pytest.raises(InputError, match=words):
        evaluate.main(Evaluate(folder=folder, data=(data,), device="cpu", **options))


def test_a_folder_without_a_readable_image_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="none of 1 images can be read: 1 not an image"):
        evaluate.main(Evaluate(folder=folder, data=(tmp_path,), device="cpu"))
