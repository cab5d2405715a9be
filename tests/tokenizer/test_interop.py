"""Tokenizer folders: round trip, muse's two file kinds, and what is said of damaged ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokenizer
from tokenizer import VQGAN, VQGANConfig
from tokenizer.cli import InputError

CONFIG = VQGANConfig(
    image_size=32, channels=32, multipliers=(1, 2), latent_dim=16, code_dim=8, codebook_size=32
)
MUSE = {
    "_class_name": "VQGANModel",
    "_version": "0.0.1",
    "attn_resolutions": [],
    "channel_mult": [1, 2],
    "commitment_cost": 0.25,
    "dropout": 0.0,
    "hidden_channels": 32,
    "no_attn_mid_block": True,
    "num_channels": 3,
    "num_embeddings": 32,
    "num_res_blocks": 2,
    "quantized_embed_dim": 8,
    "resample_with_conv": True,
    "resolution": 32,
    "z_channels": 16,
}


@pytest.fixture
def model() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(CONFIG).eval()


def muse_folder(path: Path, model: VQGAN, *, weights: str, **changes: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MUSE | changes))
    if weights.endswith(".bin"):
        torch.save(model.state_dict(), path / weights)
    else:
        save_file(model.state_dict(), path / weights)
    return path


def test_saved_and_loaded_model_is_the_same(model: VQGAN, tmp_path: Path) -> None:
    tokenizer.save(model, tmp_path / "deep" / "tok")
    loaded = tokenizer.load(tmp_path / "deep" / "tok")
    assert loaded.config == model.config and loaded.id == model.id and not loaded.training
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert all(p.requires_grad for p in loaded.parameters())  # it can be trained further
    assert sorted(p.name for p in (tmp_path / "deep" / "tok").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_bf16_model_is_saved_and_loaded_as_fp32(model: VQGAN, tmp_path: Path) -> None:
    tokenizer.save(model.bfloat16(), tmp_path)
    loaded = tokenizer.load(tmp_path)
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}
    assert loaded.id == model.id


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "pytorch_model.safetensors"])
def test_muse_folder_loads_with_unknown_fields(model: VQGAN, tmp_path: Path, weights: str) -> None:
    folder = muse_folder(tmp_path / "muse", model, weights=weights, _name_or_path="laion")
    loaded = tokenizer.load(folder)
    assert loaded.config == CONFIG and loaded.id == model.id


def test_config_of_the_released_muse_tokenizer_is_the_default_config() -> None:
    from tokenizer.formats import muse

    released = MUSE | {
        "channel_mult": [1, 2, 2, 4, 6],
        "hidden_channels": 128,
        "num_embeddings": 8192,
        "quantized_embed_dim": 64,
        "resolution": 256,
        "z_channels": 64,
    }
    assert muse.read_config(released, Path("config.json")) == VQGANConfig()
    # The other way it is the released file, whose 412 bytes are known.
    text = json.dumps(muse.to_config(VQGANConfig()), indent=2, sort_keys=True) + "\n"
    assert json.loads(text) == released and len(text) == 412


def test_pickled_code_is_not_run(model: VQGAN, tmp_path: Path) -> None:
    folder = muse_folder(tmp_path / "muse", model, weights="pytorch_model.bin")
    torch.save({"encoder.conv_in.weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        tokenizer.load(folder)
    assert not (tmp_path / "ran").exists()


class Payload:
    """What a malicious checkpoint would hold."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def edit_tensors(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: edit_tensors(f, lambda s: s.pop("quant_conv.bias")), "missing: quant_conv.bias"),
        (
            lambda f: edit_tensors(f, lambda s: s.update(extra=torch.zeros(1))),
            "unexpected: extra",
        ),
        (
            lambda f: edit_tensors(f, lambda s: s.update({"quant_conv.bias": torch.zeros(9)})),
            r"quant_conv.bias \[9\], wanted \[8\]",
        ),
        (
            lambda f: edit_config(f, codebook_size=64),
            r"embedding.weight \[32, 8\], wanted \[64, 8\]",
        ),
        (lambda f: edit_config(f, chanels=32), "did you mean channels"),
        (lambda f: edit_config(f, channels=33), "multiples of 32"),
        (lambda f: edit_config(f, channels="wide"), "describes no network"),
        (lambda f: edit_config(f, version=2), "reads version 1"),
        (lambda f: edit_config(f, format="vae"), "is of vae"),
        (lambda f: cut(f / "config.json"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "holds a list"),
        (lambda f: (f / "config.json").unlink(), "has no config.json beside it"),
        (lambda f: cut(f / "model.safetensors"), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights; wanted model.safetensors"),
    ],
)
def test_damaged_folder_is_refused_with_its_fault(
    model: VQGAN, tmp_path: Path, damage, words
) -> None:
    tokenizer.save(model, tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=words):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resample_with_conv": False}, "resample_with_conv"),
        ({"num_res_blocks": 1, "attn_resolutions": [16]}, "cannot be reproduced"),
        ({"_class_name": "AutoencoderKL"}, "is of AutoencoderKL"),
    ],
)
def test_unsupported_muse_config_is_refused(model: VQGAN, tmp_path: Path, changes, words) -> None:
    folder = muse_folder(tmp_path / "muse", model, weights="pytorch_model.bin", **changes)
    with pytest.raises(InputError, match=words):
        tokenizer.load(folder)


def test_muse_config_without_a_shape_is_refused(model: VQGAN, tmp_path: Path) -> None:
    folder = muse_folder(tmp_path / "muse", model, weights="pytorch_model.bin")
    raw = {k: v for k, v in MUSE.items() if k != "z_channels"}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="lacks z_channels"):
        tokenizer.load(folder)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        tokenizer.load(tmp_path / "nowhere")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, tokenizer, tokenizer.cli, tokenizer.files\n"
        "assert 'torch' not in sys.modules\n"
        "tokenizer.load, tokenizer.VQGAN, tokenizer.VQGANConfig, tokenizer.Tokenizer\n"
        "heavy = {'PIL', 'tyro', 'rich', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not hasattr(tokenizer, 'nonsense')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_public_name_is_also_a_submodule() -> None:
    modules = {p.stem for p in Path(tokenizer.__file__).parent.glob("*.py")}
    assert not modules & set(tokenizer.__all__)
