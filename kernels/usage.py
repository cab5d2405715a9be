"""What a program compiles to, and which limits that breaks; for kernels/report.py.

    Program ── triton.compile for sm_90 ──► cubin ── cuobjdump ──► registers, bytes of stack
                       │                      └────── nvdisasm ───► instructions by opcode
                       └──► metadata: shared memory, warps, tensor memory

Needs no GPU and no CUDA toolkit: triton's wheel holds the assembler and its tools.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.program import Program

# Bytes of shared memory a block may have, by compute capability (CUDA C programming guide, table of
# technical specifications), less the KiB that the system keeps.
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS = 1 << 16  # of a multiprocessor, and so of a block; given to warps by 8 a thread
TENSOR_COLUMNS = 512  # of tensor memory, which sm_100 has
# What keeps the tensor cores at full speed there.
FULL_SPEED = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHOWN = (
    "HGMMA", "UTCHMMA", "HMMA", "FFMA", "FFMA2", "UTMALDG", "UTMASTG", "USETMAXREG", "LDL", "STL",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the assembler made of a program."""

    registers: int  # a thread
    stack: int  # bytes a thread: 0 unless registers spill
    shared: int  # bytes a block
    warps: int  # a block; more than asked for where triton specialises warps
    columns: int = 0  # of tensor memory
    instructions: Counter[str]  # by opcode, modifiers dropped: FFMA, LDS, HGMMA ...

    @property
    def tensor(self) -> int:
        """Instructions of the tensor cores: HMMA, HGMMA, IMMA, UTCHMMA ..."""
        return sum(n for op, n in self.instructions.items() if op.endswith("MMA"))

    @property
    def figures(self) -> dict[str, int]:
        """What is printed and committed; instructions that do not occur are left out."""
        named = {op: n for op in SHOWN if (n := self.instructions[op])}
        named |= {"columns": self.columns} if self.columns else {}
        return {
            "registers": self.registers,
            "stack": self.stack,
            "shared": self.shared,
            "warps": self.warps,
            **named,
            "all": self.instructions.total(),
        }


def source_of(program: Program) -> ASTSource:
    """Return what triton compiles: the kernel with the types and constants of a launch."""
    order, types, constants = program.kernel.arg_names, program.types, program.constants
    pointers = {name for name, kind in types.items() if kind.startswith("*")}
    integers = {name for name, kind in types.items() if re.fullmatch("[iu][0-9]+", kind)}
    wrong = {
        "with neither type nor constant": set(order) - set(types) - set(constants),
        "with type and constant": set(types) & set(constants),
        "that the kernel has not": (set(types) | set(constants)) - set(order),
        "that are unaligned and no pointers": program.unaligned - pointers,
        "that are aligned and no integers": program.aligned - integers,
    }
    if any(wrong.values()):
        found = "; ".join(f"{what}: {', '.join(sorted(s))}" for what, s in wrong.items() if s)
        raise ValueError(f"arguments {found}")
    divisible = pointers - program.unaligned | program.aligned
    return ASTSource(
        program.kernel,
        {name: types.get(name, "constexpr") for name in order},
        {(order.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(order) if name in divisible},
    )


def parse_resources(text: str) -> tuple[int, int]:
    """Return registers and bytes of stack from `cuobjdump --dump-resource-usage`."""
    used = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if not used:
        raise ValueError(f"cuobjdump names no registers: {text!r}")
    return max(int(r) for r, _ in used), max(int(s) for _, s in used)


def count_opcodes(code: str) -> Counter[str]:
    """Count instructions in the listing of `nvdisasm -c` by opcode, modifiers dropped.

    A line is `        /*0a30*/              @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;`.
    """
    line = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)"
    return Counter(re.findall(line, code, re.MULTILINE))


def compile_program(program: Program, capability: int) -> Usage:
    """Compile for sm_<capability> and read the cubin."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source_of(program), target=target, options=program.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def read(*command: str) -> str:
        return subprocess.run(
            [tools / command[0], *command[1:]], capture_output=True, text=True, check=True
        ).stdout

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        registers, stack = parse_resources(read("cuobjdump", "--dump-resource-usage", str(cubin)))
        instructions = count_opcodes(read("nvdisasm", "-c", str(cubin)))
    return Usage(
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        instructions=instructions,
    )


def faults(program: Program, usage: Usage, capability: int) -> list[str]:
    """Name each limit that a program breaks."""
    ops, found = usage.instructions, []
    local, allowance = ops["LDL"] + ops["STL"], program.allowance.get(capability, 0)
    if usage.stack > allowance:
        granted = f", {allowance} granted" if allowance else ""
        found.append(f"{usage.stack} bytes of stack{granted}: registers spill")
    elif local and not allowance:
        found.append(f"{local} loads and stores of local memory")
    if usage.shared > SHARED_LIMIT[capability]:
        found.append(f"{usage.shared} bytes of shared memory of {SHARED_LIMIT[capability]}")
    block = -(-usage.registers // 8) * 8 * 32 * usage.warps
    if block > REGISTERS:
        found.append(f"{block} registers a block of {REGISTERS}: it cannot be launched")
    if usage.columns > TENSOR_COLUMNS:
        found.append(f"{usage.columns} columns of tensor memory of {TENSOR_COLUMNS}")
    if program.products in ("none", "fp32") and usage.tensor:
        kind = "fp32 products" if program.products == "fp32" else "no products"
        found.append(f"{usage.tensor} tensor-core instructions in a kernel of {kind}")
    if program.products == "fp32" and not ops["FFMA"] + ops["FFMA2"]:
        found.append("no fp32 multiply-add at all")
    wanted = FULL_SPEED[capability] if program.products == "tensor" else "HMMA"
    if program.products in ("tensor", "mma") and not ops[wanted]:
        found.append(f"no {wanted}: its products do not use the tensor cores as promised")
    if program.products == "tensor" and wanted != "HMMA" and ops["HMMA"]:
        found.append(f"{ops['HMMA']} HMMA: products that {wanted} does not take")
    if program.tma and not ops["UTMALDG"]:
        found.append("no UTMALDG: its loads are no bulk copies as promised")
    return found


def is_meant_for(program: Program, capability: int) -> bool:
    """Say whether a program is launched on GPUs of a compute capability."""
    chosen = not program.targets or capability in program.targets
    return chosen and (capability >= 90 or not program.tma)
