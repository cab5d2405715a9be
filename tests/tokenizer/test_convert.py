"""Conversion: there and back without a changed bit, readable by the others, whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tokenizer
from tokenizer import VQGAN, VQGANConfig
from tokenizer.cli import CommandError, InputError, run
from tokenizer.convert import WRITERS, Convert, convert, main

PLAIN = VQGANConfig(
    image_size=32, channels=32, multipliers=(1, 2, 3), latent_dim=16, code_dim=8, codebook_size=128
)
ATTENTION = replace(PLAIN, attention_resolutions=(16,), mid_attention=True)
SIGNED = (-1.0, 1.0)


def make(folder: Path, config: VQGANConfig = PLAIN) -> VQGAN:
    """Save a random model whose codebook spans its latents, so that many codes are in use."""
    torch.manual_seed(0)
    model = VQGAN(config).eval()
    with torch.no_grad():
        spread = model.latents(images()).std()
        model.quant_conv.weight.div_(spread)
        model.quant_conv.bias.div_(spread)
        model.quantize.embedding.weight.normal_()
    tokenizer.save(model, folder)
    return model


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def command(*args: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        run(Convert, main, prog="convert", args=[str(a) for a in args])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("config", [PLAIN, ATTENTION], ids=["plain", "attention"])
@pytest.mark.parametrize("family", ["muse", "diffusers", "taming"])
def test_there_and_back_is_the_same_tokenizer(family, config: VQGANConfig, tmp_path: Path) -> None:
    config = replace(config, pixel_range=SIGNED if family == "taming" else (0.0, 1.0))
    model = make(tmp_path / "ours", config)
    assert convert(tmp_path / "ours", tmp_path / "there", to=family)[0] == "ours"
    found, back = convert(tmp_path / "there", tmp_path / "back", to="ours")
    assert found == family and back.id == model.id and back.config == config
    for (name, tensor), (other, same) in zip(
        model.state_dict().items(), back.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(tensor, same)
    assert torch.equal(back.encode(images()), model.encode(images()))


@pytest.mark.parametrize("pixel_range", [(0.0, 1.0), SIGNED])
@pytest.mark.parametrize("config", [PLAIN, ATTENTION], ids=["plain", "attention"])
def test_diffusers_opens_what_is_written_and_computes_the_same(
    config: VQGANConfig, pixel_range, tmp_path: Path
) -> None:
    from diffusers import VQModel

    model = make(tmp_path / "ours", replace(config, pixel_range=pixel_range))
    convert(tmp_path / "ours", tmp_path / "out", to="diffusers")
    theirs, report = VQModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())  # nothing missing, unexpected or of another shape
    low, high = pixel_range
    with torch.no_grad():
        z = theirs.encode(images() * (high - low) + low).latents
        # fp32; they differ by the order of sums in attention at most.
        torch.testing.assert_close(model.latents(images()), z, atol=1e-5, rtol=1e-5)
        codes = model.encode(images())
        assert torch.equal(codes, theirs.quantize(z)[2][2].view_as(codes))
        assert codes.unique().numel() > 10  # else equality says little
        shown = theirs.decode(codes, force_not_quantize=True, shape=(2, 8, 8, 8)).sample
    shown = ((shown - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(model.decode(codes), shown, atol=1e-4, rtol=0)  # of a range of 1


def test_taming_opens_what_is_written_and_computes_the_same(tmp_path: Path) -> None:
    from taming.modules.diffusionmodules.model import Decoder, Encoder
    from taming.modules.vqvae.quantize import VectorQuantizer

    model = make(tmp_path / "ours", replace(ATTENTION, pixel_range=SIGNED))
    convert(tmp_path / "ours", tmp_path / "out", to="taming")
    raw = json.loads((tmp_path / "out" / "config.yaml").read_text())["model"]
    content = torch.load(tmp_path / "out" / "model.ckpt", weights_only=True)
    assert raw["target"] == "taming.models.vqgan.VQModel"
    params = content["hyper_parameters"]
    assert params == raw["params"]
    theirs = nn.Module()
    theirs.encoder, theirs.decoder = Encoder(**params["ddconfig"]), Decoder(**params["ddconfig"])
    theirs.quantize = VectorQuantizer(params["n_embed"], params["embed_dim"], beta=0.25)
    theirs.quant_conv, theirs.post_quant_conv = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
    theirs.load_state_dict(content["state_dict"], strict=True)
    with torch.no_grad():
        z = theirs.quant_conv(theirs.encoder(images() * 2 - 1))
        # fp32; attention sums in another order.
        torch.testing.assert_close(model.latents(images()), z, atol=1e-5, rtol=1e-5)
        codes = theirs.quantize(z)[2][2]
    assert torch.equal(model.encode(images()), codes.view(2, -1))


def test_taming_without_attention_is_described_as_of_latent_diffusion(tmp_path: Path) -> None:
    make(tmp_path / "ours", replace(PLAIN, pixel_range=SIGNED))
    convert(tmp_path / "ours", tmp_path / "out", to="taming")
    raw = json.loads((tmp_path / "out" / "config.yaml").read_text())["model"]
    assert raw["target"] == "ldm.models.autoencoder.VQModel"
    assert raw["params"]["ddconfig"]["attn_type"] == "none"


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("muse", {"patch": 2}, "its patch is 2, and muse's is always 1"),
        ("muse", {"normalize_codes": True}, "normalize_codes is True"),
        ("muse", {"pixel_range": SIGNED}, r"pixel_range is \(-1\.0, 1\.0\)"),
        ("muse", {"multipliers": (2, 3)}, "no whole multiples"),
        ("muse", {"res_blocks": 1, "attention_resolutions": (32,)}, "cannot be reproduced"),
        ("diffusers", {"patch": 2}, "patch is 2"),
        ("diffusers", {"normalize_codes": True}, "normalize_codes is True"),
        ("taming", {}, r"pixel_range is \(0\.0, 1\.0\)"),
        ("taming", {"patch": 2, "pixel_range": SIGNED}, "patch is 2"),
        ("taming", {"normalize_codes": True, "pixel_range": SIGNED}, "normalize_codes"),
        ("taming", {"multipliers": (2, 3), "pixel_range": SIGNED}, "no whole multiples"),
        ("taming", {"attention_resolutions": (16,), "pixel_range": SIGNED}, "none in the middle"),
    ],
)
def test_tokenizer_that_a_format_cannot_hold_is_refused(
    family, changes, words, tmp_path: Path
) -> None:
    make(tmp_path / "ours", replace(PLAIN, **changes))
    with pytest.raises(InputError, match=words):
        convert(tmp_path / "ours", tmp_path / "out", to=family)
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]  # nothing is left behind


@pytest.mark.parametrize("family", ["ours", "diffusers"])
def test_channels_that_grow_by_fractions_are_kept(family, tmp_path: Path) -> None:
    config = replace(PLAIN, multipliers=(2, 3))
    model = make(tmp_path / "ours", config)
    assert convert(tmp_path / "ours", tmp_path / "out", to=family)[1].id == model.id
    assert tokenizer.load(tmp_path / "out").config == config


def test_multipliers_that_start_above_one_become_another_description(tmp_path: Path) -> None:
    model = make(tmp_path / "ours", replace(PLAIN, multipliers=(2, 4)))
    _, written = convert(tmp_path / "ours", tmp_path / "out", to="muse")
    assert written.id == model.id
    assert (written.config.channels, written.config.multipliers) == (64, (1, 2))


def test_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(tmp_path / "ours")
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    assert command(tmp_path / "ours", "--to", "muse", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "ours → muse" in said and "32 px → 8 × 8 codes of 128" in said
    assert f"id {model.id}" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "pytorch_model.bin",
    ]


def test_command_takes_the_family_of_bare_tensors(tmp_path: Path) -> None:
    model = make(tmp_path / "ours", replace(ATTENTION, pixel_range=SIGNED))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    out = tmp_path / "out"
    assert command(tmp_path / "net.pt", "--to", "ours", "--out", out) == 2
    assert command(tmp_path / "net.pt", "--from", "taming", "--to", "ours", "--out", out) == 0
    loaded = tokenizer.load(out)
    assert loaded.id == model.id and loaded.config.pixel_range == SIGNED


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_command_overwrites_nothing(kind, tmp_path: Path, capsys) -> None:
    make(tmp_path / "ours")
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    else:
        out.write_text("mine")
    assert command(tmp_path / "ours", "--to", "muse", "--out", out) == 2
    assert "already holds something" in capsys.readouterr().err
    assert ((out / "notes.txt") if kind == "folder" else out).read_text() == "mine"


def test_command_says_that_its_folder_cannot_be_made(tmp_path: Path, capsys) -> None:
    make(tmp_path / "ours")
    (tmp_path / "file").write_text("")
    assert command(tmp_path / "ours", "--to", "muse", "--out", tmp_path / "file" / "out") == 2
    assert "cannot be made" in capsys.readouterr().err


def test_written_tokenizer_that_differs_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "ours")

    def spoiled(model: VQGAN, folder: Path) -> None:
        with torch.no_grad():
            model.decoder.conv_out.bias[0] += 1
        tokenizer.save(model, folder)
        with torch.no_grad():
            model.decoder.conv_out.bias[0] -= 1

    def resized(model: VQGAN, folder: Path) -> None:
        model.config, kept = replace(model.config, image_size=64), model.config
        tokenizer.save(model, folder)
        model.config = kept

    for writer, words in ((spoiled, "id changed"), (resized, "image_size changed from 32 to 64")):
        monkeypatch.setitem(WRITERS, "ours", writer)
        with pytest.raises(CommandError, match=words):
            convert(tmp_path / "ours", tmp_path / "out", to="ours")
        assert [p.name for p in tmp_path.iterdir()] == ["ours"]
