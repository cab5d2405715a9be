"""Reference code that cannot simply be imported."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def fidelity() -> Iterator[Callable[[str], ModuleType]]:
    """Return what gives a module of torch-fidelity by name.

    The package as a whole cannot be imported, for its __init__ and two of its modules want
    torchvision. The others are found beneath an empty package; those two are empty modules, from
    which any name can be taken but nothing called.
    """
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("torch-fidelity is not installed")
    package = ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    for name in ("torch_fidelity.utils", "torch_fidelity.utils_torchvision"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__getattr__ = lambda name: None  # type: ignore[method-assign]
    yield lambda name: importlib.import_module(f"torch_fidelity.{name}")
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        del sys.modules[name]
