"""The compile gate: what it reads, what it fails on, and that shipped programs pass it on sm_90.

Compiled for real, in a process without TRITON_INTERPRET. `make test` compiles a program of each
module; the whole table is for `make test-full`, that of other GPUs in test_report_elsewhere.py.
"""

import dataclasses
import json
import re
from collections import Counter

import pytest

from kernels.program import Program

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel:
  REG:168 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:588 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

# As nvdisasm prints them: labels, directives, predicates, uniform predicates, modifiers.
CODE = """
        .section        .text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;
.L_x_2:
        /*0c70*/                   STL [R1], R5 ;
        /*1100*/                   LDL.LU R7, [R1+0x4] ;
        /*1110*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT ;
        /*1120*/             @!UP1 UTMALDG.2D [UR8], [UR6], desc[UR10] ;
        /*1130*/                   FFMA R3, R3.reuse, -2, R9 ;
        /*11f0*/              @UP0 BRA.U `(.L_x_2) ;
        /*7000*/                   EXIT ;
.L_x_3:
        /*77a0*/                   NOP;
"""


@pytest.fixture(scope="module")
def module():
    pytest.importorskip("triton")
    from kernels import report

    return report


@pytest.fixture(scope="module")
def usage():
    pytest.importorskip("triton")
    from kernels import usage

    return usage


def make(**program):
    found = {"name": "x", "kernel": None, "types": {}, "constants": {}, "options": {}}
    return Program(**found, **program)


def use(usage, *, registers=168, stack=0, shared=0, warps=4, columns=0, **instructions):
    return usage.Usage(
        registers=registers,
        stack=stack,
        shared=shared,
        warps=warps,
        columns=columns,
        instructions=Counter(instructions),
    )


def test_listings_are_read(usage):
    assert usage.parse_resources(RESOURCES) == (168, 16)
    with pytest.raises(ValueError, match="names no registers"):
        usage.parse_resources("cuobjdump fatal")
    assert usage.count_opcodes(CODE) == Counter(
        LDC=1, LDG=1, STL=1, LDL=1, HGMMA=1, UTMALDG=1, FFMA=1, BRA=1, EXIT=1, NOP=1
    )


def test_each_limit_has_its_fault(usage):
    def first_words(used, capability=90, **program):
        found = usage.faults(make(**program), used, capability)
        return [" ".join(fault.split()[:2]).rstrip(":") for fault in found]

    fine = use(usage, shared=227 << 10, FADD=1)
    assert first_words(fine) == []
    assert first_words(fine, 80) == ["232448 bytes"]
    assert first_words(use(usage, stack=8)) == ["8 bytes"]
    assert first_words(use(usage, stack=8, LDL=1), allowance={90: 8}) == []
    assert first_words(use(usage, stack=16), allowance={90: 8}) == ["16 bytes"]
    assert first_words(use(usage, stack=8), allowance={80: 8}) == ["8 bytes"]
    assert first_words(use(usage, LDL=1, STL=2)) == ["3 loads"]
    # Registers are given out by 8 a thread: 161 are 168, and 12 warps of 168 fit, 16 do not.
    assert first_words(use(usage, registers=161, warps=12)) == []
    assert first_words(use(usage, registers=129, warps=16)) == ["69632 registers"]
    assert first_words(use(usage, columns=513), 100) == ["513 columns"]
    assert first_words(use(usage, HMMA=2)) == ["2 tensor-core"]
    assert first_words(use(usage, FFMA=9), products="fp32") == []
    assert first_words(use(usage, FFMA2=9), 100, products="fp32") == []
    assert first_words(use(usage, FADD=9), products="fp32") == ["no fp32"]
    assert first_words(use(usage, FFMA=9, HGMMA=2), products="fp32") == ["2 tensor-core"]
    for capability, op in {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}.items():
        one = use(usage, **{op: 4})
        assert first_words(one, capability, products="tensor") == []
        assert first_words(use(usage), capability, products="tensor") == [f"no {op}"]
        if op != "HMMA":
            both = use(usage, **{op: 4, "HMMA": 4})
            assert first_words(both, capability, products="tensor") == ["4 HMMA"]
            assert first_words(one, capability, products="mma") == ["no HMMA"]
    assert first_words(use(usage, UTMALDG=1), tma=True) == []
    assert first_words(use(usage), tma=True) == ["no UTMALDG"]


