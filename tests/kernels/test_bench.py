"""The benchmark program: what it counts and compares; how long things take is not tested."""

import dataclasses
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from kernels import attention as attention_module
from kernels import (
    bench,
    bench_attention,
    bench_checks,
    bench_cross_entropy,
    bench_decode,
    bench_elementwise,
    bench_lookup,
    timing,
)
from kernels.bench_attention import Shape, makers, masks, pairs, table_rows
from kernels.bench_case import Bench, limits, passes
from kernels.bench_decode import bytes_read
from kernels.mask import densify
from kernels.timing import Body, Lost, ratio, turns

TINY = Shape("small", 2, 2, 128, 16)


@pytest.fixture
def tiny(monkeypatch):
    """The tables on shapes that take no time."""
    monkeypatch.setattr(bench_attention, "shapes", lambda device: [TINY])
    all_layers = bench_elementwise.layers
    small = {"rows": 1, "length": 8, "heads": 2, "dim": 8, "ffn": 16}
    monkeypatch.setattr(
        bench_elementwise, "layers", lambda device, **_: all_layers(device, **small)
    )
    case = bench_decode.case
    few = {"rows": 2, "prompt": 32, "dim": 8}
    monkeypatch.setattr(
        bench_decode, "case", lambda b, model, groups, **_: case(b, model, 2, **few)
    )
    loss = bench_cross_entropy.case
    monkeypatch.setattr(bench_cross_entropy, "case", lambda b, *_: loss(b, 32, 16, 64))
    search = bench_lookup.case
    monkeypatch.setattr(bench_lookup, "case", lambda b, name, k, w, n: search(b, name, 50, 4, 1))


def lines_of(text: str) -> dict[str, dict]:
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {line["bench"]: line for line in found}


def test_every_table_runs_and_is_kept(tiny, tmp_path, capsys):
    names = ["attention", "decode", "cross_entropy", "elementwise", "lookup"]
    out = tmp_path / "made"
    args = ["--repeats", "2", "--out", str(out)]
    assert bench.main(["--only", *names[:2], *args]) == 0
    assert bench.main(["--only", *names[2:], *args]) == 0
    printed = lines_of(capsys.readouterr().out)
    assert list(printed) == names
    assert all(line["torch"] == torch.__version__ and line["date"] for line in printed.values())
    kept = json.loads((out / "kernels.json").read_text())
    for name in names:
        assert kept["tables"][name] == printed[name]["rows"]  # both runs' tables are there
        assert len(kept["tables"][name]) > 1
        assert not any("did not run" in row for row in kept["tables"][name])
    assert {row["of"] for row in kept["tables"]["checks"]} == set(names)
    assert kept["about"]["device"]


def test_attention_times_every_mask_and_backend_that_runs_here(tiny, capsys):
    found = Bench("cpu", repeats=2)
    bench_attention.table(found)
    rows = found.tables["attention"]
    assert {row["mask"] for row in rows} == set(masks(TINY, "cpu"))
    assert {row["backend"] for row in rows} == {"sdpa", "flex", "eager"}
    for row in rows:
        # FlexAttention has no backward pass on a CPU.
        assert ("fwd+bwd ms" in row) == ("bwd ms" in row) == (row["backend"] != "flex")
        assert row["checked"] == "ok" and row["fwd ms"] > 0
    assert not found.broken


def test_speeds_and_ratios_follow_from_the_times():
    times = {
        "fwd triton": [1.0, 2.0, 4.0], "fwd flex": [2.0, 5.0, 4.0], "fwd sdpa": [9.0, 9.0, 9.0],
        "fwd triton rows": [0.5, 0.5, 0.5],
        "bwd triton": [2.0, 2.0, 2.0], "fwd+bwd triton": [4.0, 4.0, 4.0],
    }  # fmt: skip
    shape = Shape("1B", 1, 3, 64, 128)
    backends = ["sdpa", "triton", "triton rows", "flex"]
    rows = {row["backend"]: row for row in table_rows(times, backends, shape=shape, count=10**9)}
    triton = rows["triton"]
    # 4 FLOPs forward, 10 backward, 14 both, a pair, head and channel: 3 · 128 · 10^9 = 0.384e12.
    assert triton["fwd ms"] == 2000 and triton["fwd TFLOP/s"] == round(4 * 0.384 / 2, 4)
    assert triton["bwd TFLOP/s"] == round(10 * 0.384 / 2, 1)
    assert triton["fwd+bwd TFLOP/s"] == round(14 * 0.384 / 4, 1)
    # Of the fastest other backend, round by round, and not of our own other form.
    assert triton["fwd x best"] == 2.0  # the median of 2, 2.5 and 1
    assert rows["triton rows"]["fwd x best"] == 8.0  # of 4, 10 and 8
    assert rows["flex"]["fwd x best"] == 0.125  # of triton rows: 0.25, 0.1, 0.125
    assert rows["flex"]["spread %"] == 75.0  # (5 - 2) of 4
    assert triton["bwd x best"] is None  # no other has one
    assert "bwd ms" not in rows["flex"]
    assert ratio(times, "fwd absent", ["fwd flex"]) is None


