"""Bulk encoding: `exact` is eager fp32 bit by bit, the others come near, nothing is silent."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tokenizer import VQGAN, Tokenizer, VQGANConfig
from tokenizer.bench import agreement, in_diffusers, plain
from tokenizer.cli import CommandError, InputError
from tokenizer.encode import BulkEncoder, finite_codes
from tokenizer.precision import Precision, Reduced, encoding_half, float32_sums, resolve

SMALL = VQGANConfig(
    image_size=32, channels=32, multipliers=(1, 2, 2), latent_dim=16, code_dim=8, codebook_size=128
)
CONFIGS = {
    "muse": SMALL,
    "attention": replace(SMALL, attention_resolutions=(16,), mid_attention=True),
    "demo": replace(SMALL, patch=2, normalize_codes=True, pixel_range=(-1.0, 1.0)),
    "wide": replace(SMALL, channels=128, multipliers=(1,), res_blocks=1, image_size=16),
}
KNOBS = (
    *(torch.backends.cudnn.conv, torch.backends.cuda.matmul),  # type: ignore[attr-defined]
    *(torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul),  # type: ignore[attr-defined]
)


def build(config: VQGANConfig) -> VQGAN:
    """Return a random model whose codebook spans its latents: codes that many images share."""
    torch.manual_seed(0)
    model = VQGAN(config).eval()
    with torch.no_grad():
        latents = model.latents(torch.rand(4, 3, config.image_size, config.image_size))
        for tensor in model.quant_conv.parameters():
            tensor.div_(latents.std())
        model.quantize.embedding.weight.normal_()
    return model


def pixels_for(model: VQGAN, count: int = 6) -> np.ndarray:
    side = model.image_size
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def eager(model: Tokenizer, pixels: np.ndarray) -> np.ndarray:
    return model.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).numpy()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_exact_codes_equal_those_of_the_eager_model(config: VQGANConfig) -> None:
    model = build(config)
    pixels = pixels_for(model)
    codes = BulkEncoder(model, precision="exact").encode(pixels)
    assert codes.dtype == np.int64 and len(np.unique(codes)) > 10
    assert np.array_equal(codes, eager(model, pixels))


def test_layout_and_kind_of_array_make_no_difference() -> None:
    model = build(SMALL)
    pixels = pixels_for(model)
    encoder = BulkEncoder(model, precision="exact")
    expected = encoder.encode(pixels)
    first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    for same in (torch.from_numpy(pixels), first, torch.from_numpy(first)):
        assert np.array_equal(encoder.encode(same), expected)


# Random weights have no margin between codes as training gives, so the bounds are wide; with the
# demo's tokenizer fp16 keeps 99.9 % and bf16 99.4 % (tokenizer/precision.py). fp32 differs by the
# order of sums alone. Relative errors of latents: a 16-bit operand is rounded by at most 2⁻¹¹
# (fp16) and 2⁻⁸ (bf16) of itself, and few of these add up over a handful of layers.
@pytest.mark.parametrize(
    ("precision", "same", "error"),
    [("fp32", 0.999, 1e-5), ("fp16", 0.98, 2e-3), ("bf16", 0.9, 2e-2)],
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_reduced_precision_comes_near(
    config: VQGANConfig, precision: Precision, same: float, error: float
) -> None:
    model = build(config)
    pixels = pixels_for(model, 8)
    codes = BulkEncoder(model, precision=precision).encode(pixels)
    assert (codes == eager(model, pixels)).mean() >= same
    raw = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    half = encoding_half(model, precision=precision, device=torch.device("cpu"))
    with torch.no_grad():
        expected, found = model.latents(raw.float() / 255), half(raw)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < error * expected.norm()
    assert precision == "fp32" or not torch.equal(found, expected)


def test_first_and_last_layers_and_all_norms_stay_fp32() -> None:
    half = encoding_half(build(SMALL), precision="bf16", device=torch.device("cpu"))
    kinds = dict(half.named_modules())
    for name in ("encoder.conv_in", "encoder.conv_out", "quant_conv"):
        assert isinstance(kinds[name], nn.Conv2d) and kinds[name].weight.dtype == torch.float32
    reduced = [m for m in kinds.values() if isinstance(m, Reduced)]
    inside = [m for m in kinds.values() if isinstance(m, nn.Conv2d)]
    assert len(inside) == len(reduced) + 3
    assert all(m.conv.weight.dtype == torch.bfloat16 for m in reduced)
    norms = [m for m in kinds.values() if isinstance(m, nn.GroupNorm)]
    assert norms and all(m.weight.dtype == torch.float32 for m in norms)


@pytest.mark.parametrize("precision", ["exact", "fp32", "fp16", "bf16"])
def test_the_tokenizer_is_left_as_it_is(precision: Precision) -> None:
    model = build(CONFIGS["wide"]).train()
    before, name = {k: v.clone() for k, v in model.state_dict().items()}, model.id
    BulkEncoder(model, precision=precision).encode(pixels_for(model, 2))
    assert model.training and model.id == name
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
        assert value.dtype == torch.float32 and value.is_contiguous()
    half = encoding_half(model, precision=precision, device=torch.device("cpu"))
    own = (*model.encoder.parameters(), *model.quant_conv.parameters())
    assert sum(p.numel() for p in half.parameters()) == sum(p.numel() for p in own)
    assert not {p.data_ptr() for p in half.parameters()} & {p.data_ptr() for p in own}


def test_codes_come_in_order_and_for_the_last_short_batch() -> None:
    model = build(CONFIGS["demo"])
    pixels = pixels_for(model, 10)
    encoder = BulkEncoder(model, precision="exact", batch=4)
    parts = list(encoder.encode_all(pixels[i : i + 4] for i in range(0, 10, 4)))
    assert [len(part) for part in parts] == [4, 4, 2]
    for i, part in enumerate(parts):
        assert np.array_equal(part, eager(model, pixels[4 * i : 4 * i + 4]))
    assert list(encoder.encode_all([])) == []


def test_the_caller_may_fill_one_buffer_again_and_again() -> None:
    model = build(SMALL)
    pixels = pixels_for(model, 6)
    buffer = np.empty_like(pixels[:2])

    def refilled() -> Iterator[np.ndarray]:
        for i in range(0, 6, 2):
            buffer[:] = pixels[i : i + 2]
            yield buffer

    encoder = BulkEncoder(model, precision="exact", batch=2)
    expected = [encoder.encode(pixels[i : i + 2]) for i in range(0, 6, 2)]
    assert np.array_equal(list(encoder.encode_all(refilled())), expected)


@pytest.mark.parametrize("channels_first", [False, True])
def test_padding_shows_the_network_one_shape_and_changes_no_code(channels_first: bool) -> None:
    """As on CUDA, where another shape or order in memory would compile the network again."""
    model = build(SMALL)
    pixels = pixels_for(model, 7)
    if channels_first:
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    encoder = BulkEncoder(model, precision="exact", batch=4)
    expected = np.concatenate([encoder.encode(pixels[:4]), encoder.encode(pixels[4:])])
    seen = []
    search = encoder.search

    def watched(images: Tensor) -> Tensor:
        seen.append((images.shape, images.stride()))
        return search(images)

    encoder.padded, encoder.search = True, watched
    found = np.concatenate(list(encoder.encode_all([pixels[:4], pixels[4:]])))
    assert len(set(seen)) == 1 and seen[0][0] == (4, 3, 32, 32)
    # Sums of another batch may be split otherwise, which moves a latent by fp32 rounding at most.
    assert (found == expected).mean() > 0.995


def test_latents_that_are_not_finite_stop_the_work() -> None:
    model = build(SMALL)
    with torch.no_grad():
        model.encoder.mid.block_1.conv1.weight.mul_(1e6)  # beyond fp16, and normalised after it
    pixels = pixels_for(model, 3)
    with pytest.raises(
        CommandError, match=r"latents of 3 of 3 images .* fp16: .* use precision bf16"
    ):
        BulkEncoder(model, precision="fp16").encode(pixels)
    for precision in ("bf16", "fp32", "exact"):
        assert BulkEncoder(model, precision=precision).encode(pixels).min() >= 0  # type: ignore[arg-type]
    with torch.no_grad():
        model.quant_conv.bias[0] = torch.nan
    with pytest.raises(CommandError, match="not finite in exact: the weights of the tokenizer"):
        BulkEncoder(model, precision="exact").encode(pixels)
    with pytest.raises(CommandError, match="not finite in bf16: use precision exact"):
        BulkEncoder(model, precision="bf16").encode(pixels)


def test_only_the_image_with_a_bad_latent_is_marked() -> None:
    model = build(SMALL)
    latents = torch.randn(3, SMALL.code_dim, 2, 2)
    latents[1, 3, 0, 1] = torch.inf
    codes = finite_codes(latents, model.quantize.search)
    assert (codes[1] == -1).all()
    assert torch.equal(codes[::2], model.quantize.search(latents[::2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.astype(np.float32), "wanted uint8"),
        (lambda p: p[0], "wanted \\[images, height, width, 3\\]"),
        (lambda p: p[..., :2], "wanted \\[images, height, width, 3\\]"),
        (lambda p: p[:, :30], "multiples of 4"),
        (lambda p: p[:0], "a batch of 0 images: wanted 1 to 4"),
        (lambda p: p, "a batch of 6 images: wanted 1 to 4"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(change, message: str) -> None:
    model = build(SMALL)
    encoder = BulkEncoder(model, precision="exact", batch=4)
    with pytest.raises(InputError, match=message):
        encoder.encode(change(pixels_for(model, 6)))


class Brightness:
    """A tokenizer that is no VQGAN: the mean of each quarter in 16 steps."""

    image_size, codes_per_image, codebook_size, id = 32, 4, 16, "brightness"

    def encode(self, images: Tensor) -> Tensor:
        means = nn.functional.adaptive_avg_pool2d(images.mean(1), 2)
        return (means.flatten(1) * 15).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        squares = (codes.float() / 15).unflatten(1, (1, 2, 2)).expand(-1, 3, -1, -1)
        return nn.functional.interpolate(squares, scale_factor=16.0)


def test_another_kind_of_tokenizer_encodes_in_its_own_precision() -> None:
    tok = Brightness()
    assert isinstance(tok, Tokenizer)
    pixels = pixels_for(build(SMALL))
    encoder = BulkEncoder(tok)
    assert encoder.precision == "exact"
    assert np.array_equal(encoder.encode(pixels), eager(tok, pixels))
    with pytest.raises(InputError, match="precision bf16: a Brightness encodes in its own"):
        BulkEncoder(tok, precision="bf16")
    tok.codebook_size = 3
    with pytest.raises(CommandError, match="but it says that it has 3"):
        encoder = BulkEncoder(tok)
        encoder.encode(pixels)


def test_auto_is_resolved_by_device() -> None:
    model = build(SMALL)
    assert resolve("auto", tok=model, device="cuda") == "fp16"
    assert resolve("auto", tok=model, device="cpu") in ("bf16", "fp32")
    assert resolve("tf32", tok=model, device="cuda:0") == "tf32"
    with pytest.raises(InputError, match="precision tf32: only a GPU has it"):
        resolve("tf32", tok=model, device="cpu")


@pytest.mark.parametrize("tf32", [False, True])
def test_settings_of_torch_are_put_back(tf32: bool) -> None:
    before = [knob.fp32_precision for knob in KNOBS]
    torch.set_float32_matmul_precision("medium")
    try:
        theirs = [knob.fp32_precision for knob in KNOBS]
        with pytest.raises(KeyError), float32_sums(tf32=tf32):
            found = [knob.fp32_precision for knob in KNOBS]
            assert found == ["tf32" if tf32 else "ieee", "ieee", "ieee", "ieee"]
            raise KeyError
        assert [knob.fp32_precision for knob in KNOBS] == theirs
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        for knob, value in zip(KNOBS, before, strict=True):
            knob.fp32_precision = value


def test_exact_is_not_shortened_by_what_the_caller_allows_elsewhere() -> None:
    model = build(SMALL)
    pixels = pixels_for(model)
    expected = eager(model, pixels)
    before = [knob.fp32_precision for knob in KNOBS]
    try:
        for knob in KNOBS[2:]:
            knob.fp32_precision = "bf16"
        assert np.array_equal(BulkEncoder(model, precision="exact").encode(pixels), expected)
    finally:
        for knob, value in zip(KNOBS, before, strict=True):
            knob.fp32_precision = value


@pytest.mark.parametrize("name", ["muse", "attention", "demo"])
def test_the_benchmark_compares_the_same_codes(name: str) -> None:
    model = build(CONFIGS[name])
    pixels = np.ascontiguousarray(pixels_for(model).transpose(0, 3, 1, 2))
    ours = BulkEncoder(model, precision="exact").encode(pixels)
    twin = in_diffusers(model, "cpu")
    assert twin is not None, "diffusers is not installed"
    assert np.array_equal(plain(model, "cpu", tf32=False)([pixels])[0], ours)
    # Attention of diffusers adds in another order: nearly all, not all, equal.
    assert (twin([pixels])[0] == ours).mean() > 0.995


def test_agreement_counts_equal_codes_and_lost_decibels() -> None:
    model = build(SMALL)
    exact = BulkEncoder(model, precision="exact").encode(pixels_for(model))
    decoded = model.decode(torch.from_numpy(exact))
    pixels = (decoded * 255).round().byte().numpy()  # pictures that these codes give back best
    assert agreement(model, pixels, codes=exact, exact=exact) == (1.0, 0.0)
    changed = exact.copy()
    changed[:, ::4] = (changed[:, ::4] + 1) % SMALL.codebook_size
    equal, loss = agreement(model, pixels, codes=changed, exact=exact)
    assert equal == 0.75 and loss > 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["exact", "fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["attention", "demo", "wide"])
def test_cuda_codes_come_near_those_of_the_cpu(name: str, precision: Precision) -> None:
    """Bounds as on the CPU above; TF32 has the bits of fp16. Short batches and refills included."""
    model = build(CONFIGS[name])
    pixels = pixels_for(model, 27)
    encoder = BulkEncoder(model, device="cuda", precision=precision, batch=8)
    buffer = np.empty_like(pixels[:8])

    def refilled() -> Iterator[np.ndarray]:
        for i in range(0, 27, 8):
            part = pixels[i : i + 8]
            buffer[: len(part)] = part
            yield buffer[: len(part)]

    first = np.concatenate(list(encoder.encode_all(refilled())))
    same = {"exact": 0.999, "fp32": 0.999, "tf32": 0.98, "fp16": 0.98, "bf16": 0.9}[precision]
    assert first.shape == (27, model.codes_per_image)
    assert (first == eager(model, pixels)).mean() >= same
    # Warming up, recording and replaying a graph compute the same.
    assert np.array_equal(np.concatenate(list(encoder.encode_all(refilled()))), first)
