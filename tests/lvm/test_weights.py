"""Weight files: safetensors reads what is written, shards add up, and damage is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lvm import weights
from tokenizer.cli import InputError

SHAPES = {"b.weight": (3, 5), "a.weight": (40, 8), "norm": (7,), "z": (2, 2), "c": (1, 1)}


@pytest.fixture
def state(rng) -> dict[str, torch.Tensor]:
    found = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    found["z"] = found["z"].T  # not contiguous
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [1, 100, 1300, 10**9])
def test_safetensors_reads_what_is_written(state, tmp_path, dtype, limit):
    weights.write(tmp_path, state, dtype=dtype, limit=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(file)
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # so is all data aligned
        size = sum(t.nbytes for t in part.values())
        assert size <= limit or len(part) == 1
        assert not found.keys() & part.keys()
        found |= part
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # without it transformers refuses the file
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name
    again = weights.read(tmp_path)
    assert all(torch.equal(again[name], found[name]) for name in found)
    if sum(t.nbytes for t in found.values()) <= limit:
        assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
        return
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert [f.name for f in files] == names
    index = json.loads((tmp_path / weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    assert index["weight_map"].keys() == state.keys()


def edit(folder: Path, **changes: str) -> None:
    index = json.loads((folder / weights.INDEX).read_text())
    index["weight_map"] |= changes
    (folder / weights.INDEX).write_text(json.dumps(index))


@pytest.fixture
def shards(state, tmp_path) -> Path:
    """Five files of one tensor each, in the order of SHAPES."""
    weights.write(tmp_path, state, dtype=torch.float32, limit=1)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret", "a/b.safetensors", "..", "", "a\\b", 7]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(shards, state, name):
    save_file({"norm": state["norm"]}, shards.parent / "secret.safetensors")
    edit(shards, norm=name)
    with pytest.raises(InputError, match="in its own folder"):
        weights.read(shards)


def test_a_missing_shard_is_named(shards):
    (shards / "model-00003-of-00005.safetensors").unlink()
    with pytest.raises(InputError, match=r"names model-00003-of-00005\.safetensors: not in the"):
        weights.read(shards)


def test_what_index_and_shards_do_not_agree_on_is_named(shards, state):
    third = shards / "model-00003-of-00005.safetensors"
    edit(shards, more=third.name)
    with pytest.raises(InputError, match=r"00003-of-00005\.safetensors lacks more, which"):
        weights.read(shards)
    save_file({"norm": state["norm"], "more": state["c"], "odd": state["c"] + 1}, third)
    with pytest.raises(InputError, match=r"00003-of-00005\.safetensors holds odd, which"):
        weights.read(shards)
    save_file({"norm": state["norm"], "more": state["c"], "z": state["c"] + 1}, third)
    with pytest.raises(InputError, match=r"00003-of-00005\.safetensors holds z, which"):
        weights.read(shards)  # though another shard has it


def test_a_damaged_shard_or_index_is_named(shards):
    second = shards / "model-00002-of-00005.safetensors"
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"00002-of-00005\.safetensors cannot be read"):
        weights.read(shards)
    for text, words in (("{", "not JSON"), ("[]", "no weight_map"), ("{}", "no weight_map")):
        (shards / weights.INDEX).write_text(text)
        with pytest.raises(InputError, match=words):
            weights.read(shards)


def test_two_old_files_with_the_same_tensor_are_refused(state, tmp_path):
    for name in ("pytorch_model-1.bin", "pytorch_model-2.bin"):
        torch.save({"norm": state["norm"]}, tmp_path / name)
    with pytest.raises(InputError, match=r"model-2\.bin holds norm, as another"):
        weights.read(tmp_path)


PEAK = """
import resource, sys
import torch
from pathlib import Path
import lvm
from lvm import export
from lvm.config import ModelConfig, Reads
from lvm.model import build

def peak():  # MB, of this process since its start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

reads = Reads(layout="bos", codes=61, codes_per_image=4, row_len=32)
shape = dict(width=512, ffn=1024, heads=8, vocab_size=128)
config = ModelConfig(layers=10, **shape)
small = build(ModelConfig(layers=1, **shape), seed=0, reads=reads)
export.write(small, Path(sys.argv[1]) / "small", dtype=torch.bfloat16)  # what is needed once
lvm.load(Path(sys.argv[1]) / "small", dtype=torch.bfloat16)
model = build(config, seed=0, reads=reads)
before = peak()
export.write(model, Path(sys.argv[1]) / "large", dtype=torch.bfloat16, shard_bytes=10**9)
print(sum(p.nbytes for p in model.parameters()) / 2**20, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux alone")
def test_an_export_holds_one_tensor_more_than_the_model(tmp_path):
    """Half of the model, in bf16, is what a converted file at once would take."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, more = map(float, done.stdout.split())
    assert model > 100
    assert more < 0.2 * model  # one matrix of 1 MB, and what the allocator leaves between them