@pytest.mark.parametrize("name", masks(TINY, "cpu"))
def test_allowed_pairs_are_those_of_the_dense_mask(name):
    mask = masks(TINY, "cpu")[name]
    dense = densify(mask, TINY.length)
    if dense is None:
        dense = torch.ones(TINY.rows, TINY.length, TINY.length, dtype=torch.bool)
        dense = dense.tril() if mask.causal else dense
    assert pairs(mask, TINY.rows, TINY.length) == int(dense.sum())
    assert bool(dense.diagonal(dim1=1, dim2=2).all())  # every query reads itself


def test_masks_are_of_the_kinds_they_are_named_for():
    found = masks(Shape("1B", 2, 1, 4096, 128), "cpu")
    exact = {name for name, mask in found.items() if mask.exact}
    assert exact == {"packed", "prefix", "image blocks"}
    assert {mask.kind for mask in found.values()} == {"causal", "full", "interval", "dense"}
    packed = found["packed"]
    assert packed.lo is not None and packed.lo.unique().tolist() == [0, 1024, 2048, 3072]
    unaligned = found["unaligned"].lo
    assert unaligned is not None and bool((unaligned % 128 != 0).any())
    prefix = found["prefix"].hi
    assert prefix is not None and len(prefix[:, 0].unique()) == 2  # one of its own a row


def test_bytes_of_a_step_are_those_of_the_caches():
    shape = {"rows": 16, "groups": 8, "prompt": 1793, "drawn": 128, "dim": 128}
    # kernels/decode.py: 22 layers, 2.8 GB with own caches and 0.35 GB with a shared prompt.
    assert 22 * bytes_read(**shape, shared=False) == 22 * 2 * 16 * 8 * (1793 + 128) * 128 * 2
    assert round(22 * bytes_read(**shape, shared=False) / 1e9, 1) == 2.8
    assert round(22 * bytes_read(**shape, shared=True) / 1e9, 2) == 0.35
    one = {**shape, "rows": 1}
    assert bytes_read(**one, shared=True) == bytes_read(**one, shared=False)


def test_bytes_of_a_layer_are_those_of_its_tensors():
    """Forward: inputs read, outputs written; weights of a norm are left out, a row's worth."""
    shape = {"rows": 1, "length": 64, "heads": 2, "dim": 32, "ffn": 96}
    for layer in bench_elementwise.layers("cpu", **shape):
        if layer.bytes["fwd"]:
            inputs = [x for x in layer.make() if x.ndim > 1]
            outputs = layer.by("torch")(*layer.make())
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            assert layer.bytes["fwd"] == sum(x.nbytes for x in (*inputs, *outputs)), layer.name
            assert [tuple(x.shape) for x in outputs] == list(layer.shapes)
    named = {layer.name: layer.bytes for layer in bench_elementwise.layers("cpu", **shape)}
    n = 64 * 64 * 2  # of [64 tokens, width 64] in bf16
    assert named["RMSNorm"] == {"fwd": 2 * n, "fwd+bwd": 5 * n}
    assert named["RMSNorm + residual"] == {"fwd": 4 * n, "fwd+bwd": 8 * n}
    assert named["SwiGLU"] == {"fwd": 3 * 64 * 96 * 2, "fwd+bwd": 8 * 64 * 96 * 2}


@pytest.mark.parametrize("where", ["make", "forward", "backward"])
@pytest.mark.parametrize("name", ["flex", "triton"])
def test_a_backend_that_raises_is_a_line_and_the_rest_goes_on(where, name, monkeypatch, capsys):
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("in backward\nand more")

    def make():
        if where == "make":
            raise ValueError("in make")

        def forward(q, k, v):
            if where == "forward":
                raise ValueError("in forward")
            return Breaks.apply(q)

        return forward

    def some(mask, shape, device):
        return {name: make, **{k: v for k, v in makers(mask, shape, device).items() if k != name}}

    monkeypatch.setattr(bench_attention, "makers", some)
    monkeypatch.setattr(bench_attention, "has_backward", lambda backend, device: True)
    monkeypatch.setattr(bench_attention, "shapes", lambda device: [TINY])
    monkeypatch.setattr(bench_attention, "masks", lambda *a: {"causal": masks(*a)["causal"]})
    code = bench.main(["--only", "attention", "--repeats", "1"])
    out = capsys.readouterr().out
    rows = lines_of(out)["attention"]["rows"]
    failed = [row for row in rows if row.get("did not run") and row["backend"] == name]
    kind = "RuntimeError" if where == "backward" else "ValueError"
    assert [row["did not run"] for row in failed] == [f"{kind}: in {where}"]
    assert {row["backend"] for row in rows if "fwd ms" in row} >= {"sdpa", "eager"}
    assert code == (1 if name == "triton" else 0)  # a rival may be missing, ours may not
    assert ("BROKEN: attention" in out) == (name == "triton")


