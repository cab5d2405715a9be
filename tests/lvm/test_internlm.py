"""DeLVM's weights: InternLM's checkpoints, whole and in parts, against transformers' LLaMA."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import lvm
from lvm import export, internlm, interop
from lvm.config import Reads
from lvm.internlm_parts import SETTINGS_CLASS
from lvm.model import on_meta
from tokenizer.cli import InputError, run

transformers = pytest.importorskip("transformers", reason="the oracle; in the extra dev")
WIDTH, HEADS, DIM, FFN, LAYERS, CODES, CHANNELS = 32, 4, 8, 256, 4, 96, 6
SETTINGS = {
    "num_attention_heads": HEADS,
    "vocab_size": CODES,
    "hidden_size": WIDTH,
    "num_layers": LAYERS,
    "mlp_ratio": 8 / 3,
    "norm_type": "rmsnorm",
    "layer_norm_epsilon": 1e-5,
    "num_chunks": 1,
    "dtype": torch.float16,
    "lvm_config": {"enable": True, "embedding_cfg": {"embedding_dim": WIDTH}},
}


@pytest.fixture
def state(rng) -> dict[str, Tensor]:
    """A whole model by InternLM's names, far from its initialisation, biases and all."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng) / shape[-1] ** 0.5 * 1.5

    found = {
        "embedding.vq_model.quantize.embedding.weight": draw(CODES, CHANNELS),
        "embedding.vq_model.encoder.conv_in.weight": draw(4, 3, 3, 3),  # stored, and not read
        "embedding.embed_proj.weight": draw(WIDTH, CHANNELS) * 3,
        "norm.weight": 0.5 + torch.rand(WIDTH, generator=rng),
        "head.weight": draw(CODES, WIDTH),
    }
    for i in range(LAYERS):
        block = f"blocks.{i}"
        found |= {
            f"{block}.mixer.Wqkv.weight": draw(3 * WIDTH, WIDTH),
            f"{block}.mixer.Wqkv.bias": draw(3 * WIDTH) * 3,
            f"{block}.mixer.out_proj.weight": draw(WIDTH, WIDTH),
            f"{block}.mixer.out_proj.bias": draw(WIDTH) * 3,
            f"{block}.mixer.rotary_emb.inv_freq": draw(DIM // 2),
            f"{block}.mlp.w1.weight": draw(FFN, WIDTH),
            f"{block}.mlp.w2.weight": draw(FFN, WIDTH),
            f"{block}.mlp.w3.weight": draw(WIDTH, FFN),
            f"{block}.norm1.weight": 0.5 + torch.rand(WIDTH, generator=rng),
            f"{block}.norm2.weight": 0.5 + torch.rand(WIDTH, generator=rng),
        }
    return found


def oracle(state: Mapping[str, Tensor], *, eps: float = 1e-5) -> Any:
    """transformers' LLaMA with the same weights, q, k and v taken from Wqkv head by head."""
    s = dict(state)
    table = s["embedding.vq_model.quantize.embedding.weight"]
    hf = {
        "model.embed_tokens.weight": table @ s["embedding.embed_proj.weight"].T,
        "model.norm.weight": s["norm.weight"],
        "lm_head.weight": s["head.weight"],
    }
    for i in range(LAYERS):
        block, there = f"blocks.{i}", f"model.layers.{i}"
        rows = s[f"{block}.mixer.Wqkv.weight"].view(3, HEADS, DIM, WIDTH)
        biases = s[f"{block}.mixer.Wqkv.bias"].view(3, HEADS, DIM)
        for part, name in enumerate("qkv"):
            proj = f"{there}.self_attn.{name}_proj"
            hf[f"{proj}.weight"] = torch.cat([rows[part, head] for head in range(HEADS)])
            hf[f"{proj}.bias"] = torch.cat([biases[part, head] for head in range(HEADS)])
        hf |= {
            f"{there}.self_attn.o_proj.weight": s[f"{block}.mixer.out_proj.weight"],
            f"{there}.self_attn.o_proj.bias": s[f"{block}.mixer.out_proj.bias"],
            f"{there}.mlp.gate_proj.weight": s[f"{block}.mlp.w1.weight"],
            f"{there}.mlp.up_proj.weight": s[f"{block}.mlp.w2.weight"],
            f"{there}.mlp.down_proj.weight": s[f"{block}.mlp.w3.weight"],
            f"{there}.input_layernorm.weight": s[f"{block}.norm1.weight"],
            f"{there}.post_attention_layernorm.weight": s[f"{block}.norm2.weight"],
        }
    config = transformers.LlamaConfig(
        vocab_size=CODES,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        rms_norm_eps=eps,
        attention_bias=True,
    )
    made = transformers.LlamaForCausalLM(config)
    made.load_state_dict(hf)
    return made.eval()


def shard(state: Mapping[str, Tensor], *, ranks: int, stages: int) -> dict[str, dict[str, Tensor]]:
    """Cut a whole model as InternLM does, written apart from the code that joins; file by name."""
    files: dict[str, dict[str, Tensor]] = {}
    each, last = LAYERS // stages, stages - 1
    for t in range(ranks):
        for p in range(stages):
            part: dict[str, Tensor] = {}
            for name, tensor in state.items():
                if name.startswith("blocks."):
                    _, layer, rest = name.split(".", 2)
                    if int(layer) // each != p:
                        continue
                    name = f"blocks.{int(layer) % each}.{rest}"
                elif p != (0 if name.startswith("embedding.") else last):
                    continue
                heads = HEADS // ranks
                if "Wqkv" in name:
                    whole = tensor.view(3, HEADS, DIM, *tensor.shape[1:])
                    tensor = whole[:, t * heads : (t + 1) * heads].flatten(0, 2)
                elif name.endswith(("w1.weight", "w2.weight", "head.weight")):
                    size = len(tensor) // ranks
                    tensor = tensor[t * size : (t + 1) * size]
                elif name.endswith(("out_proj.weight", "w3.weight")):
                    size = tensor.shape[1] // ranks
                    tensor = tensor[:, t * size : (t + 1) * size]
                elif name.endswith("out_proj.bias") and t:
                    continue
                part[name] = tensor.clone()
            files[f"model_tp{t}_pp{p}.pt"] = part
    return files


def put(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    *,
    settings: Mapping[str, Any] | None = SETTINGS,
    prefix: str = "",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        torch.save({f"{prefix}{key}": tensor for key, tensor in part.items()}, folder / name)
    if settings is not None:
        torch.save(dict(settings), folder / "model_config.pt")
    return folder


def logits_agree(model, theirs, rng) -> None:
    ids = torch.randint(0, CODES, (2, 40), generator=rng)
    with torch.no_grad():
        ours, found = model(ids), theirs(ids).logits
    assert ours.std() > 1
    torch.testing.assert_close(ours, found, atol=1e-4, rtol=0)  # fp32, other order of sums


@pytest.mark.parametrize(
    ("ranks", "stages", "prefix"), [(1, 1, ""), (1, 1, "model."), (2, 1, ""), (1, 2, ""),
                                    (2, 2, "model."), (4, 4, "")]
)  # fmt: skip
def test_logits_are_those_of_a_llama_with_biases(state, tmp_path, rng, ranks, stages, prefix):
    folder = put(tmp_path / "c", shard(state, ranks=ranks, stages=stages), prefix=prefix)
    model = lvm.load(folder)
    assert not model.training
    assert model.reads == Reads(layout="none", codes=CODES, codes_per_image=256, row_len=2048)
    assert model.config.codebook_dim == CHANNELS
    assert model.config.attn_bias
    assert model.config.norm_eps == 1e-5
    codebook = state["embedding.vq_model.quantize.embedding.weight"]
    assert torch.equal(model.state_dict()["embed.codebook"], codebook)
    assert not model.embed.codebook.requires_grad
    logits_agree(model, oracle(state), rng)


def test_a_projection_in_parts_is_joined_by_rows(state, tmp_path):
    files = shard(state, ranks=2, stages=1)
    name = "embedding.embed_proj.weight"
    for t in range(2):
        files[f"model_tp{t}_pp0.pt"][name] = state[name][t * WIDTH // 2 : (t + 1) * WIDTH // 2]
    model = lvm.load(put(tmp_path / "c", files))
    assert torch.equal(model.state_dict()["embed.proj.weight"], state[name])


def test_copies_of_ranks_may_differ_in_their_last_bits(state, tmp_path):
    """Each rank updates its own copy of what all have."""
    files = shard(state, ranks=2, stages=1)
    files["model_tp1_pp0.pt"]["norm.weight"] *= 1.001
    model = lvm.load(put(tmp_path / "c", files))
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_settings_of_internlms_own_class_are_read_without_it(state, tmp_path, monkeypatch):
    """A dict with attributes, stored by the name of its class, whose module is not there later."""
    package, _, name = SETTINGS_CLASS.rpartition(".")
    made = type(name, (dict,), {"__module__": package})
    settings = made(SETTINGS | {"layer_norm_epsilon": 0.5, "lvm_config": made(enable=True)})
    with monkeypatch.context() as patch:
        parts = package.split(".")
        for i in range(len(parts)):
            module = ModuleType(".".join(parts[: i + 1]))
            patch.setitem(sys.modules, module.__name__, module)
        setattr(module, name, made)
        folder = put(tmp_path / "c", shard(state, ranks=1, stages=1), settings=None)
        torch.save(settings, folder / "model_config.pt")
    assert package not in sys.modules
    model = lvm.load(folder)
    assert (model.config.norm_eps, model.config.heads) == (0.5, HEADS)


def test_without_settings_heads_are_asked_for_and_the_norm_is_delvms(state, tmp_path, rng):
    folder = put(tmp_path / "c", shard(state, ranks=2, stages=2), settings=None)
    with pytest.raises(InputError, match=r"does not say how many heads .* give --heads"):
        lvm.load(folder)
    model = internlm.load(folder, heads=HEADS)
    assert model.config.norm_eps == 1e-5
    logits_agree(model, oracle(state), rng)


def test_fp16_is_read_as_fp32_or_as_asked_for(state, tmp_path):
    half = {name: tensor.half() for name, tensor in state.items()}
    folder = put(tmp_path / "c", shard(half, ranks=2, stages=1))
    assert torch.equal(lvm.load(folder).head.weight, half["head.weight"].float())
    assert lvm.load(folder, dtype=torch.bfloat16).embed.codebook.dtype == torch.bfloat16


def test_what_the_model_reads_may_lie_beside_it(state, tmp_path):
    folder = put(tmp_path / "c", shard(state, ranks=1, stages=1))
    reads = Reads(layout="none", codes=CODES, codes_per_image=64, row_len=512, tokenizer="t" * 64)
    reads.save(folder)
    assert lvm.load(folder).reads == reads


# Out


@pytest.mark.parametrize("format", ["hf", "native", "internlm"])
def test_the_command_writes_each_form(state, tmp_path, rng, capsys, format):
    folder = put(tmp_path / "c", shard(state, ranks=2, stages=2))
    command = internlm.Convert(model=folder, out=tmp_path / "out", format=format)
    internlm.main(command)
    internlm.main(command)  # an earlier export is replaced
    assert format in capsys.readouterr().out
    again, first = lvm.load(tmp_path / "out"), lvm.load(folder)
    assert again.reads == first.reads
    logits_agree(again, oracle(state), rng)
    if format == "hf":
        theirs, about = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert type(theirs).__name__ == "LlamaForCausalLM"
        assert not any(about.values())  # nothing missing, unexpected or of another shape
        logits_agree(first, theirs, rng)
        described = json.loads((tmp_path / "out/config.json").read_text())
        assert (described["attention_bias"], described["rms_norm_eps"]) == (True, 1e-5)
        assert (again.config.codebook_dim, again.config.attn_bias) == (0, True)
    else:
        ours = first.state_dict()
        assert all(torch.equal(tensor, ours[k]) for k, tensor in again.state_dict().items())
        assert replace(again.config, head_dim=DIM) == replace(first.config, head_dim=DIM)


def test_what_is_written_for_internlm_is_what_was_read(state, tmp_path):
    folder = put(tmp_path / "c", shard(state, ranks=4, stages=2))
    internlm.main(internlm.Convert(model=folder, out=tmp_path / "out", format="internlm"))
    written = torch.load(tmp_path / "out/model_tp0_pp0.pt", weights_only=True)
    wanted = {f"model.{name}" for name in state if "encoder" not in name and "inv_f" not in name}
    assert written.keys() == wanted
    assert all(torch.equal(t, state[name.removeprefix("model.")]) for name, t in written.items())
    settings = torch.load(tmp_path / "out/model_config.pt", weights_only=True)
    for key in ("num_attention_heads", "vocab_size", "hidden_size", "num_layers", "norm_type"):
        assert settings[key] == SETTINGS[key]
    assert settings["layer_norm_epsilon"] == 1e-5
    assert 256 * math.ceil(int(settings["mlp_ratio"] * WIDTH) / 256) == FFN  # as it is built there


def test_a_model_of_ours_becomes_a_checkpoint_of_internlm(make_model, tmp_path, rng):
    shape = {"kv_heads": 4, "ffn": 256, "attn_bias": True, "codebook_dim": 6, "vocab_size": 40}
    model = make_model(layout="none", codes=40, tokenizer="t" * 64, **shape)
    export.write(model, tmp_path / "ours", format="native")
    command = internlm.Convert(
        model=tmp_path / "ours", out=tmp_path / "c", format="internlm", dtype="bf16"
    )
    internlm.main(command)
    again = lvm.load(tmp_path / "c")
    assert again.reads == model.reads
    state = again.state_dict()
    assert all(torch.equal(state[k], v.bfloat16().float()) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match=r"--heads 4: the config\.json of"):
        internlm.main(replace(command, heads=4))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"codebook_dim": 0}, "its embedding is a table: codebook_dim 0"),
        ({"attn_bias": False}, "its attention has no biases"),
        ({"kv_heads": 2}, "share keys"),
        ({"qk_norm": True}, "its heads have QK-norm"),
        ({"head_dim": 10}, "do not fill the width"),
        ({"ffn": 48}, "its FFN, 48, is no multiple of 256"),
        ({"rope_theta": 500.0}, "its rope_theta is 500, not 10000"),
    ],
)
def test_what_delvms_code_cannot_build_is_refused(make_model, tmp_path, shape, words):
    fits = {"kv_heads": 4, "ffn": 256, "attn_bias": True, "codebook_dim": 6, "vocab_size": 40}
    model = make_model(layout="none", **(fits | shape))
    with pytest.raises(InputError, match=words):
        internlm.write_internlm(model, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_the_folder_that_is_read_is_not_written_over(state, tmp_path):
    folder = put(tmp_path / "c", shard(state, ranks=1, stages=1))
    Reads(layout="none", codes=CODES, codes_per_image=256, row_len=2048).save(folder)
    with pytest.raises(InputError, match="is the folder that is read"):
        internlm.main(internlm.Convert(model=folder, out=folder, format="internlm"))
    assert (folder / "model_tp0_pp0.pt").is_file()


# What is refused


@pytest.mark.parametrize(
    ("ranks", "stages", "change", "words"),
    [
        (2, 2, lambda f: f.pop("model_tp1_pp0.pt"), r"lacks model_tp1_pp0\.pt: .*2 .*and 2 pip"),
        (1, 1, lambda f: f["model_tp0_pp0.pt"].pop("head.weight"), r"it lacks head\.weight"),
        (
            1,
            1,
            lambda f: f["model_tp0_pp0.pt"].pop("embedding.vq_model.quantize.embedding.weight"),
            r"holds no model of DeLVM: it lacks embedding\.vq_model\.quantize",
        ),
        (
            1,
            1,
            lambda f: f["model_tp0_pp0.pt"].pop("blocks.1.norm1.weight"),
            r"missing: layers\.1\.attn_norm\.weight",
        ),
        (
            1,
            1,
            lambda f: f["model_tp0_pp0.pt"].update({"blocks.1.mixer.wq.weight": torch.ones(2)}),
            r"unexpected: blocks\.1\.mixer\.wq\.weight",
        ),
        (
            2,
            1,
            lambda f: f["model_tp1_pp0.pt"].pop("blocks.1.mlp.w1.weight"),
            r"blocks\.1\.mlp\.w1\.weight is in the files of 1 of 2 tensor-parallel ranks",
        ),
        (
            2,
            1,
            lambda f: f["model_tp1_pp0.pt"]["norm.weight"].mul_(1.5),
            r"norm\.weight is not the same in the files of all",
        ),
        (
            2,
            1,
            lambda f: f["model_tp1_pp0.pt"].update({"blocks.0.mlp.w3.weight": torch.ones(3, 3)}),
            r"blocks\.0\.mlp\.w3\.weight have shapes \[32, 128\], \[3, 3\]",
        ),
        (
            1,
            2,
            lambda f: f["model_tp0_pp1.pt"].update({"norm.weight": torch.ones(WIDTH)})
            or f["model_tp0_pp0.pt"].update({"norm.weight": torch.ones(WIDTH)}),
            r"model_tp0_pp1\.pt holds norm\.weight, as an earlier stage does",
        ),
        (
            1,
            1,
            lambda f: [f["model_tp0_pp0.pt"].pop(k) for k in list(f["model_tp0_pp0.pt"])
                       if k.startswith("blocks.2.")],
            "has layers 0, 1, 3; wanted them from 0",
        ),
        (
            1,
            1,
            lambda f: f["model_tp0_pp0.pt"].update({"head.weight": torch.ones(CODES + 4, WIDTH)}),
            "has 96 codes and a head of 100 rows",
        ),
    ],
)  # fmt: skip
def test_parts_that_make_no_model_are_refused_by_name(
    state, tmp_path, ranks, stages, change, words
):
    files = shard(state, ranks=ranks, stages=stages)
    change(files)
    settings = {k: v for k, v in SETTINGS.items() if k != "vocab_size"}
    folder = put(tmp_path / "c", files, settings=settings)
    with pytest.raises(InputError, match=words):
        lvm.load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "layernorm"}, "norm_type is layernorm; supported: rmsnorm"),
        ({"use_swiglu": False}, "use_swiglu is False; supported: True"),
        ({"apply_post_layer_norm": True}, "apply_post_layer_norm is True"),
        ({"num_chunks": 2}, "num_chunks is 2; supported: 1"),
        ({"num_layers": 5}, "says num_layers 5, the tensors 4"),
        ({"hidden_size": 64}, "says hidden_size 64, the tensors 32"),
        ({"vocab_size": 8192}, "says vocab_size 8192, the tensors 96"),
        ({"num_attention_heads": 5}, "5 heads: Wqkv of .* has 96 rows"),
        ({"num_attention_heads": None}, "does not say how many heads"),
    ],
)
def test_settings_of_another_network_are_refused(state, tmp_path, changes, words):
    files = shard(state, ranks=1, stages=1)
    folder = put(tmp_path / "c", files, settings={**SETTINGS, **changes})
    with pytest.raises(InputError, match=words):
        lvm.load(folder)


