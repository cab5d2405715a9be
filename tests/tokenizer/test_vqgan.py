"""Parity of the VQ-GAN with diffusers' VQModel, the tensor layout of muse, and the API contract."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.vq_lookup import TABLE_ENTRIES
from tokenizer import VQGAN, Tokenizer, VQGANConfig
from tokenizer.cli import InputError
from tokenizer.codebook import nearest

SMALL = VQGANConfig(
    image_size=32, channels=32, multipliers=(1, 2, 2), latent_dim=16, code_dim=8, codebook_size=128
)
ATTENTION = replace(SMALL, attention_resolutions=(16,), mid_attention=True)


def build(config: VQGANConfig, *, seed: int = 0) -> VQGAN:
    """Return a random model whose codebook spans its latents, so that many codes are in use."""
    torch.manual_seed(seed)
    model = VQGAN(config).eval()
    with torch.no_grad():
        # A fresh 1×1 convolution shrinks latents until few codes are near; give both unit spread.
        latents = model.latents(torch.rand(2, config.in_channels, 32, 32))
        model.quant_conv.weight.div_(latents.std())
        model.quant_conv.bias.div_(latents.std())
        model.quantize.embedding.weight.normal_()
    return model


def diffusers_twin(model: VQGAN):
    """Return diffusers' VQModel with the weights of `model`, strictly loaded."""
    from diffusers import VQModel

    c = model.config
    levels = [c.has_attention(level) for level in range(len(c.widths))]
    down = ["AttnDownEncoderBlock2D" if attended else "DownEncoderBlock2D" for attended in levels]
    up = ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(levels)]
    twin = VQModel(
        in_channels=c.in_channels,
        out_channels=c.in_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=c.widths,
        layers_per_block=c.res_blocks,
        latent_channels=c.latent_dim,
        sample_size=c.image_size,
        num_vq_embeddings=c.codebook_size,
        vq_embed_dim=c.code_dim,
        mid_block_add_attention=c.mid_attention,
        lookup_from_codebook=True,
    ).eval()
    state = {
        diffusers_name(name, levels=len(c.widths)): tensor
        for name, tensor in model.state_dict().items()
    }
    for name, tensor in state.items():
        if ".attentions." in name and tensor.ndim == 4:
            state[name] = tensor[:, :, 0, 0]  # 1×1 convolutions here, linear layers there
    twin.load_state_dict(state, strict=True)
    return twin