def test_a_wrong_result_is_broken_and_still_timed(monkeypatch, capsys):
    def some(mask, shape, device):
        sdpa = makers(mask, shape, device)["sdpa"]
        return {"sdpa": sdpa, "flex": lambda: lambda q, k, v: 1.02 * sdpa()(q, k, v)}

    monkeypatch.setattr(bench_attention, "makers", some)
    monkeypatch.setattr(bench_attention, "has_backward", lambda backend, device: True)
    monkeypatch.setattr(bench_attention, "shapes", lambda device: [TINY])
    monkeypatch.setattr(bench_attention, "masks", lambda *a: {"packed": masks(*a)["packed"]})
    assert bench.main(["--only", "attention", "--repeats", "1"]) == 1
    rows = lines_of(capsys.readouterr().out)["attention"]["rows"]
    assert {row["backend"]: row["checked"] for row in rows} == {"sdpa": "ok", "flex": "BROKEN"}
    assert all(row["fwd+bwd ms"] > 0 for row in rows)


def test_bounds():
    found = Bench("cpu")
    assert found.verdict("t", {}, error=1e-3, bound=1e-3) == "ok"
    assert found.verdict("t", {}, error=2e-3, bound=1e-3) == "BROKEN"
    assert found.verdict("t", {"which": "this"}, error=float("nan"), bound=1e-3) == "BROKEN"
    assert len(found.broken) == 2 and "t this nan" in found.broken[1]
    assert limits(torch.bfloat16, [4e-3, 1e-3, 9e-3], 3) == [1.5 * 4e-3, 3e-3, 1e-2]
    assert limits(torch.bfloat16, [], 2) == [1e-2, 1e-2]
    assert limits(torch.float32, [1.0], 1) == [1e-5]


def test_turns_alternate_and_leave_out_what_comes_before(monkeypatch):
    clock, calls = [0.0], []

    def spend(seconds, name=None):
        clock[0] += seconds
        if name:
            calls.append(name)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    bodies = {
        "a": Body(lambda i: spend(1.0, f"a{i}")),
        "b": Body(lambda state: spend(state, "b"), before=lambda i: (spend(100.0), 3.0)[1]),
        "c": Body(lambda i: spend(8.0), calls=4),
    }
    times, failed = turns(bodies, device="cpu", repeats=3)
    assert times == {"a": [1.0] * 3, "b": [3.0] * 3, "c": [2.0] * 3} and not failed
    assert calls == ["a0", "b", "a0", "b", "a1", "b", "a2", "b"]  # one of each first, to warm up


def test_a_body_that_fails_in_a_later_round_leaves_the_others():
    seen = []

    def worse(i):
        seen.append(i)
        if len(seen) == 3:
            raise RuntimeError("third")

    times, failed = turns({"a": Body(worse), "b": Body(lambda i: i)}, device="cpu", repeats=4)
    assert failed == {"a": "RuntimeError: third"}
    assert list(times) == ["b"] and len(times["b"]) == 4 and len(seen) == 3


def test_passes_take_the_sets_in_turn():
    sets = [[torch.full((2,), float(i), requires_grad=True)] for i in range(3)]
    grads = [[torch.ones(2)]] * 3
    bodies = passes(lambda x: x * x, sets, grads)
    assert [bodies["fwd"].run(i)[0][0].item() for i in range(4)] == [0, 1, 4, 0]
    for name in ("fwd+bwd", "bwd"):
        body = bodies[name]
        found = [body.run(body.before(i) if body.before else i)[0][0].item() for i in range(4)]
        assert found == [0, 2, 4, 0]


def row(kind, mask, backend, took, shape="1B 4x16x4096x128", checked="ok"):
    return {
        "shape": shape, "kind": kind, "mask": mask, "backend": backend, "fwd+bwd ms": took,
        "checked": checked,
    }  # fmt: skip