def test_programs_go_to_the_gpus_they_are_meant_for(usage):
    def meant(**program):
        return [c for c in (80, 89, 90, 100) if usage.is_meant_for(make(**program), c)]

    assert meant() == [80, 89, 90, 100]
    assert meant(tma=True) == [90, 100]
    assert meant(targets=frozenset({80, 100})) == [80, 100]
    assert meant(targets=frozenset({80, 100}), tma=True) == [100]


def test_what_triton_is_told_of_a_launch(module, usage):
    program = module.programs_of("kernels.vq_lookup_triton")["vq_lookup D=64"]
    order = program.kernel.arg_names

    def divisible(**more):
        attributes = usage.source_of(dataclasses.replace(program, **more)).attrs
        assert all(value == [["tt.divisibility", 16]] for value in attributes.values())
        return {order[i] for (i,) in attributes}

    pointers = {name for name in order if name.endswith("_ptr")}
    assert divisible() == pointers
    assert divisible(unaligned=frozenset({"low_ptr"})) == pointers - {"low_ptr"}
    assert divisible(aligned=frozenset({"span"})) == pointers | {"span"}
    source = usage.source_of(program)
    assert source.constants == {(order.index(k),): v for k, v in program.constants.items()}
    assert source.signature["points_ptr"] == "*fp32" and source.signature["D"] == "constexpr"

    types, constants = dict(program.types), dict(program.constants)
    for more, said in [
        ({"types": {**types, "D": "i32"}}, "with type and constant: D"),
        ({"constants": {**constants, "BX": 1}}, "that the kernel has not: BX"),
        ({"constants": {"D": 64, "BN": 64}}, "with neither type nor constant: BD, BK"),
        ({"aligned": frozenset({"D"})}, "that are aligned and no integers: D"),
        ({"unaligned": frozenset({"span"})}, "that are unaligned and no pointers: span"),
    ]:
        with pytest.raises(ValueError, match=said):
            divisible(**more)


def split(output):
    """Return what was printed of each program: name to figures and faults."""
    found = {}
    for block in re.findall(r"^sm_\d+ .*(?:\n    .*)*", output, re.MULTILINE):
        line, *faults = block.splitlines()
        name, figures = re.fullmatch(r"sm_\d+ +(.+?)(?: {2,}(.*))?", line).groups()
        pairs = re.findall(r"([A-Za-z]\w*) (\d+)", figures or "")
        found[name] = {k: int(n) for k, n in pairs}, " ".join(faults)
    return found


@pytest.fixture(scope="module")
def bad(report, tmp_path_factory):
    """The gate on the programs of bad_programs.py, each of which breaks what its name says."""
    code, output = report(str(tmp_path_factory.mktemp("none")), program="bad_programs.py")
    assert code == 1, output
    return split(output)


# Half a second to three each: fourteen programs are compiled.
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("spills", "bytes of stack: registers spill"),
        ("few warps", "no HGMMA"),
        ("few rows", "no HGMMA"),
        ("much shared", "294912 bytes of shared memory of 232448"),
        ("tf32", "8 tensor-core instructions in a kernel of fp32 products"),
        ("no bulk copies", "no UTMALDG"),
        ("no compilation", "arange's range must be a power of 2"),
        ("misspelt", "arguments that are unaligned and no pointers: x"),
        ("no compiler left", "ended its process: exit code 3"),
    ],
)
def test_a_bad_program_fails_the_gate(name, fault, bad):
    assert fault in bad[name][1]