def diffusers_name(name: str, *, levels: int) -> str:
    """Translate one of our (muse's) tensor names; decoder levels are counted the other way."""

    def up(match: re.Match[str]) -> str:
        return f"up_blocks.{levels - 1 - int(match[1])}."

    rules = [
        (r"\bdown\.(\d+)\.", r"down_blocks.\1."),
        (r"\bup\.(\d+)\.", up),
        (r"\.block\.(\d+)\.", r".resnets.\1."),
        (r"\.attn\.(\d+)\.", r".attentions.\1."),
        (r"\.downsample\.", ".downsamplers.0."),
        (r"\.upsample\.", ".upsamplers.0."),
        (r"nin_shortcut", "conv_shortcut"),
        (r"mid\.block_1\.", "mid_block.resnets.0."),
        (r"mid\.block_2\.", "mid_block.resnets.1."),
        (r"mid\.attn_1\.", "mid_block.attentions.0."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
        (r"\bnorm_out\b", "conv_norm_out"),
    ]
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def assert_equal_to_diffusers(model: VQGAN, images: Tensor) -> None:
    twin = diffusers_twin(model)
    with torch.no_grad():
        latents, theirs = model.latents(images), twin.encode(images).latents
        # fp32; they differ by the order of sums in attention at most.
        torch.testing.assert_close(latents, theirs, atol=1e-5, rtol=1e-5)
        codes = model.encode(images)
        their_codes = twin.quantize(theirs)[2][2].view(len(images), -1)
        assert torch.equal(codes, their_codes)
        assert codes.unique().numel() > 10  # else equality says little
        side = images.shape[-1] // model.config.factor
        shape = (len(images), side, side, model.config.code_dim)
        expected = twin.decode(codes, force_not_quantize=True, shape=shape).sample.clamp(0, 1)
        torch.testing.assert_close(model.decode(codes), expected, atol=1e-4, rtol=0)  # range 1


@pytest.mark.parametrize("config", [SMALL, ATTENTION], ids=["plain", "attention"])
def test_latents_codes_and_pixels_equal_those_of_diffusers(config: VQGANConfig) -> None:
    assert_equal_to_diffusers(build(config), torch.rand(3, 3, 32, 32))


def test_full_size_muse_network_equals_diffusers() -> None:
    model = build(VQGANConfig())
    assert len(model.state_dict()) == 277
    assert sum(p.numel() for p in model.parameters()) == 146_244_675
    assert_equal_to_diffusers(model, torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("config", "tensors", "params"),
    [
        (VQGANConfig(), 277, 146_244_675),  # as released
        (  # the defaults of muse's class, which has attention
            VQGANConfig(
                multipliers=(1, 1, 2, 2, 4),
                attention_resolutions=(16,),
                mid_attention=True,
                latent_dim=256,
                code_dim=256,
                codebook_size=1024,
            ),
            343,
            72_141_699,
        ),
        (replace(ATTENTION, patch=2, res_blocks=1), None, None),
        (replace(SMALL, multipliers=(3,), in_channels=1, code_dim=16), None, None),
    ],
    ids=["muse", "muse defaults", "patch", "one level"],
)
def test_num_params_is_that_of_the_network(
    config: VQGANConfig, tensors: int | None, params: int | None
) -> None:
    with torch.device("meta"):
        model = VQGAN(config)
    assert (
        sum(p.numel() for p in model.parameters())
        == config.num_params()
        == (params or config.num_params())
    )
    assert tensors in (None, len(model.state_dict()))


def test_codes_equal_those_of_vector_quantize_pytorch() -> None:
    from vector_quantize_pytorch import VectorQuantize

    model = build(SMALL)
    with torch.no_grad():
        latents = model.latents(torch.rand(4, 3, 32, 32))
        oracle = VectorQuantize(
            dim=SMALL.code_dim, codebook_size=SMALL.codebook_size, accept_image_fmap=True
        ).eval()
        oracle._codebook.embed.copy_(model.quantize.embedding.weight[None])
        _, codes, _ = oracle(latents)
    assert torch.equal(model.quantize.search(latents), codes.flatten(1))


def test_code_search_is_fp32_under_autocast_and_in_a_bf16_model() -> None:
    generator = torch.Generator().manual_seed(0)
    # Neighbours are about 0.1 apart around 1: easy in fp32, lost in bf16's steps of 1/128.
    vectors = 1.0 + 0.02 * torch.randn(64, 8, generator=generator)
    expected = torch.randperm(64, generator=generator)
    points = vectors[expected] + 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(points, vectors), expected)
        low = (points @ vectors.T * -2 + vectors.square().sum(1)).argmin(1)
    assert (low != expected).float().mean() > 0.3  # autocast alone would spoil it

    model = build(SMALL).bfloat16()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        points = model.latents(images).movedim(1, -1).flatten(0, 2).double()
        vectors = model.quantize.embedding.weight.double()
        distances = torch.cdist(points, vectors)
        chosen = distances.gather(1, model.encode(images).view(-1, 1))[:, 0]
    # Equal to fp64's minimum up to fp32 rounding of squared distances of about 10.
    torch.testing.assert_close(chosen, distances.amin(1), atol=1e-5, rtol=0)


def test_code_search_in_pieces_equals_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(100, 4, generator=generator)
    vectors = torch.randn(16, 4, generator=generator)
    whole = nearest(points, vectors)
    monkeypatch.setitem(TABLE_ENTRIES, "cpu", 16 * 7)
    assert torch.equal(nearest(points, vectors), whole)


def test_normalized_codes_depend_on_directions_only() -> None:
    model = build(replace(SMALL, normalize_codes=True))
    images = torch.rand(2, 3, 32, 32)
    codes, pixels = model.encode(images), model.decode(model.encode(images))
    with torch.no_grad():
        model.quantize.embedding.weight.mul_(torch.rand(SMALL.codebook_size, 1) + 0.5)
        model.quant_conv.weight.mul_(7.0)
        model.quant_conv.bias.mul_(7.0)
    assert torch.equal(model.encode(images), codes)
    torch.testing.assert_close(model.decode(codes), pixels, atol=1e-5, rtol=0)  # fp32 rounding