FAKE = [
    row("causal", "causal", "sdpa cudnn", 1.0),  # no backend of `attention`
    row("causal", "causal", "sdpa", 3.0),
    row("causal", "causal", "triton", 2.0),
    row("causal", "causal", "flex", 4.0),
    row("full", "full", "sdpa", 3.0),
    row("full", "full", "triton", 2.0, checked="BROKEN"),
    row("interval", "packed", "triton", 1.0),
    row("interval", "packed", "flex", 2.0),
    row("interval", "packed", "sdpa", 5.0),
    row("interval", "prefix", "triton", 6.0),
    row("interval", "prefix", "flex", 4.0),
    row("dense", "islands", "flex", 5.0),
    row("dense", "islands", "sdpa", 6.0),
    row("causal", "causal", "flex", 0.1, shape="300M 8x8x4096x128"),
    {"shape": "1B 4x16x4096x128", "kind": "interval", "mask": "prefix", "backend": "sdpa",
     "did not run": "OutOfMemoryError"},
    {"backend": "triton", "did not run": "a line without a shape"},
]  # fmt: skip


def test_the_fastest_backend_of_each_kind_is_chosen():
    # interval: flex 6 of two masks, triton 7, sdpa ran on one of them only.
    want = {"causal": "triton", "full": "sdpa", "interval": "flex", "dense": "flex"}
    assert bench.fastest(FAKE) == want
    assert bench.fastest(FAKE, without=["triton"])["causal"] == "sdpa"
    assert bench.fastest([]) == {}


def test_the_choice_is_written_so_that_attention_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    path, copy = tmp_path / "backends.json", tmp_path / "copy.json"
    path.write_text('{"sm_80": {"causal": "flex"}}')
    here = {"device": "NVIDIA H200", "date": "2026-11-26", "torch": "2.11.0", "triton": "3.6.0"}
    found = Bench("cuda", tables={"attention": FAKE, "checks": []})
    bench.write_choice(found, here, [path, copy])
    written = json.loads(path.read_text())
    assert written["sm_80"] == {"causal": "flex"} and "sm_80" not in json.loads(copy.read_text())
    assert written["sm_90"]["measured"] == "NVIDIA H200, 2026-11-26, torch 2.11.0, triton 3.6.0"
    monkeypatch.setattr(attention_module, "MEASURED", path)
    attention_module.measured.cache_clear()
    try:
        assert attention_module.measured("sm_90")["interval"] == "flex"
    finally:
        attention_module.measured.cache_clear()

    found.tables["checks"] = [{"of": "attention", "backend": "triton", "verdict": "BROKEN"}]
    bench.write_choice(found, here, [path])
    assert json.loads(path.read_text())["sm_90"]["causal"] == "sdpa"
    before = path.read_text()
    bench.write_choice(Bench("cuda"), here, [path])
    assert path.read_text() == before


def test_choosing_needs_a_gpu(capsys):
    assert bench.main(["--choose"]) == 2
    assert "--device cuda" in capsys.readouterr().out


def test_no_case_begins_after_its_time(tiny, capsys):
    assert bench.main(["--only", "decode", "attention", "lookup", "--minutes", "0"]) == 0
    out = capsys.readouterr().out
    assert all(not line["rows"] for line in lines_of(out).values())
    assert out.count("skipped, out of time") == 3


def test_a_lost_device_costs_its_table_and_the_rest_runs_elsewhere(tiny, monkeypatch, capsys):
    def lose(found):
        raise Lost("illegal address")

    ran = []
    monkeypatch.setitem(bench.TABLES, "decode", lose)
    monkeypatch.setattr(bench.subprocess, "run", lambda command, check: ran.append(command))
    args = ["--repeats", "1", "--only", "lookup", "decode", "elementwise"]
    assert bench.main(args) == 1
    command = ran[0]
    last = command[len(command) - command[::-1].index("--only") :]
    assert last[:2] == ["elementwise", "lookup"] and command[:3] == [
        sys.executable, "-m", "kernels.bench",
    ]  # fmt: skip
    assert "illegal address" in capsys.readouterr().out


def test_an_error_of_the_benchmark_itself_is_a_line(monkeypatch, capsys):
    monkeypatch.setitem(bench.TABLES, "lookup", lambda found: 1 / 0)
    assert bench.main(["--only", "lookup"]) == 1
    assert "BROKEN: lookup ZeroDivisionError" in capsys.readouterr().out


PLOTTED = [
    {"shape": "1B", "mask": mask, "backend": backend, "fwd TFLOP/s": 5.0, "bwd TFLOP/s": 4.0}
    for mask in ("causal", "packed")
    for backend in ("triton", "flex")
]