def test_heads_that_the_settings_contradict_are_refused(state, tmp_path):
    folder = put(tmp_path / "c", shard(state, ranks=1, stages=1))
    with pytest.raises(InputError, match=r"--heads 2: .* says 4"):
        internlm.load(folder, heads=2)


class Trap:
    """What a pickle must not run."""

    def __reduce__(self):
        return print, ("ran",)


def test_nothing_is_unpickled(state, tmp_path, capsys):
    folder = put(tmp_path / "c", shard(state, ranks=1, stages=1))
    torch.save({"num_attention_heads": Trap()}, folder / "model_config.pt")
    with pytest.raises(InputError, match=r"asks for .*print, which could run code"):
        lvm.load(folder)
    torch.save(SETTINGS, folder / "model_config.pt")
    torch.save({"head.weight": Trap()}, folder / "model_tp0_pp0.pt")
    with pytest.raises(InputError, match=r"asks for .*print, which could run code"):
        lvm.load(folder)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no zip", b"\x80\x02garbage"])
@pytest.mark.parametrize("name", ["model_config.pt", "model_tp0_pp0.pt"])
def test_damaged_files_are_refused_by_name(state, tmp_path, name, content):
    folder = put(tmp_path / "c", shard(state, ranks=1, stages=1))
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        lvm.load(folder)