@pytest.mark.parametrize(("place", "row", "column"), [(0, 0, 0), (31, 0, 31), (992, 31, 0)])
def test_codes_are_in_raster_order(place: int, row: int, column: int) -> None:
    model = build(replace(SMALL, image_size=128))  # 32 × 32 codes
    codes = torch.randint(128, (1, model.codes_per_image))
    other = codes.clone()
    other[0, place] = (other[0, place] + 1) % 128
    with torch.no_grad():
        pixels = [model.pixels(vectors_of(model, c))[0] for c in (codes, other)]
    change = (pixels[0] - pixels[1]).abs().sum(0)  # [128, 128]
    y, x = divmod(int(change.argmax()), 128)
    assert abs(y - 4 * row) < 24 and abs(x - 4 * column) < 24
    # GroupNorm carries a trace of the change everywhere, so "unchanged" is small, not zero.
    near = change[max(0, 4 * row - 48) : 4 * row + 48, max(0, 4 * column - 48) : 4 * column + 48]
    assert near.square().sum() > 0.95 * change.square().sum()


def vectors_of(model: VQGAN, codes: Tensor) -> Tensor:
    side = int(codes.shape[1] ** 0.5)
    return model.quantize.lookup(codes).unflatten(1, (side, side)).movedim(-1, 1)


def test_model_keeps_the_tokenizer_contract() -> None:
    model = build(SMALL)
    assert isinstance(model, Tokenizer)
    codes = model.encode(torch.rand(2, 3, 32, 32))
    assert codes.shape == (2, 64) == (2, model.codes_per_image) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < model.codebook_size == 128
    images = model.decode(codes)
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32
    assert float(images.min()) >= 0.0 and float(images.max()) <= 1.0
    assert not images.requires_grad


def test_pixel_range_is_inside_and_zero_to_one_outside() -> None:
    model = build(SMALL)
    signed = VQGAN(replace(SMALL, pixel_range=(-1.0, 1.0))).eval()
    signed.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        # 2x - 1 is rounded once in both, so nothing but that differs.
        torch.testing.assert_close(
            signed.latents(images), model.latents(images * 2 - 1), rtol=0, atol=0
        )
        z = torch.randn(1, SMALL.code_dim, 4, 4)
        torch.testing.assert_close(signed.pixels(z), (model.pixels(z) + 1) / 2, rtol=0, atol=1e-6)


def test_other_sizes_layouts_and_oblong_images_are_encoded() -> None:
    model = build(replace(SMALL, patch=2))
    assert model.encode(torch.rand(1, 3, 64, 64)).shape == (1, 64)
    assert model.encode(torch.rand(1, 3, 16, 64)).shape == (1, 16)
    images = torch.rand(3, 48, 40, 3)[:, 4:36, 4:36]
    assert torch.equal(
        model.encode(images.permute(0, 3, 1, 2)),
        model.encode(images.permute(0, 3, 1, 2).contiguous()),
    )
    assert model.decode(model.encode(torch.rand(1, 3, 64, 64))).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.encode(torch.rand(1, 3, 30, 32)), "multiples of 4"),
        (lambda m: m.encode(torch.rand(3, 32, 32)), "wants"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "divide by 255"),
        (lambda m: m.encode(torch.full((1, 3, 32, 32), torch.nan)), "pixels from nan to nan"),
        (lambda m: m.encode(torch.full((1, 3, 32, 32), 255.0)), "from 255 to 255: wanted"),
        (lambda m: m.encode(torch.full((1, 3, 32, 32), -1.0)), "is scaled"),
        (lambda m: m.decode(torch.zeros(1, 60, dtype=torch.int64)), "square"),
        (lambda m: m.decode(torch.full((1, 64), 128)), "0 … 127"),
        (lambda m: replace(SMALL, channels=40), "multiples of 32"),
        (lambda m: replace(SMALL, image_size=30), "no multiple of 4"),
    ],
)
def test_wrong_input_is_refused_with_what_was_wanted(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(build(SMALL))


def test_id_follows_the_weights_and_nothing_else() -> None:
    model = build(SMALL)
    first = model.id
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert model.train().id == first == build(SMALL).id
    with torch.no_grad():
        model.decoder.conv_in.bias[3] += 1e-6
    changed = model.id
    assert changed != first
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    model.latents(torch.rand(1, 3, 32, 32)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.id not in (first, changed)
    assert build(SMALL).bfloat16().id == build(SMALL).bfloat16().float().id  # by fp32 value