def test_a_plot_where_there_is_matplotlib(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert bench.plot(PLOTTED, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes()[:4] == b"\x89PNG"
    assert bench.plot([], tmp_path / "none.png") and not (tmp_path / "none.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not bench.plot(PLOTTED, tmp_path / "other.png")


def test_checks_cover_what_is_shipped():
    cases = bench_checks.setups("cuda")
    assert len(set(cases)) == len(cases)
    assert {case.dim for case in cases} == {32, 64, 80, 96, 100, 128}
    for dim in (32, 64, 80, 96, 100, 128):
        kinds = {case.mask for case in cases if case.dim == dim and case.dtype == "bf16"}
        assert kinds == {"causal", "full", "exact", "rows"}
    at_128 = {(c.mask, c.group) for c in cases if c.dim == 128 and c.length == 4096}
    assert len(at_128) == 8  # four masks, alone and four query heads to a key head
    launches = pytest.importorskip("kernels.attention_triton")
    tiles = set()
    for case in cases:
        tensors, _, _ = bench_checks.draw(dataclasses.replace(case, length=8), "cpu")
        tma = launches.fits_tma(*(x[..., : case.dim // 16 * 16] for x in tensors))
        assert tma != case.apart or case.dim == 100, case  # heads of 100 are copied to 112
        channels = 1 << (case.dim - 1).bit_length()
        size = tensors[0].element_size()
        tiles.add(
            launches.configure(90, channels=channels, itemsize=size, tma=tma or case.dim == 100)
        )
    shipped = {
        launches.configure(90, channels=channels, itemsize=size, tma=tma)
        for channels in (32, 64, 128) for size in (2, 4) for tma in (True, False)
    }  # fmt: skip
    assert tiles == shipped


def test_a_check_sees_a_wrong_attention(monkeypatch):
    setup = bench_checks.Setup(32, "fp32", "rows", 2, 70)
    found = bench_checks.verify(setup, "cpu", "sdpa")
    assert float(found["error"]) <= float(found["bound"]) == 1e-5
    right = bench_checks.attention
    monkeypatch.setattr(bench_checks, "attention", lambda *a: right(*a) * (1 + 1e-4))
    found = bench_checks.verify(setup, "cpu", "sdpa")
    assert float(found["error"]) > 5e-5
    noise = iter((1.0, 1.0 + 1e-6))
    monkeypatch.setattr(bench_checks, "attention", lambda *a: right(*a) * next(noise))
    found = bench_checks.verify(setup, "cpu", "sdpa")
    assert found["bits"] == "differ" and found["error"] == float("inf")


CHILD = """
import json, sys, time
for number in map(int, sys.argv[1:]):
    if number == 3:
        print("illegal address", file=sys.stderr)
        sys.exit(7)
    if number == 9:
        time.sleep(60)
    print(json.dumps({"number": number, "error": number / 10}), flush=True)
"""


def test_a_case_that_ends_its_process_does_not_take_others_with_it():
    command = [sys.executable, "-S", "-c", CHILD]
    found = bench_checks.gather(command, [1, 3, 4, 5], until=time.monotonic() + 60)
    assert found == {
        1: {"error": 0.1},
        3: {"failed": "its process ended with 7: illegal address"},
        4: {"error": 0.4},
        5: {"error": 0.5},
    }


def test_cases_that_are_too_late_are_named():
    command = [sys.executable, "-S", "-c", CHILD]
    found = bench_checks.gather(command, [9, 2], until=time.monotonic() + 0.5)
    assert found == {9: {"failed": "out of time"}, 2: {"failed": "out of time"}}


def test_all_checks_are_reported(monkeypatch, capsys):
    """What verify_all makes of the rows of its processes; 12 s of imports are left out."""

    def gather(command, numbers, until):
        row = {"worst": "dq", "error": 1e-9, "bound": 1e-5}
        late = {"failed": "out of time"}
        return {n: late if n == 1 else row | ({"error": 1.0} if n == 2 else {}) for n in numbers}

    monkeypatch.setattr(bench_checks, "gather", gather)
    found = Bench("cpu")
    bench_checks.verify_all(found)
    rows = found.tables["checks"]
    assert len(rows) == len(bench_checks.setups("cpu"))
    assert [row.get("verdict") for row in rows] == ["ok", None, "BROKEN", "ok"]
    assert rows[1]["did not run"] == "out of time" and len(found.broken) == 2


def test_numbers_that_make_no_sense_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--repeats", "0"])
    assert stop.value.code == 2 and "--repeats 0" in capsys.readouterr().err
