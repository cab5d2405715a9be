"""LlamaGen's tokenizers: it is not installed, so its names, shapes and network are written here
a second time, straight from the description of its files.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import tokenizer
from tokenizer import VQGAN
from tokenizer.formats import llamagen
from tokenizer.formats.shapes import SIGNED, infer_config

CODES = 64


def llamagen_tensors(
    multipliers: tuple[int, ...], *, ch: int, z: int, codes: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """Return random tensors under the names and in the shapes of LlamaGen's files."""
    state: dict[str, Tensor] = {}

    def conv(name: str, c_in: int, c_out: int, side: int) -> None:
        state[f"{name}.weight"] = torch.empty(c_out, c_in, side, side, device=device)
        state[f"{name}.bias"] = torch.empty(c_out, device=device)

    def norm(name: str, c: int) -> None:
        state[f"{name}.weight"] = torch.empty(c, device=device)
        state[f"{name}.bias"] = torch.empty(c, device=device)

    def res(name: str, c_in: int, c_out: int) -> None:
        norm(f"{name}.norm1", c_in)
        conv(f"{name}.conv1", c_in, c_out, 3)
        norm(f"{name}.norm2", c_out)
        conv(f"{name}.conv2", c_out, c_out, 3)
        if c_in != c_out:
            conv(f"{name}.nin_shortcut", c_in, c_out, 1)

    def attn(name: str, c: int) -> None:
        norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", c, c, 1)

    low, c = ch * multipliers[-1], ch
    conv("encoder.conv_in", 3, ch, 3)
    for level, multiplier in enumerate(multipliers):
        for i in range(2):
            res(f"encoder.conv_blocks.{level}.res.{i}", c, ch * multiplier)
            c = ch * multiplier
            if level == len(multipliers) - 1:
                attn(f"encoder.conv_blocks.{level}.attn.{i}", c)
        if level < len(multipliers) - 1:
            conv(f"encoder.conv_blocks.{level}.downsample.conv", c, c, 3)
    conv("decoder.conv_in", z, low, 3)
    for half in ("encoder", "decoder"):
        res(f"{half}.mid.0", low, low)
        attn(f"{half}.mid.1", low)
        res(f"{half}.mid.2", low, low)
    for place, multiplier in enumerate(reversed(multipliers)):  # lowest resolution first
        for i in range(3):
            res(f"decoder.conv_blocks.{place}.res.{i}", c, ch * multiplier)
            c = ch * multiplier
            if place == 0:
                attn(f"decoder.conv_blocks.{place}.attn.{i}", c)
        if place < len(multipliers) - 1:
            conv(f"decoder.conv_blocks.{place}.upsample.conv", c, c, 3)
    norm("encoder.norm_out", low)
    conv("encoder.conv_out", low, z, 3)
    norm("decoder.norm_out", ch)
    conv("decoder.conv_out", ch, 3, 3)
    conv("quant_conv", z, 8, 1)
    conv("post_quant_conv", 8, z, 1)
    state["quantize.embedding.weight"] = torch.empty(codes, 8, device=device)
    state["quantize.codebook_used"] = torch.zeros(65536, device=device)
    if device != "meta":
        torch.manual_seed(0)
        for name, tensor in state.items():
            tensor.normal_(std=1.0 if tensor.ndim < 4 else tensor[0].numel() ** -0.5)
            if ".norm" in name:  # near what a fresh normalisation has, so that signals stay finite
                tensor.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
    return state


