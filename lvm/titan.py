"""Train under torchtitan: `python -m lvm.titan RECIPE --data DIR --out RUN [--tp N]`.

The run, the model, the data's order, the term, the optimisers, the log and the checkpoints are
those of `lvm.train`. torchtitan's Trainer (Liang et al. 2024, "TorchTitan") lays out the ranks,
builds and shards the model and makes each update. W ranks are W/T readers of T ranks:

    ranks   0 1 | 2 3 | 4 5 | 6 7      T = 2: two compute the same rows between them (tensor
             tp    tp    tp    tp      parallel), and the readers stand to one another as the ranks
                                       of lvm.train do: FSDP2, or HSDP with --shards

A run folder is of one kind: `lvm.train` goes on from a checkpoint of this command and this command
from one of `lvm.train`, at any number of ranks, and whatever opens a run opens both.
How T ranks divide a model: lvm.tensor_parallel. What touches torchtitan: lvm.titan_compat.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Annotated

import tyro

from lvm.config import Run
from lvm.recipes import recipe, recipes
from lvm.train import carry_on, require_folders
from tokenizer.cli import InputError, guarded
from tokenizer.cli import run as run_command
from tokenizer.world import Signals
from visual_sentences.manifest import Manifest

PROG = "python -m lvm.titan"
VERSION = "0.3.0"
INSTALL = f"pip install torchtitan=={VERSION}, beside a CPU build of torch triton too"

ABSENT = {
    "--cp": "context parallelism cuts the keys of a sentence too, which our attention wants whole; "
    "--tp cuts everything else along the sequence",
    "--pp": "a pipeline needs the model in stages and an exchange of masks between them; --tp, "
    "--shards and --recompute divide what one card cannot hold",
    "--ep": "the model has no experts",
    "--float8": "torchtitan makes float8 of its own linear layers, and the model's are torch's; "
    "--precision bf16 is what there is",
}
"""What torchtitan has and this command does not, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Titan:
    """Train a recipe under torchtitan."""

    tp: int = 1
    """Ranks that compute the same rows between them: heads and channels are divided, and the
    sequence outside of the matrices. It should stay within a node."""
    run: Annotated[Run, tyro.conf.arg(name="")]
    """The recipe; what `lvm.train` takes."""


def check(run: Run, *, tp: int, world: int, row_len: int) -> None:
    """Raise InputError where `tp` ranks cannot share this model on `world` ranks."""
    model = run.model
    if run.patches is not None:
        raise InputError(
            f"{run.recipe} predicts patches of images, and lvm.titan trains on codes alone; use "
            "`python -m lvm.train`"
        )
    if run.distil.on:
        raise InputError(
            "--distil is not read by lvm.titan, which trains on codes alone; use `python -m "
            "lvm.train`"
        )
    if tp < 1 or world % tp:
        fitting = [n for n in range(1, world + 1) if world % n == 0]
        raise InputError(f"--tp {tp} does not divide {world} ranks; one of {fitting} does")
    if tp == 1:
        return
    for what, size in {
        f"{model.heads} heads": model.heads,
        f"{model.groups} key/value heads": model.groups,
        f"{model.ffn} channels of the MLP": model.ffn,
        f"{row_len} positions of a row": row_len,
    }.items():
        if size % tp:
            common = [n for n in range(1, tp) if not size % n and not world % n]
            raise InputError(f"--tp {tp} does not divide {what}; {common} do")
    shape = {
        "a codebook as embedding": model.codebook_dim > 0,
        "biases": model.attn_bias or model.norm == "layer",
    }
    if found := [what for what, there in shape.items() if there]:
        raise InputError(f"--tp {tp}: no rule divides {' and '.join(found)}; use --tp 1")
    if run.optim.name == "muon":
        raise InputError(
            f"--tp {tp} with --optim.name muon: Muon works on whole matrices, which --tp cuts; use "
            "--optim.name adamw, or --tp 1"
        )
    if run.compile:
        raise InputError(f"--tp {tp} with --compile was not made to work; use one of them")


def load_compat() -> ModuleType:
    """Return `lvm.titan_compat`; raises InputError where torchtitan is not there or another one."""
    remedy = (
        f"{INSTALL}. Or train without it: `python -m lvm.train` takes the same recipe, data and "
        "run folder"
    )
    try:
        found = metadata.version("torchtitan")
    except metadata.PackageNotFoundError as error:
        raise InputError(f"torchtitan is not installed: {remedy}") from error
    if found != VERSION:
        raise InputError(
            f"torchtitan {found} is installed, and its interfaces change with every release; "
            f"wanted {VERSION}: {remedy}"
        )
    try:
        from lvm import titan_compat
    except ImportError as error:
        raise InputError(
            f"torchtitan {found} cannot be imported beside torch {metadata.version('torch')} "
            f"({error}); it needs torch 2.13 or newer. {remedy}"
        ) from error
    return titan_compat


def train(command: Titan) -> int:
    """Start or continue a run under torchtitan; returns the exit code.

    Raises InputError, also where torchtitan is not installed, and CommandError.
    """
    run, tp = command.run, command.tp
    require_folders(run)
    compat = load_compat()
    with Signals() as signals, compat.joined(run.device) as world:
        check(run, tp=tp, world=world.size, row_len=Manifest.load(run.data).row_len)
        return carry_on(
            run,
            world=world,
            readers=compat.readers(world, tp),
            signals=signals,
            make=partial(compat.TitanTraining, tp=tp),
        )


def main(args: Sequence[str]) -> int:
    """Read a recipe's name, then options and values that replace the recipe's."""
    names = ", ".join(recipes())
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(
            f"usage: {PROG} RECIPE --data DIR --out RUN [--tp N] [--steps N] [--optim.lr X] …\n\n"
            f"Recipes: {names}; or your own function as package.module.name.\n"
            f"`{PROG} RECIPE --help` lists every option and every value of the recipe.\n"
        )
        return 0 if args else 2
    if args[0].startswith("-"):
        raise InputError(f"{args[0]} stands where the recipe's name is wanted, one of {names}")
    for option, why in ABSENT.items():
        if any(arg == option or arg.startswith(f"{option}=") for arg in args):
            raise InputError(f"{option} is not supported: {why}")
    run_command(
        Titan,
        train,
        prog=f"{PROG} {args[0]}",
        default=Titan(run=recipe(args[0])),
        args=args[1:],
    )
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:]), prog=PROG))
