"""Model folders in: transformers' own, LVM's release, ours, a run; and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lvm
from lvm import export, interop
from lvm.checkpoint import Saver, Trainer
from lvm.config import Reads
from lvm.generate import generate_codes
from lvm.recipes import recipe
from tokenizer.cli import InputError
from tokenizer.world import World

transformers = pytest.importorskip("transformers", reason="the oracle; in the extra dev")
SHAPE = {
    "vocab_size": 8292,  # LVM's table
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,  # logits with a spread above 1
}


@pytest.fixture(scope="module")
def theirs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def qwen3():
    """Transformers' own, every norm of heads with weights of its own."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        made = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE)).eval()
        for name, parameter in made.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 1.5)
    return made


@pytest.fixture
def folder(theirs, tmp_path) -> Path:
    """As transformers writes it, without an lvm.json: read as LVM's release."""
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def edit(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_a_folder_of_transformers_gives_the_same_logits(theirs, folder, rng):
    model = lvm.load(folder)
    ids = torch.randint(0, 8292, (2, 40), generator=rng)
    assert logits(theirs, ids).std() > 1
    # fp32, the same sums in another order.
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), atol=1e-4, rtol=0)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32


def test_a_qwen3_of_transformers_gives_the_same_logits_and_goes_back(qwen3, tmp_path, rng):
    qwen3.save_pretrained(tmp_path / "hf", max_shard_size="500KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    model = lvm.load(tmp_path / "hf")
    assert model.config.qk_norm and model.config.head_dim == 16 and model.config.norm_eps == 1e-5
    ids = torch.randint(0, 8292, (2, 40), generator=rng)
    # fp32, the same sums in another order.
    torch.testing.assert_close(logits(model, ids), logits(qwen3, ids), atol=1e-4, rtol=0)
    export.write(model, tmp_path / "back", shard_bytes=500_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(back[k], v) for k, v in qwen3.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is True; supported: False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has sliding_attention; supp"),
        ({"attention_bias": True}, r"missing: model\.layers\.0\.self_attn\.k_proj\.bias"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            'rope_scaling is .*"yarn".*; supp',
        ),
        ({"head_dim": None}, "lacks head_dim"),
        ({"num_key_value_heads": None}, "lacks num_key_value_heads"),
        ({"model_type": "llama"}, r"unexpected: model\.layers\.0\.self_attn\.k_norm\.weight"),
    ],
)
def test_what_a_qwen3_may_have_and_is_not_built_here_is_refused(qwen3, tmp_path, changes, words):
    qwen3.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=words):
        lvm.load(edit(tmp_path, **changes))


def test_every_fault_of_a_config_is_named_at_once(folder):
    changes = {"mlp_bias": True, "hidden_act": "gelu", "partial": 1}
    with pytest.raises(InputError, match=r"mlp_bias is True.*; hidden_act is gelu; supp"):
        lvm.load(edit(folder, **changes))


def test_a_llama_whose_norms_were_left_out_of_a_qwen3_is_refused(folder):
    with pytest.raises(InputError, match=r"missing: model\.layers\.0\.self_attn\.k_norm\.weight"):
        lvm.load(edit(folder, model_type="qwen3"))


def test_lvms_release_is_read_as_it_was_published(tmp_path, rng):
    """Three fp16 shards and a config of EasyLM's converter: no head_dim, no specials, so eos 2."""
    half = transformers.LlamaConfig(**{**SHAPE, "head_dim": 12})
    with torch.random.fork_rng():
        torch.manual_seed(2)
        published = transformers.LlamaForCausalLM(half).half().eval()
    published.save_pretrained(tmp_path, max_shard_size="797KB")
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    keys = {k: v for k, v in SHAPE.items() if k not in ("head_dim", "rope_theta")}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **keys}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16", "rope_theta": 5000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = lvm.load(tmp_path)
    assert model.reads == Reads(
        layout="none", codes=8192, codes_per_image=256, row_len=4096, whole_rows=True
    )
    assert model.config.vocab_size == 8292  # 100 rows that no code has
    ids = torch.randint(0, 8192, (2, 40), generator=rng)
    same = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert logits(same, ids).std() > 1
    # fp32, the same sums in another order.
    torch.testing.assert_close(logits(model, ids), logits(same, ids), atol=1e-4, rtol=0)


def test_a_folder_without_lvm_json_reads_as_lvms_release(folder):
    assert lvm.load(folder).reads == Reads(
        layout="none", codes=8192, codes_per_image=256, row_len=4096, whole_rows=True
    )


def test_an_old_config_gives_the_same_model(folder):
    """transformers 4 writes rope_theta and rope_scaling, and may leave defaults out."""
    new = lvm.load(folder).config
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "attention_bias", "mlp_bias", "hidden_act", "dtype"):
        config.pop(key)
    old = {**config, "rope_theta": 5000.0, "rope_scaling": None, "some_new_key": [1]}
    (folder / "config.json").write_text(json.dumps(old))
    assert lvm.load(folder).config == new


