"""Checkpoints of taming-transformers and diffusers, made by their own code, and their faults."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokenizer
from tokenizer import VQGAN, VQGANConfig
from tokenizer.cli import InputError
from tokenizer.formats import llamagen
from tokenizer.formats.shapes import SIGNED

CODES, WIDTH = 64, 8


def images(count: int = 2, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def assert_codes(codes: Tensor, expected: Tensor) -> None:
    assert torch.equal(codes, expected.view_as(codes))
    assert codes.unique().numel() > 10  # else equality says little


# taming-transformers


class Taming(nn.Module):
    """The parts of taming's VQModel; the class itself wants a Lightning of 2021."""

    def __init__(self, **changes: object) -> None:
        from taming.modules.diffusionmodules.model import Decoder, Encoder
        from taming.modules.vqvae.quantize import VectorQuantizer

        super().__init__()
        shape = {
            "ch": 32, "out_ch": 3, "ch_mult": (1, 1, 2), "num_res_blocks": 2, "in_channels": 3,
            "attn_resolutions": [8], "resolution": 32, "z_channels": 16, "double_z": False,
        }  # fmt: skip
        torch.manual_seed(0)
        self.encoder, self.decoder = Encoder(**shape | changes), Decoder(**shape | changes)
        self.quantize = VectorQuantizer(CODES, WIDTH, beta=0.25)
        self.quant_conv = nn.Conv2d(16, WIDTH, 1)
        self.post_quant_conv = nn.Conv2d(WIDTH, 16, 1)
        self.loss = nn.Conv2d(3, 4, 3)  # stands for discriminator and LPIPS
        self.model_ema = nn.Conv2d(3, 4, 3)  # of latent diffusion
        self.eval()
        with torch.no_grad():
            # Latents and codes of unit spread, so that many codes are in use.
            spread = self.latents(images()).std()
            self.quant_conv.weight.div_(spread)
            self.quant_conv.bias.div_(spread)
            self.quantize.embedding.weight.normal_()

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x * 2 - 1))

    @torch.no_grad()
    def decode(self, vectors: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(vectors)) / 2 + 0.5


def taming_file(folder: Path, model: nn.Module, **extra: object) -> Path:
    path = folder / "last.ckpt"
    torch.save({"epoch": 3, "state_dict": model.state_dict(), **extra}, path)
    return path


@pytest.mark.parametrize("attended", [[8], [32, 16], []])
def test_taming_checkpoint_gives_its_latents_codes_and_images(attended, tmp_path: Path) -> None:
    theirs = Taming(attn_resolutions=attended)
    taming_file(tmp_path, theirs)
    (tmp_path / "model.yaml").write_text("model: {}\n")
    ours = tokenizer.load(tmp_path)  # a folder without config.json
    assert ours.config.mid_attention and ours.config.pixel_range == SIGNED
    assert ours.config.multipliers == (1, 1, 2) and ours.image_size == 256
    x = images()
    z = theirs.latents(x)
    # fp32; attention sums in another order here and there.
    torch.testing.assert_close(ours.latents(x), z, atol=1e-5, rtol=1e-5)
    vectors, _, (_, _, codes) = theirs.quantize(z)
    assert_codes(ours.encode(x), codes)
    # The same, and taming's straight-through vectors z + (v - z) are rounded twice.
    torch.testing.assert_close(ours.pixels(vectors), theirs.decode(vectors), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours.decode(ours.encode(x)), theirs.decode(vectors).clamp(0, 1), atol=1e-4, rtol=0
    )


def test_image_size_of_a_taming_file_is_that_of_its_hyper_parameters(tmp_path: Path) -> None:
    path = taming_file(tmp_path, Taming(), hyper_parameters={"ddconfig": {"resolution": 32}})
    loaded = tokenizer.load(path)
    assert loaded.image_size == 32 and loaded.config.attention_resolutions == (8,)


def test_bare_tensors_named_alike_need_their_family(tmp_path: Path) -> None:
    theirs = Taming()
    torch.save(theirs.state_dict(), tmp_path / "net.pt")
    with pytest.raises(InputError, match=r"unexpected: loss\.bias"):  # dropped for taming alone
        tokenizer.load(tmp_path / "net.pt", family="muse")
    del theirs.loss, theirs.model_ema
    torch.save(theirs.state_dict(), tmp_path / "net.pt")
    with pytest.raises(InputError, match=r"named alike by muse .* --from muse"):
        tokenizer.load(tmp_path / "net.pt")
    taming = tokenizer.load(tmp_path / "net.pt", family="taming")
    muse = tokenizer.load(tmp_path / "net.pt", family="muse")
    assert taming.id == muse.id
    x = images()
    torch.testing.assert_close(taming.latents(x), muse.latents(x * 2 - 1), atol=0, rtol=0)
    with pytest.raises(InputError, match=r"no config\.json of ours"):
        tokenizer.load(tmp_path / "net.pt", family="ours")
    with pytest.raises(InputError, match=r"no 4-dimensional tensor encoder\.conv_blocks"):
        tokenizer.load(tmp_path / "net.pt", family="llamagen")
    with pytest.raises(InputError, match="wanted one of ours, muse"):
        tokenizer.load(tmp_path / "net.pt", family="vae")  # type: ignore[arg-type]


def test_gumbel_vqgan_is_refused_by_name(tmp_path: Path) -> None:
    theirs = Taming()
    theirs.quantize = nn.ModuleDict({"embed": nn.Embedding(8, 8), "proj": nn.Conv2d(8, 8, 1)})
    with pytest.raises(InputError, match="Gumbel"):
        tokenizer.load(taming_file(tmp_path, theirs))


