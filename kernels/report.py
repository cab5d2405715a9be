"""Compile every shipped kernel for a GPU that need not be here: python -m kernels.report.

Prints one line a kernel and target with what ptxas made of it (registers a thread, bytes of stack,
shared memory, instructions) and exits 1 if one breaks a limit: spills to the stack, more shared
memory than a block has, or tensor-core instructions in a kernel that promises IEEE fp32. Needs
triton, no GPU and no CUDA toolkit; triton's wheel holds the assembler and its tools. Says nothing
of speed, races or results.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import vq_lookup_triton as lookup

# Bytes of shared memory a block may have, by compute capability (CUDA C programming guide, table of
# technical specifications), less the KiB that the system keeps.
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A kernel with the types and constants of one launch."""

    name: str
    kernel: Any  # triton.JITFunction
    types: dict[str, str]  # of the arguments that are no constants, in triton's spelling
    constants: dict[str, int]
    options: dict[str, Any]  # num_warps and so on
    ieee: bool = False  # promises fp32 products: no tensor cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the assembler made of a program."""

    registers: int  # a thread
    stack: int  # bytes a thread: 0 unless registers spill
    shared: int  # bytes a block
    instructions: Counter[str]  # by opcode, modifiers dropped: FFMA, LDS, HGMMA ...

    @property
    def tensor(self) -> int:
        """Instructions of the tensor cores: HMMA, HGMMA, IMMA, UTCHMMA ..."""
        return sum(n for op, n in self.instructions.items() if op.endswith("MMA"))


def compile_program(program: Program, capability: int) -> Usage:
    """Compile for sm_<capability> and read the cubin; pointers are taken as 16-byte aligned."""
    order = program.kernel.arg_names
    names = [name for name in order if name in program.types or name in program.constants]
    aligned = [i for i, name in enumerate(order) if program.types.get(name, "").startswith("*")]
    source = ASTSource(
        program.kernel,
        {name: program.types.get(name, "constexpr") for name in names},
        {(order.index(name),): value for name, value in program.constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=program.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def read(*command: str) -> str:
        return subprocess.run(
            [tools / command[0], *command[1:]], capture_output=True, text=True, check=True
        ).stdout

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = read("cuobjdump", "--dump-resource-usage", str(cubin))
        code = read("nvdisasm", "-c", str(cubin))
    used = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    assert used, resources
    #        /*0a30*/              @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", code, re.MULTILINE)
    return Usage(
        registers=int(used[1]),
        stack=int(used[2]),
        shared=compiled.metadata.shared,
        instructions=Counter(opcodes),
    )


def lookup_programs() -> Iterator[Program]:
    """Yield the code search at the widths of known tokenizers and at awkward ones."""
    types = {
        "points_ptr": "*fp32", "codes_ptr": "*fp32", "squares_ptr": "*fp32", "low_ptr": "*fp32",
        "index_ptr": "*i64", "points_n": "i32", "codes_n": "i32", "span": "i32",
    }  # fmt: skip
    for width in (4, 8, 12, 64, 100, 256):
        kernel, constants, options = lookup.launch(width)
        yield Program(
            name=f"vq_lookup D={width}",
            kernel=kernel,
            types=types,
            constants=constants,
            options=options,
            ieee=True,
        )


def faults(program: Program, usage: Usage, capability: int) -> list[str]:
    """Name each limit that a program breaks."""
    found = []
    if usage.stack:
        found.append(f"{usage.stack} bytes of stack: registers spill")
    if usage.shared > SHARED_LIMIT[capability]:
        found.append(f"{usage.shared} bytes of shared memory of {SHARED_LIMIT[capability]}")
    if program.ieee and usage.tensor:
        found.append(f"{usage.tensor} tensor-core instructions in a kernel of fp32 products")
    if program.ieee and not usage.instructions["FFMA"]:
        found.append("no fp32 multiply-add at all")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.report", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=[90])
    found = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.exit(2, "python -m kernels.report: unset TRITON_INTERPRET, which compiles nothing\n")
    rows: list[dict[str, object]] = []
    for capability in found.arch:
        for program in lookup_programs():
            usage = compile_program(program, capability)
            row = {
                "kernel": program.name,
                "sm": capability,
                "registers": usage.registers,
                "stack": usage.stack,
                "shared": usage.shared,
                "FFMA": usage.instructions["FFMA"],
                "tensor": usage.tensor,
                "all": usage.instructions.total(),
                "faults": faults(program, usage, capability),
            }
            print("  ".join(f"{key} {value}" for key, value in row.items() if value != []))
            rows.append(row)
    print(json.dumps({"triton": triton.__version__, "torch": torch.__version__, "rows": rows}))
    sys.exit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()
