"""Recipes: one system a file. A recipe is a function that returns a `Run`, found by its name."""

import difflib
import importlib
import inspect
from collections.abc import Callable

from lvm.config import Run
from lvm.recipes import aim, delvm, ladder, lvm, tiny
from tokenizer.cli import InputError


def recipes() -> dict[str, Callable[[], Run]]:
    """Return every recipe of the project by name."""
    return {
        name: function
        for module in (tiny, ladder, lvm, delvm, aim)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


def recipe(name: str) -> Run:
    """Return the run that `name` stands for: a recipe of ours, or your own as package.module.name.

    An unknown name fails with the nearest known ones.
    """
    known = recipes()
    if name in known:
        return known[name]()
    module, _, function = name.rpartition(".")
    if module:
        try:
            return getattr(importlib.import_module(module), function)()
        except (ImportError, AttributeError) as error:
            raise InputError(f"recipe {name!r} cannot be loaded: {error}") from error
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)
    raise InputError(f"no recipe {name!r}; did you mean {', '.join(near)}?")
