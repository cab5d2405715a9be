"""FID against torch-fidelity 0.4.0: resize, network and distance, with random weights."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenizer.cli import InputError
from tokenizer.fid import Moments, caution, frechet
from tokenizer.inception import FEATURES, Inception, load_inception, resize

Reference = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like FID's: random weights under which features keep their spread to the end."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Inception().state_dict().items()}
    state = {"fc.weight": torch.zeros(1008, FEATURES), "fc.bias": torch.zeros(1008)}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue  # the file of 2015 has none
        draw = torch.randn(shape, generator=generator)
        if name.endswith("conv.weight"):
            state[name] = draw * math.sqrt(2 / shape[1:].numel())
        else:  # of batch norm; variances and scales around 1, means and shifts around 0
            positive = name.endswith(("running_var", "bn.weight"))
            state[name] = 0.5 + draw.abs() if positive else 0.2 * draw
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def pictures(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(32, 32), (256, 256), (299, 299), (400, 301), (1, 7)])
def test_resize_equals_torch_fidelity(fidelity: Reference, shape: tuple[int, int]) -> None:
    images = pictures(2, *shape).float()
    theirs = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    expected = theirs(images, size=(299, 299), align_corners=False)
    assert torch.equal(resize(images, 299), expected)  # the same sums in the same order


def test_features_equal_those_of_torch_fidelity(fidelity: Reference, weights: Path) -> None:
    theirs = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(weights)
    )
    images = pictures(2, 64, 48)
    expected = theirs(images)[0]
    assert float(expected[0].sub(expected[1]).abs().mean()) > 1  # or equality would say nothing
    # Equal sums; only the last mean over 64 places is added up in another order.
    torch.testing.assert_close(load_inception(weights)(images), expected, rtol=1e-5, atol=1e-5)


def test_features_do_not_depend_on_the_batch_and_file_kind(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    save_file(state, tmp_path / "weights.safetensors")
    images = pictures(3, 40, 40)
    whole = load_inception(weights)(images)
    single = load_inception(tmp_path / "weights.safetensors")(images[1:2])
    # fp32 through 94 layers, in which the order of sums depends on the batch
    torch.testing.assert_close(single, whole[1:2], rtol=1e-3, atol=1e-3)


def test_other_networks_and_inputs_are_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    del state["Mixed_7c.branch_pool.bn.bias"]
    state["Mixed_5b.branch1x1.conv.weight"] = torch.zeros(1, 2)
    state["AuxLogits.conv0.conv.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError) as caught:
        load_inception(tmp_path / "other.pth")
    for name in ("Mixed_7c.branch_pool.bn.bias", "AuxLogits", "[1, 2], wanted [64, 192, 1, 1]"):
        assert name in str(caught.value)
    with pytest.raises(InputError, match="pt_inception-2015-12-05"):
        load_inception(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="uint8"):
        load_inception(weights)(torch.rand(1, 3, 32, 32))


def gathered(rows: Tensor, *pieces: int) -> Moments:
    moments = Moments()
    for part in rows.split(list(pieces) or [len(rows)]):
        moments.update(part)
    return moments


def features(count: int, width: int, seed: int) -> Tensor:
    """Return correlated rows far from 0, as Inception's are: where naive sums lose their digits."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix + 1000.0


@pytest.mark.parametrize("pieces", [(50,), (1, 48, 1), (7,) * 7 + (1,)])
def test_moments_in_pieces_equal_numpy(pieces: tuple[int, ...]) -> None:
    rows = features(50, 8, seed=0)
    moments = gathered(rows, *pieces)
    expected = np.cov(rows.double().numpy(), rowvar=False)
    # fp64: 16 digits, of which 1000² against variances near 10 costs five
    np.testing.assert_allclose(moments.covariance().numpy(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(moments.mean.numpy(), rows.double().numpy().mean(0), rtol=1e-14)
    assert moments.count == 50


@pytest.mark.parametrize("count", [400, 30])  # more and fewer rows than the 64 features
def test_distance_equals_torch_fidelity_and_scipy(fidelity: Reference, count: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    first, second = features(count, 64, seed=0), features(count, 64, seed=1)
    found = frechet(gathered(first), gathered(second))
    theirs = fidelity("metric_fid")
    stats = [theirs.fid_features_to_statistics(rows.double()) for rows in (first, second)]
    expected = theirs.fid_statistics_to_metric(*stats, False)[theirs.KEY_METRIC_FID]
    # fp64; where a covariance is singular, the others take roots of rounding errors, 1e-13 to 1e-7
    exact = 1e-9 if count > 64 else 1e-6
    assert found == pytest.approx(expected, rel=exact)
    product = stats[0]["sigma"] @ stats[1]["sigma"]
    plain = np.square(stats[0]["mu"] - stats[1]["mu"]).sum() + np.trace(
        stats[0]["sigma"] + stats[1]["sigma"] - 2 * linalg.sqrtm(product).real
    )
    assert found == pytest.approx(float(plain), rel=exact)


def test_distance_of_known_gaussians() -> None:
    one, two = Moments(), Moments()
    ones = torch.eye(3, dtype=torch.float64)
    one.count, one.mean, one.scatter = 11, torch.zeros(3).double(), ones * 10 * 4  # deviation 2
    two.count, two.mean, two.scatter = 11, torch.tensor([3.0, 0, 4]).double(), ones * 10 * 25
    # |(3, 0, 4)|² + 3 · (5 − 2)²
    assert frechet(one, two) == pytest.approx(25 + 27, rel=1e-12)
    assert frechet(one, one) == pytest.approx(0.0, abs=1e-12)


def test_a_set_is_at_no_distance_from_itself_though_its_covariance_is_singular() -> None:
    moments = gathered(features(20, 64, seed=0))
    scale = float(moments.covariance().trace())
    assert abs(frechet(moments, moments)) < 1e-6 * scale  # roots of rounding errors
    with pytest.raises(InputError, match="2 at least"):
        frechet(gathered(torch.ones(1, 4)), moments)


def test_few_images_are_said_to_be_few() -> None:
    assert "singular" in caution(500)
    assert "upwards" in caution(5_000) and "singular" not in caution(5_000)
    assert caution(50_000) == ""