def test_what_bad_programs_compile_to(bad):
    """Spills and lost wgmma are read off the machine code; what is as promised has no fault."""
    for name in ("good", "spills as granted", "few rows as promised", "described"):
        assert bad[name][1] == "", name
    assert bad["good"][0]["HGMMA"] > 0 and "HMMA" not in bad["good"][0]
    spilt = bad["spills"][0]
    assert min(spilt["stack"], spilt["LDL"], spilt["STL"]) > 0 and spilt["registers"] == 255
    for name in ("few warps", "few rows", "few rows as promised"):
        assert bad[name][0]["HMMA"] > 0 and "HGMMA" not in bad[name][0]
    assert bad["described"][0]["UTMALDG"] > 0 and bad["described"][0]["HGMMA"] > 0
    assert "elsewhere" not in bad  # not launched on sm_90


def test_a_figure_that_moves_fails_the_gate(report, module, tmp_path):
    def gate(*arguments):
        return report(str(tmp_path), "--core", *arguments, program="bad_programs.py")

    code, output = gate("--check", "--write")
    assert code == 0 and "its limits alone are checked" in output  # nothing is committed yet
    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text())
    assert path.stem == module.triton.__version__ and list(written) == ["90"]
    code, output = gate("--check")
    assert code == 0 and "committed" not in output

    figures = written["90"]["good"]
    seen, gone = figures["registers"], figures.pop("HGMMA")
    figures |= {"registers": seen - 8, "HMMA": 3}
    path.write_text(json.dumps({"90": {"good": figures, "of old": {}}}))
    code, output = gate("--check")
    assert code == 1 and "make gate-write" in output and str(path) in output
    for line in (
        f"registers: {seen} seen, {seen - 8} committed",
        f"HGMMA: {gone} seen, 0 committed",
        "HMMA: 0 seen, 3 committed",
        "committed and no longer there: of old",
    ):
        assert f"FAULT {line}\n" in output
    assert "1 compiled, 2 with faults" in output

    path.write_text(json.dumps({"90": {"of old": {}}}))
    code, output = gate("--check", "--write")
    assert code == 1 and "FAULT nothing committed\n" in output
    assert list(json.loads(path.read_text())["90"]) == ["good"]


def test_programs_are_chosen_by_name_and_the_others_stay_committed(report, module, tmp_path):
    path = tmp_path / f"{module.triton.__version__}.json"
    path.write_text(json.dumps({"90": {"good": {"all": 1}}, "80": {"good": {"all": 2}}}))
    code, output = report(str(tmp_path), "--only", "promised", "--write", program="bad_programs.py")
    assert code == 0 and set(split(output)) == {"few rows as promised"}
    table = json.loads(path.read_text())
    assert table["90"]["few rows as promised"] == split(output)["few rows as promised"][0]
    assert table["90"]["good"] == {"all": 1} and table["80"] == {"good": {"all": 2}}


def test_a_module_that_does_not_import_leaves_the_others_to_be_seen(module, monkeypatch, capsys):
    monkeypatch.setattr(module, "modules", lambda: ["kernels.none", "kernels.vq_lookup_triton"])
    programs, broken = module.collect()
    assert broken == 1 and {name for name, _ in programs} == {"kernels.vq_lookup_triton"}
    assert "No module named 'kernels.none'" in capsys.readouterr().out


def test_programs_of_one_name_are_refused(module, monkeypatch):
    from kernels import vq_lookup_triton

    monkeypatch.setattr(vq_lookup_triton, "programs", lambda: [make(), make()])
    with pytest.raises(ValueError, match="two programs of the name 'x'"):
        module.programs_of.__wrapped__("kernels.vq_lookup_triton")


# A minute: a program of each kernel.
def test_core_programs_compile_as_committed(report):
    code, output = report("--core", "--check")
    assert code == 0, output
    assert "vq_lookup D=64" in split(output)
    if "limits alone" in output:
        pytest.skip("figures of this triton are not committed; limits were checked")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["", "3.6.0"], ids=["installed", "3.6.0"])
def test_all_programs_compile_as_committed_for_sm_90(version, report):
    code, output = report("--check", version=version)
    assert code == 0, output
    assert f"triton {version}" in output
    if "limits alone" in output:
        pytest.skip("figures of this triton are not committed; limits were checked")
