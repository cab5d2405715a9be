"""House rules that a reader cannot see in one file: who imports whom, what importing does."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["kernels", "tokenizer", "visual_sentences", "lvm", "launch"]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_one_way(package):
    later = set(ORDER[ORDER.index(package) + 1 :]) | {"examples"}
    back = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path) & later
    }
    assert not back


def test_kernels_imports_torch_and_triton_alone():
    ours = {p.stem for p in (ROOT / "kernels").glob("*.py")} | {"kernels"}
    for path in (ROOT / "kernels").rglob("*.py"):
        outside = imported(path) - ours - set(sys.stdlib_module_names)
        if path.name != "bench.py":  # a program, which may print and parse
            assert outside <= {"torch", "triton"}, path


def run_python(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_is_light_and_changes_nothing_global():
    """In one process: what `import lvm` loads, and that no state of torch or the system moves."""
    out = run_python(
        "import os, sys, warnings, signal, torch\n"
        "def state():\n"
        "    return (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(),\n"
        "            torch.random.get_rng_state().tolist(), torch.get_float32_matmul_precision(),\n"
        "            torch.are_deterministic_algorithms_enabled(), list(warnings.filters),\n"
        "            signal.getsignal(signal.SIGTERM), list(sys.path),\n"
        "            torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32)\n"
        "before = state()\n"
        "import lvm, lvm.model, lvm.mask, lvm.config, lvm.recipes\n"
        "import tokenizer, visual_sentences, kernels, kernels.attention, launch\n"
        "assert state() == before, 'importing changed global state'\n"
        "heavy = {'pyarrow', 'PIL', 'tyro', 'transformers', 'rich', 'jinja2', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    assert out == "[]"


def test_benchmarks_start_where_there_is_torch_and_little_else():
    """A GPU host without a network: `make bench-gpu PY=python3` uses what is there."""
    out = run_python(
        "import importlib, sys\n"
        "for name in ('PIL', 'tyro', 'rich', 'jinja2', 'matplotlib', 'diffusers', 'h5py'):\n"
        "    sys.modules[name] = None\n"
        "for name in ('kernels.bench', 'tokenizer.bench', 'lvm.bench', 'lvm.bench_train',\n"
        " 'lvm.bench_generate'):\n"
        "    importlib.import_module(name)\n"
        "print('all')\n"
    )
    assert out == "all"


def test_transformers_works_beside_our_kernels_package():
    """`kernels` is also the name of a package that transformers looks for."""
    out = run_python(
        "import kernels.attention\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "c = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8,\n"
        "                num_attention_heads=1)\n"
        "import torch\n"
        "print(tuple(LlamaForCausalLM(c)(torch.zeros(1, 3, dtype=torch.long)).logits.shape))\n"
    )
    assert out == "(1, 3, 8)"


def test_no_public_function_shares_a_submodules_name():
    code = (
        "import importlib, inspect, pkgutil\n"
        f"for package in {ORDER}:\n"
        "    module = importlib.import_module(package)\n"
        "    names = {m.name for m in pkgutil.iter_modules(module.__path__)}\n"
        "    both = [n for n in names if inspect.isroutine(getattr(module, n, None))]\n"
        "    assert not both, (package, both)\n"
        "print('clear')\n"
    )
    assert run_python(code) == "clear"


def test_torchvision_is_absent():
    """Its wheel breaks diffusers, transformers and torchmetrics beside a CPU torch."""
    assert run_python("import importlib.util as u; print(u.find_spec('torchvision'))") == "None"


def tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    return [ROOT / name for name in listing if name and (ROOT / name).is_file()]


def test_tracked_files_are_small():
    large = [str(p) for p in tracked() if p.stat().st_size > 1 << 20]
    assert not large