def test_settings_that_are_no_table_are_refused(state, tmp_path):
    folder = put(tmp_path / "c", shard(state, ranks=1, stages=1))
    torch.save([1, 2], folder / "model_config.pt")
    with pytest.raises(InputError, match="holds a list; wanted a dict"):
        lvm.load(folder)


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_parts_is_refused(tmp_path, there):
    if there:
        (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match=r"is no checkpoint of InternLM; wanted model_tp0_pp0\.pt"):
        internlm.main(internlm.Convert(model=tmp_path / "c", out=tmp_path / "out"))


# Hugging Face, with biases


@pytest.mark.parametrize("kind", ["llama", "internlm"])
def test_biases_of_hugging_face_are_read(state, tmp_path, rng, kind):
    """InternLM's own class has LLaMA's names and tensors, and says `bias`, which is its default."""
    theirs = oracle(state, eps=1e-6)
    theirs.save_pretrained(tmp_path)
    reads = Reads(layout="none", codes=CODES, codes_per_image=256, row_len=2048)
    if kind == "llama":
        reads.save(tmp_path)
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        for key in ("attention_bias", "rope_parameters", "head_dim", "num_key_value_heads"):
            config.pop(key)
        config |= {"model_type": "internlm", "architectures": ["InternLMForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = lvm.load(tmp_path)
    assert model.config.attn_bias
    logits_agree(model, theirs, rng)
    assert model.reads == reads  # of InternLM without an lvm.json


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": False}, r"unexpected: model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"rotary": {"base": 10_000, "type": "linear"}}, "rotary is .*linear.*supported: type"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
    ],
)
def test_another_internlm_is_refused(state, tmp_path, changes, words):
    oracle(state).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "internlm", **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        lvm.load(tmp_path)