class LlamaGen:
    """LlamaGen's network as a walk over the names in a file."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.levels = len({m[0] for n in state if (m := re.match(r"encoder.conv_blocks.\d+", n))})

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 1) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride, padding if weight.shape[-1] == 3 else 0)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def block(self, x: Tensor, name: str) -> Tensor:
        if f"{name}.q.weight" in self.state:
            h = self.norm(x, f"{name}.norm")
            q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
            weights = (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1)
            return x + self.conv((v @ weights.mT).view_as(x), f"{name}.proj_out")
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2")
        if f"{name}.nin_shortcut.weight" in self.state:
            x = self.conv(x, f"{name}.nin_shortcut")
        return x + h

    def level(self, x: Tensor, name: str, blocks: int) -> Tensor:
        for i in range(blocks):
            x = self.block(x, f"{name}.res.{i}")
            if f"{name}.attn.{i}.q.weight" in self.state:
                x = self.block(x, f"{name}.attn.{i}")
        return x

    def mid(self, x: Tensor, half: str) -> Tensor:
        for i in range(3):
            x = self.block(x, f"{half}.mid.{i}")
        return x

    def latents(self, x: Tensor) -> Tensor:
        x = self.conv(x * 2 - 1, "encoder.conv_in")
        for level in range(self.levels):
            name = f"encoder.conv_blocks.{level}"
            x = self.level(x, name, 2)
            if level < self.levels - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"{name}.downsample.conv", 2, 0)
        x = F.silu(self.norm(self.mid(x, "encoder"), "encoder.norm_out"))
        return self.conv(self.conv(x, "encoder.conv_out"), "quant_conv")

    def codes(self, z: Tensor) -> Tensor:
        """Return the codes of the largest cosine, [B, h·w]."""
        vectors = F.normalize(self.state["quantize.embedding.weight"], dim=1)
        return torch.einsum("bdhw,kd->bhwk", F.normalize(z, dim=1), vectors).argmax(-1).flatten(1)

    def decode(self, codes: Tensor, side: int) -> Tensor:
        v = F.normalize(self.state["quantize.embedding.weight"], dim=1)[codes]
        x = self.conv(v.unflatten(1, (side, side)).movedim(-1, 1), "post_quant_conv")
        x = self.mid(self.conv(x, "decoder.conv_in"), "decoder")
        for place in range(self.levels):
            name = f"decoder.conv_blocks.{place}"
            x = self.level(x, name, 3)
            if place < self.levels - 1:
                x = self.conv(F.interpolate(x, scale_factor=2.0), f"{name}.upsample.conv")
        x = self.conv(F.silu(self.norm(x, "decoder.norm_out")), "decoder.conv_out")
        return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    ("multipliers", "tensors", "params"),
    [((1, 1, 2, 2, 4), 344, 71_883_403), ((1, 2, 2, 4), None, 70_109_835)],
    ids=["VQ-16", "VQ-8"],
)
def test_llamagen_has_its_published_size(multipliers, tensors, params) -> None:
    state = llamagen_tensors(multipliers, ch=128, z=256, codes=16384, device="meta")
    assert len(state) == tensors or tensors is None
    state = llamagen.read_tensors(state)
    assert sum(t.numel() for t in state.values()) == params
    config = infer_config(
        state, llamagen.names, source=Path("vq.pt"), pixel_range=SIGNED, normalize_codes=True
    )
    assert config.num_params() == params
    assert config.multipliers == multipliers and config.channels == 128
    assert (config.codebook_size, config.code_dim, config.latent_dim) == (16384, 8, 256)
    assert config.factor == 2 ** (len(multipliers) - 1)
    with torch.device("meta"):
        ours = VQGAN(config).state_dict()
    assert {llamagen.names(name, len(multipliers)): t.shape for name, t in ours.items()} == {
        name: t.shape for name, t in state.items()
    }


@pytest.mark.parametrize("wrapped", [True, False], ids=["checkpoint", "bare table"])
def test_llamagen_checkpoint_gives_its_latents_codes_and_images(
    wrapped: bool, tmp_path: Path
) -> None:
    state = llamagen_tensors((1, 1, 2), ch=32, z=16, codes=CODES)
    path = tmp_path / "vq_ds4.pt"
    theirs, x = LlamaGen(state), torch.rand(2, 3, 32, 32)
    # Latents of unit spread in all directions, so that many codes are in use.
    spread, mean = torch.std_mean(theirs.latents(x), dim=(0, 2, 3))
    state["quant_conv.weight"] /= spread[:, None, None, None]
    state["quant_conv.bias"] = (state["quant_conv.bias"] - mean) / spread
    torch.save({"model": state, "steps": 7} if wrapped else state, path)
    ours = tokenizer.load(path)
    z = theirs.latents(x)
    # fp32; attention and its softmax are written otherwise here, latents are around 1.
    torch.testing.assert_close(ours.latents(x), z, atol=1e-5, rtol=1e-5)
    codes = theirs.codes(z)
    assert torch.equal(ours.encode(x), codes)
    assert codes.unique().numel() > 10  # else equality says little
    torch.testing.assert_close(ours.decode(codes), theirs.decode(codes, 8), atol=1e-5, rtol=0)


def test_llamagen_folder_with_a_config_that_states_no_kind_is_read_by_its_names(
    tmp_path: Path,
) -> None:
    state = llamagen_tensors((1, 2), ch=32, z=16, codes=CODES)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"codebook_size": CODES}))
    assert tokenizer.load(tmp_path).config.normalize_codes