# diffusers


def diffusers_model(**changes: object):
    from diffusers import VQModel

    shape = {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (64, 96, 128), "layers_per_block": 2, "latent_channels": WIDTH,
        "num_vq_embeddings": CODES, "norm_num_groups": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    model = VQModel(**shape | changes).eval()
    with torch.no_grad():
        model.quant_conv.weight.div_(model.encode(images()).latents.std())
        model.quantize.embedding.weight.normal_()
    return model


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("amused", [True, False], ids=["amused", "latent diffusion"])
def test_diffusers_folder_gives_its_latents_codes_and_images(
    amused: bool, safe: bool, tmp_path: Path
) -> None:
    theirs = diffusers_model(lookup_from_codebook=amused)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    ours, x = tokenizer.load(tmp_path), images()
    assert ours.image_size == 256  # sample_size was left at its default, 32
    fed = x if amused else x * 2 - 1
    with torch.no_grad():
        z = theirs.encode(fed).latents
        # fp32; attention sums in another order.
        torch.testing.assert_close(ours.latents(x), z, atol=1e-5, rtol=1e-5)
        vectors, _, (_, _, codes) = theirs.quantize(z)
        assert_codes(ours.encode(x), codes)
        shown = theirs.decode(z).sample
    shown = shown if amused else shown / 2 + 0.5
    torch.testing.assert_close(ours.pixels(vectors), shown, atol=1e-4, rtol=1e-4)  # as above


def test_old_names_of_diffusers_attention_are_read(tmp_path: Path) -> None:
    diffusers_model().save_pretrained(tmp_path)
    before = tokenizer.load(tmp_path).id
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {
        re.sub(r"to_([qkv]|out\.0)\.", lambda m: old[m[0][:-1]] + ".", name): tensor
        for name, tensor in load_file(file).items()
    }
    assert any("proj_attn" in name for name in state)
    save_file(state, file)
    assert tokenizer.load(tmp_path).id == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "spatial"}, "norm_type 'spatial'"),
        ({"act_fn": "gelu"}, "act_fn 'gelu'"),
        ({"norm_num_groups": 16}, "norm_num_groups 16"),
        ({"out_channels": 1}, "out_channels that differ"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "'DownBlock2D' in down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "attention at other levels"),
        ({"block_out_channels": [64, 96]}, "for 3 levels"),
        ({"block_out_channels": [64, 96, "x"]}, "block_out_channels"),
        ({"block_out_channels": [64, 96, 100]}, "multiples of 32"),
        ({"layers_per_block": "two"}, "describes no network"),
        ({"num_vq_embeddings": 65}, r"quantize.embedding.weight \[64, 8\], wanted \[65, 8\]"),
        ({"layers_per_block": 1}, r"unexpected: decoder\.up_blocks\.0\.resnets\.2"),
        ({"mid_block_add_attention": False}, r"unexpected: .*mid_block\.attentions"),
    ],
)
def test_diffusers_config_of_another_network_is_refused(changes, words, tmp_path: Path) -> None:
    diffusers_model().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(InputError, match=words):
        tokenizer.load(tmp_path)


def test_diffusers_file_needs_its_config_and_a_pipeline_is_not_a_tokenizer(tmp_path: Path) -> None:
    diffusers_model().save_pretrained(tmp_path / "vqvae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "AmusedPipeline"}')
    with pytest.raises(InputError, match="often vqvae"):
        tokenizer.load(tmp_path)
    (tmp_path / "vqvae" / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json of diffusers beside it"):
        tokenizer.load(tmp_path / "vqvae")


# All


def small() -> VQGAN:
    return VQGAN(VQGANConfig(channels=32, multipliers=(1, 2), mid_attention=True))


@pytest.mark.parametrize("family", ["taming", "llamagen", "diffusers"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "another shape"])
def test_wrong_tensors_are_named_as_the_file_names_them(family, fault, tmp_path: Path) -> None:
    if family == "diffusers":
        diffusers_model().save_pretrained(tmp_path)
        path, name = tmp_path / "diffusion_pytorch_model.safetensors", "decoder.up_blocks.0."
        state = load_file(path)
    elif family == "taming":
        path, name = tmp_path / "last.ckpt", "decoder.up.0."
        state = Taming().state_dict()
    else:
        path, name = tmp_path / "vq.pt", "decoder.conv_blocks.0."
        state = {llamagen.names(k, 2): v for k, v in small().state_dict().items()}
    victim = sorted(key for key in state if key.startswith(name))[0]
    tensor = state.pop(victim)
    if fault == "unexpected":
        victim = f"{victim}_extra"
        state |= {victim: tensor, victim.removesuffix("_extra"): tensor.clone()}
    elif fault == "another shape":
        state[victim] = torch.zeros(5)
    if family == "diffusers":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if family == "taming" else {"model": state}, path)
    with pytest.raises(InputError, match=rf"does not fit .* {fault}: {re.escape(victim)}"):
        tokenizer.load(path)


def test_config_beside_a_file_is_used_and_must_not_contradict_the_family(tmp_path: Path) -> None:
    diffusers_model(lookup_from_codebook=True).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert tokenizer.load(file).id == tokenizer.load(tmp_path).id
    with pytest.raises(InputError, match="is of diffusers, not of taming"):
        tokenizer.load(file, family="taming")