@pytest.mark.parametrize(("base", "kind"), [(10_000, "dynamic"), (500, "origin")])
def test_rotary_settings_of_later_internlms_are_read(state, tmp_path, base, kind):
    oracle(state).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("rope_parameters")
    config |= {"model_type": "internlm", "rotary": {"base": base, "type": kind}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert lvm.load(tmp_path).config.rope_theta == base


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_model_with_biases_and_a_codebook_is_written_for_transformers(
    make_model, tmp_path, rng, qk_norm
):
    shape = {"attn_bias": True, "codebook_dim": 6, "qk_norm": qk_norm, "vocab_size": 40}
    model = make_model(layout="none", **shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=rng))
    export.write(model, tmp_path / "hf")
    theirs, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert not any(about.values())
    ids = torch.randint(0, 40, (2, 24), generator=rng)
    with torch.no_grad():
        ours, found = model(ids), theirs.eval()(ids).logits
        again = lvm.load(tmp_path / "hf")
        torch.testing.assert_close(again(ids), ours, atol=1e-4, rtol=0)
    assert ours.std() > 1
    torch.testing.assert_close(found, ours, atol=1e-4, rtol=0)  # fp32, other order of sums


def test_folding_is_done_in_fp32_and_leaves_other_models_alone(make_model):
    model = make_model(layout="none", codebook_dim=6, vocab_size=40).bfloat16()
    config, state = interop.folded(model.config, model.state_dict())
    wanted = model.embed.codebook.double() @ model.embed.proj.weight.double().T
    torch.testing.assert_close(state["embed.weight"].double(), wanted, atol=1e-6, rtol=1e-6)
    assert config.codebook_dim == 0
    assert state.keys() == on_meta(config).state_dict().keys()
    plain = make_model()
    assert interop.folded(plain.config, plain.state_dict())[0] == plain.config


def test_the_help_says_what_a_stranger_needs(capsys):
    with pytest.raises(SystemExit) as ended:
        run(internlm.Convert, internlm.main, prog="python -m lvm.internlm", args=["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "DIR" in said and "internlm" in said and "--heads" in said