@pytest.mark.parametrize("kind", ["bin", "bin shards", "safetensors shards"])
def test_every_layout_of_the_weights_is_read(folder, kind):
    wanted = lvm.load(folder).state_dict()
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    # Buffers of old transformers, which say nothing that the config does not.
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    names = sorted(state)
    parts = [{n: state[n] for n in names[i::2]} for i in range(2)]
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "bin shards":
        for i, part in enumerate(parts, 1):
            torch.save(part, folder / f"pytorch_model-0000{i}-of-00002.bin")
    else:
        table = {}
        for i, part in enumerate(parts, 1):
            file = f"model-0000{i}-of-00002.safetensors"
            save_file(part, folder / file)
            table |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = lvm.load(folder).state_dict()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_half_precision_weights_become_fp32_unless_asked_otherwise(folder):
    state = {k: v.half() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    model = lvm.load(folder)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, state["lm_head.weight"].float())
    assert lvm.load(folder, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_a_tied_head_is_a_copy_of_the_embedding(folder, rng):
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model = lvm.load(edit(folder, tie_word_embeddings=True))
    tied = transformers.LlamaForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 8292, (1, 20), generator=rng)
    torch.testing.assert_close(logits(model, ids), logits(tied, ids), atol=1e-4, rtol=0)
    assert model.head.weight.data_ptr() != model.embed.weight.data_ptr()


def test_an_eos_that_is_a_code_changes_nothing(make_model, tmp_path):
    """The default of LlamaConfig is eos 2, a legal code: generation must run through it."""
    model = make_model(layout="none", codes=8, codes_per_image=16, seed=3)
    prompt = torch.zeros(1, 16, dtype=torch.long)
    export.write(model, tmp_path / "plain")
    export.write(model, tmp_path / "eos")
    edit(tmp_path / "eos", eos_token_id=2, bos_token_id=1, pad_token_id=0)
    (tmp_path / "eos/generation_config.json").write_text('{"eos_token_id": 2}')
    options = {"new": 3, "candidates": 4, "temperature": 3.0}
    drawn = generate_codes(lvm.load(tmp_path / "eos"), prompt, **options)
    assert drawn.shape == (4, 3, 16)
    assert int(drawn.max()) < 8
    assert 2 in drawn[:, 0, :8]  # with an eos, that image would have ended there
    assert torch.equal(drawn, generate_codes(lvm.load(tmp_path / "plain"), prompt, **options))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, r"missing: model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu; supported: silu"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2}}, "linear"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"model_type": "gpt2"}, "describes gpt2"),
        ({"model_type": None}, "no known kind"),
        ({"vocab_size": 8000}, "of another shape: lm_head.weight"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2"),
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1"),
    ],
)
def test_what_is_not_built_here_is_refused(folder, changes, words):
    with pytest.raises(InputError, match=words):
        lvm.load(edit(folder, **changes))


def test_damaged_folders_are_refused_by_what_is_wrong(folder, tmp_path):
    with pytest.raises(InputError, match="no model folder"):
        lvm.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"it has no config\.json"):
        lvm.load(tmp_path / "empty")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        lvm.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        lvm.load(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="names model-00001-of-00001"):
        lvm.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        lvm.load(folder)


def test_a_pickle_with_code_is_not_run(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        lvm.load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_table_without_room_for_the_codes_is_refused(make_model, tmp_path):
    export.write(make_model(), tmp_path / "m")
    (tmp_path / "m/lvm.json").unlink()
    with pytest.raises(InputError, match=r"without an lvm\.json it has 8192 codes"):
        lvm.load(tmp_path / "m")


def test_a_native_folder_of_another_version_is_refused(make_model, tmp_path):
    export.write(make_model(), tmp_path / "m", format="native")
    with pytest.raises(InputError, match="has version 2"):
        lvm.load(edit(tmp_path / "m", version=2))
    model = {"width": 32, "depth": 2}
    with pytest.raises(InputError, match="depth"):
        lvm.load(edit(tmp_path / "m", version=1, model=model))


def test_a_run_folder_gives_its_latest_weights(make_model, tmp_path):
    older, newer = make_model(seed=1), make_model(seed=2)
    run = replace(recipe("tiny"), model=newer.config)
    (tmp_path / "config.json").write_text(json.dumps(run.to_json()))
    newer.reads.save(tmp_path)
    with pytest.raises(InputError, match="no checkpoint yet"):
        lvm.load(tmp_path)
    world = World(device=torch.device("cpu"))
    for step, model in ((1, older), (2, newer)):
        holder = torch.nn.ModuleDict({"model": model})  # as the trainer holds it
        Saver(tmp_path, world, keep=2).save(Trainer(step=step), model=holder, optimisers=[])
    found = lvm.load(tmp_path)
    assert found.config == newer.config
    assert found.reads == newer.reads
    assert not found.training
    state = newer.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in found.state_dict().items())


def test_every_tensor_has_a_name_in_the_table(make_model):
    for qk_norm in (False, True):
        model = make_model(qk_norm=qk_norm)
        assert set(interop.hf_names(model.config)) == set(model.state_dict())


def test_loading_a_model_loads_no_heavy_library(make_model, tmp_path):
    export.write(make_model(), tmp_path / "m")
    code = (
        "import sys, lvm\n"
        "assert 'torch' not in sys.modules\n"
        f"lvm.load({str(tmp_path / 'm')!r})\n"
        "print(sorted({'pyarrow', 'PIL', 'tyro', 'transformers'} & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
