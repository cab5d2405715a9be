"""A TOML table whose values are asked for by key, type and range; each refusal is an InputError."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from tokenizer.cli import InputError


class Table:
    """Values by key; `where` opens every message, such as: mix.toml, source "depth"."""

    def __init__(self, values: Mapping[str, Any], *, where: str) -> None:
        self.values, self.where = values, where

    def refuse_unknown(
        self, known: Iterable[str], *, elsewhere: Iterable[str] = (), kind: str = ""
    ) -> None:
        known = list(known)
        for key in self.values:
            if key in known:
                continue
            if key in elsewhere:
                raise InputError(
                    f'{self.where}: the key "{key}" does not belong to kind "{kind}", which takes '
                    f"{', '.join(known)}"
                )
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f'did you mean "{near[0]}"?' if near else f"wanted one of {', '.join(known)}"
            raise InputError(f'{self.where}: unknown key "{key}"; {hint}')

    def text(self, key: str, *, required: bool = False) -> str:
        value = self._get(key, required)
        if value is None:
            return ""
        if not isinstance(value, str) or (required and not value):
            raise self._wrong(key, "a text in quotes")
        return value

    def choice(self, key: str, wanted: tuple[str, ...], *, required: bool = False) -> Any:
        value = self.text(key, required=required)
        if value and value not in wanted:
            near = difflib.get_close_matches(value, wanted, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise InputError(
                f'{self.where}: {key} = "{value}": wanted one of {", ".join(wanted)}{hint}'
            )
        return value

    def integer(self, key: str, *, least: int) -> int | None:
        value = self._get(key)
        if value is not None and (type(value) is not int or value < least):
            raise self._wrong(key, f"an integer of {least} or more")
        return value

    def number(self, key: str) -> float | None:
        value = self._get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self._wrong(key, "a number above 0")
        return float(value)

    def repeat(self, key: str) -> float | Literal["sqrt"] | None:
        if self.values.get(key) == "sqrt":
            return "sqrt"
        if isinstance(self.values.get(key), str):
            raise self._wrong(key, 'a number above 0, or "sqrt"')
        return self.number(key)

    def strides(self, key: str) -> tuple[int, ...]:
        value = self._get(key)
        value = [1] if value is None else value
        if not isinstance(value, list) or not value:
            raise self._wrong(key, "a list of integers, such as [1, 2, 4]")
        if any(type(stride) is not int or stride < 1 for stride in value):
            raise self._wrong(key, "integers of 1 or more")
        return tuple(value)

    def splits(self, key: str) -> dict[str, float]:
        value = self._get(key)
        if value is None:
            return {}
        wanted = "a table of shares between 0 and 1, such as {val = 0.02}"
        if not isinstance(value, dict):
            raise self._wrong(key, wanted)
        if any(type(share) not in (int, float) or not 0 < share < 1 for share in value.values()):
            raise self._wrong(key, wanted)
        if "train" in value or any(not name.isalnum() for name in value):
            raise self._wrong(key, 'names of letters and digits; "train" is what the others leave')
        if sum(value.values()) >= 1:
            raise self._wrong(key, 'shares with a sum below 1, so that "train" has some')
        return {name: float(share) for name, share in value.items()}

    def texts(self, key: str, *, besides: str) -> dict[str, str]:
        """Return a table of names and texts; the names become parts of keys."""
        value = self._get(key, required=True)
        wanted = f'a table of names and paths, such as {{depth = "depth"}}; no name is "{besides}"'
        if not isinstance(value, dict) or not value or besides in value:
            raise self._wrong(key, wanted)
        if not all(re.fullmatch(r"\w+", name) for name in value):
            raise self._wrong(key, "names of letters, digits and _")
        if not all(isinstance(text, str) and text for text in value.values()):
            raise self._wrong(key, wanted)
        return dict(value)

    def _get(self, key: str, required: bool = False) -> Any:
        if required and key not in self.values:
            near = difflib.get_close_matches(key, list(self.values), n=1, cutoff=0.6)
            hint = f'; did you mean it by "{near[0]}"?' if near else ""
            raise InputError(f'{self.where}: the key "{key}" is missing{hint}')
        return self.values.get(key)

    def _wrong(self, key: str, wanted: str) -> InputError:
        return InputError(f"{self.where}: {key} = {self.values[key]!r}; wanted {wanted}")
