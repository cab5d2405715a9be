"""PSNR and SSIM against scikit-image, and the edge term of the loss against its definition."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizer.cli import InputError
from tokenizer.losses import edge_l1, reconstruction
from tokenizer.metrics import psnr, ssim


def pairs(height: int = 40, width: int = 27) -> tuple[Tensor, Tensor]:
    """Return four pictures and ever worse copies of them."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(4, 3, 6, 5, generator=generator)
    images = torch.nn.functional.interpolate(low, (height, width), mode="bilinear")
    noise = torch.randn(images.shape, generator=generator)
    strength = torch.tensor([0.01, 0.05, 0.2, 0.5]).view(-1, 1, 1, 1)
    return images, (images + strength * noise).clamp(0, 1)


def arrays(images: Tensor) -> list[np.ndarray]:
    return list(images.permute(0, 2, 3, 1).double().numpy())


def test_psnr_equals_scikit_image() -> None:
    reference = pytest.importorskip("skimage.metrics").peak_signal_noise_ratio
    images, copies = pairs()
    expected = [
        reference(a, b, data_range=1) for a, b in zip(arrays(images), arrays(copies), strict=True)
    ]
    np.testing.assert_allclose(psnr(copies, images).numpy(), expected, rtol=1e-9)  # both fp64


def test_ssim_equals_scikit_image() -> None:
    reference = pytest.importorskip("skimage.metrics").structural_similarity
    images, copies = pairs()
    expected = [
        reference(
            a,
            b,
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(arrays(images), arrays(copies), strict=True)
    ]
    np.testing.assert_allclose(ssim(copies, images).numpy(), expected, rtol=1e-7)  # both fp64
    assert max(expected) > 0.9 and min(expected) < 0.5  # the pairs span the scale


def test_equal_images_are_perfect() -> None:
    images, _ = pairs()
    assert psnr(images, images).tolist() == pytest.approx([100.0] * 4)
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 4)


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(InputError, match="11 pixels"):
        ssim(torch.rand(1, 3, 8, 32), torch.rand(1, 3, 8, 32))


def test_edge_term_sees_edges_and_no_shift_of_brightness() -> None:
    images, copies = pairs()
    assert float(edge_l1(images + 0.3, images)) == pytest.approx(0.0, abs=1e-6)
    assert float(edge_l1(copies, images)) > 0.01
    step = torch.zeros(1, 1, 2, 4)
    step[..., 2:] = 1.0
    # One of three neighbouring pairs in each row differs, by 1; no column pair does.
    assert float(edge_l1(step, torch.zeros_like(step))) == pytest.approx((1 / 3 + 0) / 2)


def test_reconstruction_is_the_weighted_sum_of_its_terms() -> None:
    images, copies = pairs()
    total = reconstruction(copies, images, l1=2.0, l2=3.0, edge=5.0)
    difference = copies - images
    expected = 2 * difference.abs().mean() + 3 * difference.square().mean()
    torch.testing.assert_close(total, expected + 5 * edge_l1(copies, images))
