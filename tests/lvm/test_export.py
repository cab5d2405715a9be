"""Models out: transformers reads the same logits, and a folder is whole or not there."""

import json
from dataclasses import replace

import pytest
import torch

import lvm
from lvm import export, weights
from tokenizer.cli import InputError

transformers = pytest.importorskip("transformers", reason="the oracle; in the extra dev")


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("layout", "qk_norm"), [("bos", False), ("none", False), ("bos", True)])
def test_transformers_reads_the_same_logits(make_model, tmp_path, rng, layout, qk_norm, shards):
    shape = {"rope_theta": 500.0, "norm_eps": 1e-5, "head_dim": 12, "qk_norm": qk_norm}
    model = make_model(layout=layout, **shape)
    size = sum(p.nbytes for p in model.parameters())
    export.write(model, tmp_path / "hf", shard_bytes=size // shards + 5000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == shards
    theirs, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert not any(about.values())  # nothing missing, unexpected or of another shape
    ids = torch.randint(0, model.config.vocab_size, (2, 50), generator=rng)
    with torch.no_grad():
        ours, found = model(ids), theirs.eval()(ids).logits
    assert ours.std() > 1
    torch.testing.assert_close(found, ours, atol=1e-4, rtol=0)  # fp32, other order of sums
    assert not list((tmp_path).glob("*.tmp-*"))


@pytest.mark.parametrize("limit", [10**9, 9000])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("format", ["hf", "native"])
def test_what_is_written_loads_as_the_same_model(make_model, tmp_path, format, qk_norm, limit):
    model = make_model(tokenizer="f" * 64, qk_norm=qk_norm)
    export.write(model, tmp_path / "m", format=format, shard_bytes=limit)
    assert (tmp_path / "m" / weights.INDEX).is_file() == (limit == 9000)
    again = lvm.load(tmp_path / "m")
    written = replace(model.config, head_dim=model.config.dim)  # the default, spelt out
    assert replace(again.config, head_dim=again.config.dim) == written
    assert again.reads == model.reads
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("format", ["hf", "native"])
def test_bf16_is_the_rounded_model(make_model, tmp_path, format):
    model = make_model()
    export.write(model, tmp_path / "m", format=format, dtype=torch.bfloat16)
    again = lvm.load(tmp_path / "m").state_dict()
    assert all(torch.equal(again[k], v.bfloat16().float()) for k, v in model.state_dict().items())
    if format == "hf":
        config = read(tmp_path / "m/config.json")
        assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_the_config_says_what_vllm_and_transformers_read(make_model, tmp_path):
    export.write(make_model(), tmp_path / "hf")
    config = read(tmp_path / "hf/config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is False
    assert (config["bos_token_id"], config["pad_token_id"]) == (40, 42)
    assert config["eos_token_id"] is None
    assert read(tmp_path / "hf/lvm.json")["specials"] == {"bos": 40, "eos": 41, "pad": 42}


def test_the_config_of_a_qwen3_says_what_it_does_not_have(make_model, tmp_path):
    export.write(make_model(qk_norm=True), tmp_path / "hf")
    config = read(tmp_path / "hf/config.json")
    assert (config["architectures"], config["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    absent = ("attention_bias", "use_sliding_window", "tie_word_embeddings")
    assert all(config[key] is False for key in absent)
    assert config["sliding_window"] is config["eos_token_id"] is config["rope_scaling"] is None
    assert (config["head_dim"], config["num_key_value_heads"]) == (8, 2)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert theirs.eos_token_id is None and theirs.layer_types == ["full_attention"] * 2


def test_a_table_of_codes_alone_has_no_specials(make_model, tmp_path):
    export.write(make_model(layout="none", vocab_size=40), tmp_path / "hf")
    config = read(tmp_path / "hf/config.json")
    assert config["bos_token_id"] is config["pad_token_id"] is None
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")  # a pad past the table fails


def test_transformers_generates_one_whole_image_of_codes(make_model, tmp_path):
    model = make_model(codes=8, codes_per_image=16)
    with torch.no_grad():  # a model that would like nothing better than a special id
        model.head.weight[8:] += 4 * model.head.weight[:8].abs().max()
    export.write(model, tmp_path / "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = torch.cat([torch.tensor([8]), torch.arange(16) % 8])[None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = theirs.generate(prompt, attention_mask=torch.ones_like(prompt))
    assert found.shape == (1, 17 + 16)
    assert int(found[0, 17:].max()) < 8


def test_an_earlier_export_is_replaced_whole(make_model, tmp_path):
    out = tmp_path / "m"
    export.write(make_model(seed=1), out, shard_bytes=20_000)
    model = make_model(seed=2)
    files = export.write(model, out, format="native")
    assert {f.name for f in files} == {"config.json", "lvm.json", "model.safetensors"}
    assert torch.equal(lvm.load(out).head.weight, model.head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_foreign_folder_is_left_alone(make_model, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("config.json", "lvm.json", "latest"):
        (tmp_path / "run" / name).write_text("kept")
    with pytest.raises(InputError, match="latest"):
        export.write(make_model(), tmp_path / "run")
    assert (tmp_path / "run/config.json").read_text() == "kept"
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="is a file"):
        export.write(make_model(), tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export.write(make_model(), tmp_path / "empty")


def test_a_failed_export_leaves_the_old_one(make_model, tmp_path, monkeypatch):
    out = tmp_path / "m"
    model = make_model(seed=1)
    export.write(model, out, format="native")

    def full(path, state, **more):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        export.write(make_model(seed=2), out, format="native")
    assert torch.equal(lvm.load(out).head.weight, model.head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_command_exports_any_model_folder(make_model, tmp_path, capsys):
    model = make_model()
    export.write(model, tmp_path / "native", format="native")
    export.main(export.Export(model=tmp_path / "native", out=tmp_path / "hf", dtype="fp32"))
    assert "4 files" in capsys.readouterr().out
    assert torch.equal(lvm.load(tmp_path / "hf").embed.weight, model.embed.weight)


def test_the_command_splits_weights_above_a_size(make_model, tmp_path):
    model = make_model(qk_norm=True)
    export.write(model, tmp_path / "native", format="native")
    command = export.Export(model=tmp_path / "native", out=tmp_path / "hf", shard_gb=2e-5)
    export.main(command)
    files = list((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 20_000 + 2000 for f in files)  # and a header
    found = lvm.load(tmp_path / "hf").state_dict()
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())
    for size in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="--shard-gb"):
            export.main(replace(command, shard_gb=size))


def test_a_model_is_exported_over_itself(make_model, tmp_path):
    """Its weights are mapped from the very files that the export replaces."""
    model = make_model()
    export.write(model, tmp_path / "m", shard_bytes=9000)
    export.main(export.Export(model=tmp_path / "m", out=tmp_path / "m", format="native"))
    found = lvm.load(tmp_path / "m").state_dict()
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())
