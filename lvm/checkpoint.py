"""Checkpoints: sharded tensors and a small JSON, whole or absent, readable at any world size.

    RUN/latest                            the name of the newest whole checkpoint
    RUN/checkpoints/step-00000100/
        .metadata, __0_0.distcp, …        torch.distributed.checkpoint: a file a rank
        trainer.json                      step, samples, elapsed seconds, phases

Tensors are named `model.<weight>` and `optim.<weight>.<state>`. Nothing else is in the DCP part,
and its index is unpickled by a list of allowed names: reading a checkpoint runs no code of it.
"""

import json
import pickle
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from tokenizer.cli import CommandError, InputError
from tokenizer.files import TEMPORARY, atomic_write, sync_folder
from tokenizer.world import World

FOLDER, LATEST, STATE = "checkpoints", "latest", "trainer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of a run on one mixture: from sample `first` on, data of this manifest."""

    manifest: str
    mixture: dict[str, Any]
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """Where a run stands. `elapsed` counts the seconds of all its starts."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    phases: tuple[Phase, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> Self:
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if (version := found.pop("format")) != 1:
            raise InputError(f"{folder / STATE} has format {version}; this program reads format 1")
        phases = tuple(Phase(**phase) for phase in found.pop("phases"))
        return cls(**found, phases=phases)


def tensors(model: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return weights and optimiser state by name; `model` holds its trunk as `model.model`."""
    named = dict(model.named_parameters())
    found: dict[str, Tensor] = {name: value.detach() for name, value in named.items()}
    for name, parameter in named.items():
        for optimiser in optimisers:
            for key, value in optimiser.state.get(parameter, {}).items():
                found[f"optim.{name}.{key}"] = value
    return found


def save(
    run: Path,
    trainer: Trainer,
    *,
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    world: World,
    keep: int,
) -> None:
    """Write a checkpoint, make it the latest, and delete all but the last `keep`. Every rank calls.

    A crash at any moment leaves the old `latest` and its folder untouched.
    """
    final = run / FOLDER / f"step-{trainer.step:08d}"
    temporary = final.with_name(f"{final.name}{TEMPORARY}save")
    if world.main:
        for left in (run / FOLDER).glob(f"*{TEMPORARY}*"):
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
    world.wait()
    with _quiet():
        dcp.save(
            tensors(model, optimisers),
            storage_writer=dcp.FileSystemWriter(temporary),
            no_dist=world.size == 1,
        )
    if world.main:
        with atomic_write(temporary / STATE, "w") as file:
            json.dump({"format": 1, **asdict(trainer)}, file, indent=1)
        if final.exists():  # written by a start that was killed before it became the latest
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(final.parent)
        with atomic_write(run / LATEST, "w") as file:
            file.write(final.name + "\n")
        for old in sorted((run / FOLDER).glob("step-*"))[:-keep]:
            shutil.rmtree(old)


def latest(run: Path) -> Path | None:
    """Return the folder of the newest whole checkpoint of a run, or None where it has none."""
    try:
        name = (run / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    folder = run / FOLDER / name
    if not (folder / STATE).is_file():
        kept = sorted(p.name for p in (run / FOLDER).glob("step-*"))
        raise InputError(
            f"{run / LATEST} names {name}, which is not there; write one of {kept or 'no others'} "
            "into it, or start a new run"
        )
    return folder


def load(
    folder: Path,
    *,
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    world: World,
) -> None:
    """Read a checkpoint, made at any world size, into a model and fresh optimisers in place.

    Raises InputError where names or shapes are not those of the model.
    """
    reader = _Reader(folder)
    stored = reader.shapes()
    named = dict(model.named_parameters())
    _compare(folder, stored, {name: tuple(p.shape) for name, p in named.items()})
    for name, parameter in named.items():
        optimiser = next(
            o
            for o in optimisers
            if any(parameter is p for g in o.param_groups for p in g["params"])
        )
        prefix = f"optim.{name}."
        for key, shape in stored.items():
            if key.startswith(prefix):  # a count has no shape; all else is shaped as its weight
                scalar = torch.zeros((), device=parameter.device)
                state = torch.zeros_like(parameter).detach() if shape else scalar
                optimiser.state[parameter][key.removeprefix(prefix)] = state
    with _quiet():
        dcp.load(tensors(model, optimisers), storage_reader=reader, no_dist=world.size == 1)


def load_model_state(run: Path) -> dict[str, Tensor]:
    """Return the newest weights of a run as whole fp32 CPU tensors, by the trunk's own names.

    Needs no process group. Raises InputError where the run has no checkpoint.
    """
    folder = latest(run)
    if folder is None:
        raise InputError(
            f"{run} has no checkpoint yet; wanted a run folder of `python -m lvm.train` that has "
            "saved one"
        )
    reader = _Reader(folder)
    state = {
        name: torch.empty(shape)
        for name, shape in reader.shapes().items()
        if name.startswith("model.")
    }
    with _quiet():
        dcp.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): value for name, value in state.items()}


def _compare(
    folder: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    weights = {name: shape for name, shape in stored.items() if name.startswith("model.")}
    wrong = [
        f"{name} is {weights.get(name, 'absent')}, wanted {wanted.get(name, 'no such weight')}"
        for name in (*wanted, *(name for name in weights if name not in wanted))
        if weights.get(name) != wanted.get(name)
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise InputError(
            f"the checkpoint {folder} is of another model: {'; '.join(wrong[:3])}{more}; give the "
            "model the shape of the checkpoint, or start a new run"
        )


_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = frozenset({
    *((_METADATA, name) for name in (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
})  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Reads DCP's index, which is a pickle, and makes nothing but what such an index holds."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise CommandError(f"{path} cannot be read as a checkpoint: {error}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def shapes(self) -> dict[str, tuple[int, ...]]:
        entries = self.read_metadata().state_dict_metadata
        return {
            k: tuple(v.size) for k, v in entries.items() if isinstance(v, TensorStorageMetadata)
        }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep DCP from warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
