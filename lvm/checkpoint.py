"""Checkpoints: sharded tensors and a small JSON, whole or absent, readable at any world size.

    RUN/latest                            the name of the newest whole checkpoint
    RUN/checkpoints/step-00000100/
        .metadata, __0_0.distcp, …        torch.distributed.checkpoint: a file a rank
        __0_0.distcp.sha256, …            what `verify` holds them to
        trainer.json                      step, samples, elapsed seconds, phases

Tensors are named `model.<weight>` and `optim.<weight>.<state>`. Nothing else is in the DCP part,
and its index is unpickled by a list of allowed names: reading a checkpoint runs no code of it.
"""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from tokenizer.cli import CommandError, InputError
from tokenizer.files import TEMPORARY, atomic_write, sha256_file, sync_folder
from tokenizer.world import World

FOLDER, LATEST, STATE, DIGEST = "checkpoints", "latest", "trainer.json", ".sha256"
FORMAT = 2  # of trainer.json; 1 had neither norms nor skips
SINGLE = "torch.distributed is disabled"  # what DCP warns of where one process saves


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
    norms: tuple[float, ...] = ()  # of the last gradients, where updates are judged by them
    skipped: int = 0  # updates that were left out
    in_a_row: int = 0  # of these the last ones

    @classmethod
    def load(cls, folder: Path) -> Self:
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if (version := found.pop("format")) not in (1, FORMAT):
            raise InputError(
                f"{folder / STATE} has format {version}; this program reads 1 to {FORMAT}"
            )
        phases = tuple(Phase(**phase) for phase in found.pop("phases"))
        norms = tuple(found.pop("norms", ()))
        return cls(**found, phases=phases, norms=norms)


def tensors(model: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return weights and optimiser state by name; `model` holds its trunk as `model.model`."""
    named = dict(model.named_parameters())
    found: dict[str, Tensor] = {name: value.detach() for name, value in named.items()}
    for name, parameter in named.items():
        for optimiser in optimisers:
            for key, value in optimiser.state.get(parameter, {}).items():
                found[f"optim.{name}.{key}"] = value
    return found


class Saver:
    """Writes checkpoints of a run, makes each the latest and deletes all but the last `keep`.

    In the background (`background`) a save copies the tensors to memory of the host and returns;
    threads write while training goes on, and the next save, or `finish`, waits for them. A crash at
    any moment leaves the old `latest` and its folder untouched. Every rank makes one and calls its
    methods together.
    """

    def __init__(self, run: Path, world: World, *, keep: int, background: bool = False) -> None:
        self.run, self.world, self.keep, self.background = run, world, keep, background
        # A group of its own: threads of a save may not meet the messages of training.
        own = background and world.size > 1
        self.group = dist.new_group(backend="gloo") if own else None
        self.pending: Future[Any] | None = None

    def save(
        self, trainer: Trainer, *, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Write a checkpoint; in the background return when it no longer reads the tensors."""
        self.finish()
        final = self.run / FOLDER / f"step-{trainer.step:08d}"
        temporary = final.with_name(f"{final.name}{TEMPORARY}save")
        if self.world.main:
            for left in (self.run / FOLDER).glob(f"*{TEMPORARY}*"):
                shutil.rmtree(left)
            temporary.mkdir(parents=True)
        self.world.wait()
        found, writer, alone = tensors(model, optimisers), _Writer(temporary), self.world.size == 1
        if not self.background:
            with _quiet(), _unwrapped():
                dcp.save(found, storage_writer=writer, no_dist=alone)
            self._seal(trainer, temporary, final)
            return
        if self.world.device.type == "cpu":  # staging copies what is not on the host yet
            found = {name: value.clone() for name, value in found.items()}
        if alone:  # for good: a thread says it later
            warnings.filterwarnings("ignore", message=SINGLE)
        response = dcp.async_save(
            found, storage_writer=writer, process_group=self.group, no_dist=alone
        )
        assert isinstance(response, Future), "a writer that stages by itself gives one future"
        self.pending = _then(response, lambda: self._seal(trainer, temporary, final))

    def finish(self) -> None:
        """Wait for a save in the background; raises what it raised."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            with _unwrapped():
                pending.result()
        if self.background:
            self.world.wait()

    def _seal(self, trainer: Trainer, temporary: Path, final: Path) -> None:
        """Make a written folder a checkpoint, and the latest. DCP returns on rank 0 last of all."""
        if not self.world.main:
            return
        with atomic_write(temporary / STATE, "w") as file:
            json.dump({"format": FORMAT, **asdict(trainer)}, file, indent=1)
        if final.exists():  # written by a start that was killed before it became the latest
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(final.parent)
        with atomic_write(self.run / LATEST, "w") as file:
            file.write(final.name + "\n")
        for old in sorted((self.run / FOLDER).glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)


def _then(future: Future[Any], action: Callable[[], None]) -> Future[None]:
    """Return the future of `action`, which runs in the thread that ends `future`."""
    done: Future[None] = Future()

    def finish(ended: Future[Any]) -> None:
        try:
            ended.result()
            action()
            done.set_result(None)
        except BaseException as error:  # raised again by whoever asks for the result
            done.set_exception(error)

    future.add_done_callback(finish)
    return done


class _Writer(dcp.FileSystemWriter):
    """Writes beside each file its SHA-256, by the rank that has just written it."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in written.value()}:
            path = Path(self.path) / name
            with atomic_write(path.with_name(name + DIGEST), "w") as out:
                out.write(sha256_file(path) + "\n")
        return written


def verify(folder: Path, world: World) -> None:
    """Hold the files of a checkpoint to their SHA-256, each by one rank; every rank calls.

    Raises CommandError with the name of a file that is absent, cut off or changed.
    """
    wrong = []
    for path in sorted(folder.glob(f"*{DIGEST}"))[world.rank :: world.size]:
        data = path.with_name(path.name.removesuffix(DIGEST))
        wanted = path.read_text(encoding="utf-8").strip()
        try:
            found = sha256_file(data)
        except OSError as error:
            wrong.append(f"{data} cannot be read: {error.strerror}")
            continue
        if found != wanted:
            wrong.append(f"{data} is damaged: its SHA-256 is {found[:12]}…, wanted {wanted[:12]}…")
    (bad,) = world.add(len(wrong))
    if bad:
        others = sorted(p.name for p in folder.parent.glob("step-*") if p.name != folder.name)
        said = "; ".join(wrong) or f"{folder}: other ranks found {bad:.0f} damaged files"
        raise CommandError(
            f"{said}. To go on from an earlier checkpoint write its name into {LATEST}: "
            f"{', '.join(others) or 'there is no other'}"
        )


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

    Raises InputError where names or shapes are not those of the model, CommandError where a file is
    damaged.
    """
    verify(folder, world)
    reader = _Reader(folder)
    stored = reader.shapes()
    named = dict(model.named_parameters())
    _compare(folder, stored, {name: tuple(p.shape) for name, p in named.items()})
    for name, parameter in named.items():
        if not parameter.requires_grad:  # a codebook: no optimiser has it
            continue
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
    verify(folder, World())
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
    weights = {name: shape for name, shape in stored.items() if not name.startswith("optim.")}
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
def _unwrapped() -> Iterator[None]:
    """Raise what a full or lost disk said, out of the exception that DCP puts around it."""
    try:
        yield
    except CheckpointException as wrapped:
        for error, _ in wrapped.failures.values():
            if isinstance(error, OSError):
                raise error from wrapped
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep DCP from warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=SINGLE)
        yield
