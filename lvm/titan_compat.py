"""What touches torchtitan 0.3.0: its Trainer with our model, optimisers and loop around it.

torchtitan builds a trainer from configs, one a component. The components here hold what is ours, or
nothing where our loop does the work. Its Trainer is used up to `train_step`: the sum of labels over
the ranks, accumulation, forward, backward, the optimisers' step. Its own clipping, schedules,
loaders, logs and checkpoints stand still, since those of `lvm.train` make equal numbers.

Without a GPU torchtitan takes "cuda" for its device in each module that asks; `joined` tells them.
"""

import gc
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.trainer as titan
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import BaseLoss
from torchtitan.components.metrics import DeviceMemStats, MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config.configs import ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.utils import NoColor

from lvm import checkpoint, optim, parallel, tensor_parallel
from lvm.learner import Learner
from lvm.metrics import memory_gib
from lvm.model import on_meta
from lvm.objectives import Sums
from lvm.train import Training
from tokenizer.world import World
from tokenizer.world import world as open_world
from visual_sentences.batch import Batch
from visual_sentences.pack import Rows, pack


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the other processes, as `tokenizer.world.world`; one process is a group of its own."""
    with open_world(device) as world:
        _settle(world.device.type)
        alone = world.size == 1
        before = os.environ.get("LOCAL_RANK")
        os.environ.setdefault("LOCAL_RANK", "0")  # which device; torchtitan wants to be told
        if alone:
            backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        yield world
        gc.enable()  # torchtitan's Trainer collects garbage by hand
        if before is None:
            del os.environ["LOCAL_RANK"]
        if alone:
            dist.destroy_process_group()


def _settle(kind: str) -> None:
    """Tell every module of torchtitan which device it runs on; on import it saw none, or a GPU."""
    module = torch.get_device_module(kind)
    for name, found in list(sys.modules.items()):
        if name.startswith("torchtitan."):
            for attribute, value in (("device_type", kind), ("device_module", module)):
                if attribute in vars(found):
                    setattr(found, attribute, value)


@dataclass(slots=True, kw_only=True)
class Job:
    """What the components share: the training that they are parts of, and how it starts."""

    training: "TitanTraining"
    tp: int
    fresh: bool  # no checkpoint will fill the weights

    def to_dict(self) -> dict[str, Any]:
        """For torchtitan, which writes configs out."""
        return self.training.run.to_json()


class Model(Learner, BaseModel):
    """The learner of `lvm.train`; with several ranks a reader each sums up its own positions."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        job: Job

        def update_from_config(self, *, config: Any, **rest: Any) -> None:
            pass

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, float]:
            shape = self.job.training.run.model
            return shape.num_params(), shape.flops_per_token(seq_len)

    def __init__(self, config: Config) -> None:
        run = config.job.training.run
        super().__init__(on_meta(run.model), z_loss=run.z_loss, attention=run.attention)
        self.codebook = run.codebook
        self.job = config.job
        self.tp: DeviceMesh | None = None  # who computes the same rows

    def verify_module_protocol(self) -> None:
        """The trunk is of plain torch modules, which torchtitan's own are not."""

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        if self.job.fresh:
            parallel.initialise(self, self.job.training.run.seed)

    def forward(self, batch: Batch, kind: Tensor | None = None, kinds: int = 0) -> Sums:
        if self.tp is None:
            return super().forward(batch, kind, kinds)
        with tensor_parallel.head_whole(self.model):
            part = replace(batch, labels=tensor_parallel.own(batch.labels, self.tp))
            return super().forward(part, kind, kinds)


class Loss(BaseLoss):
    """The term's sum over the labels of the whole batch; keeps the sums for the log."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        job: Job

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.training = config.job.training

    def __call__(
        self, pred: Sums, labels: Tensor, global_valid_tokens: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert global_valid_tokens is not None, "the Trainer counts the labels of all readers"
        training, sums = self.training, pred
        training.sums += torch.stack([sums.loss.detach(), sums.nll, sums.correct, sums.count])
        # FSDP takes the mean of gradients over the readers, which this factor undoes.
        return sums.loss * (training.readers.size / global_valid_tokens), {}


class Optimisers(OptimizersContainer):
    """The optimisers of `lvm.optim`, which clips before they step."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        job: Job

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.training, self.model_parts = config.job.training, model_parts
        (model,) = model_parts
        self.optimizers = optim.optimisers(model, self.training.run.optim)
        self._post_init(list(model.parameters()))

    def step(self, closure: Any = None) -> None:
        self.training.step()


class Rates(LRSchedulersContainer):
    """Nothing: the loop sets the rate of an update before it."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        def build(self, *, optimizers: Any, training_steps: int) -> "Rates":
            return Rates()

    def __init__(self) -> None:
        self.schedulers: list[Any] = []

    def get_metrics(self) -> dict[str, float]:
        return {}


class Rowless(BaseDataLoader):
    """Nothing: the loop hands each update its rows."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, **rest: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class Wordless(BaseTokenizer):
    """Nothing: rows are codes already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **rest: Any) -> None:
        super().__init__()

    def encode(self, *args: Any, **rest: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *args: Any, **rest: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        raise NotImplementedError


class Silent(MetricsProcessor):
    """Keeps torchtitan's log off: the loop writes metrics.jsonl and knows the memory."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        job: Job

    def __init__(self, config: Config, **rest: Any) -> None:
        self.color, self.device_memory_monitor = NoColor(), Memory(config.job.training.world)

    def should_log(self, step: int) -> bool:
        return False


class Memory:
    """What the Trainer asks about the device while it is made."""

    def __init__(self, world: World) -> None:
        self.world = world
        cuda = world.device.type == "cuda"
        self.device_name = torch.cuda.get_device_name(world.device) if cuda else "CPU"

    def get_peak_stats(self) -> DeviceMemStats:
        held = memory_gib(self.world)
        return DeviceMemStats(held, 0.0, held, 0.0, 0, 0)


class Updates(titan.Trainer):
    """torchtitan's Trainer within a process group that is already there."""

    def init_distributed(self) -> ParallelDims:
        return ParallelDims.from_config(self.config.parallelism, dist.get_world_size())


def configs(job: Job) -> titan.Trainer.Config:
    """Return the configs of a Trainer whose components are those of this file."""
    run, world = job.training.run, job.training.world
    readers = world.size // job.tp
    copies = readers // parallel.check_shards(run.shards, world=readers)
    return titan.Trainer.Config(
        model_spec=ModelSpec(
            name="lvm",
            flavor=run.recipe,
            model=Model.Config(job=job),
            parallelize_fn=partial(spread, job=job),
            pipelining_fn=None,
            post_optimizer_build_fn=None,
            state_dict_adapter=None,
        ),
        dump_folder=run.out,
        training=TrainingConfig(
            local_batch_size=run.micro_rows,
            global_batch_size=run.batch_rows,
            seq_len=job.training.manifest.row_len,
            steps=run.steps,
            max_norm=math.inf,  # `Optimisers` clips
            disable_cuda_graphs=True,  # a mask's tables are new tensors in every batch
        ),
        parallelism=ParallelismConfig(
            data_parallel_replicate_degree=copies,
            data_parallel_shard_degree=readers // copies,
            tensor_parallel_degree=job.tp,
            spmd_backend="partial_dtensor",  # the one that runs on torch 2.13 and 2.14
        ),
        checkpoint=CheckpointManager.Config(enable=False),  # `lvm.checkpoint` saves
        loss=Loss.Config(job=job),
        optimizer=Optimisers.Config(job=job),
        lr_scheduler=Rates.Config(),
        dataloader=Rowless.Config(),
        tokenizer=Wordless.Config(),
        metrics=Silent.Config(job=job),
    )


def spread(model: Model, *, parallel_dims: ParallelDims, job: Job, **rest: Any) -> Model:
    """Divide a model as torchtitan has laid out the ranks: heads and channels, then FSDP2."""
    run, world = job.training.run, job.training.world
    if parallel_dims.tp > 1:
        model.tp = parallel_dims.get_mesh("tp")
        tensor_parallel.divide(model.model, model.tp)
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate > 1 else ["fsdp"]
    parallel.parallelize(
        model,
        model.blocks,
        world,
        precision=run.precision,
        recompute=run.recompute,
        compiled=run.compile,
        mesh=parallel_dims.get_mesh(names),
    )
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep off warnings about the parts that stand still, and about drawing numbers on a CPU."""
    level = titan.logger.level
    titan.logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="DTensor", category=UserWarning)
        yield
    titan.logger.setLevel(level)


class TitanTraining(Training):
    """The loop of `lvm.train`, whose updates torchtitan makes."""

    def __init__(self, *args: Any, tp: int, **rest: Any) -> None:
        self.tp = tp
        super().__init__(*args, **rest)

    def prepare(self, folder: Path | None) -> None:
        world = self.world
        self.readers = readers(world, self.tp)
        job = Job(training=self, tp=self.tp, fresh=folder is None)
        with quiet():
            self.titan = Updates(configs(job))
        self.titan.train_context = partial(parallel.compute, world, precision=self.run.precision)
        (self.learner,) = self.titan.model_parts
        self.parameters = list(self.learner.parameters())
        self.optimisers = self.titan.optimizers.optimizers
        if folder is not None:
            checkpoint.load(folder, model=self.learner, optimisers=self.optimisers, world=world)

    def update(self, stream: Iterator[Rows]) -> None:
        run, trainer, clock = self.run, self.trainer, self.window.clock
        clock.mark("")
        horizon = optim.horizon(
            trainer.step, steps=run.steps, elapsed=trainer.elapsed, seconds=run.seconds
        )
        self.factor = optim.rate(trainer.step, run.optim, horizon=horizon)
        optim.set_rate(self.optimisers, self.factor)
        self.sums = torch.zeros(4, device=self.world.device)
        self.titan.step = trainer.step + 1
        self.titan.gc_handler.run(self.titan.step)
        self.titan.train_step(self.micros(stream))
        if self.made:
            self.window.add(self.sums, step=trainer.step, tokens=self.tokens, waited=self.waited)
        clock.mark("optimiser")

    def micros(self, stream: Iterator[Rows]) -> Iterator[tuple[dict[str, Batch], Tensor]]:
        """Yield the micro-batches of an update; labels on the CPU, where torchtitan counts them."""
        rows_at_once = self.run.micro_rows
        asked = time.perf_counter()
        rows = next(stream)
        self.waited = time.perf_counter() - asked
        batch: Batch = self.feed.batch(rows)
        if self.trainer.step == self.first:
            self.feed.check(batch)
        self.tokens = batch.tokens * self.readers.size
        counted = pack(
            rows,
            layout=self.run.layout,
            vocab=self.manifest.vocab,
            whole_rows=self.run.whole_rows,
        )
        labels = counted.labels.split(rows_at_once)
        for micro, its_labels in zip(batch.split(rows_at_once), labels, strict=True):
            self.window.clock.mark("data")
            yield {"input": micro}, its_labels

    def step(self) -> None:
        """Clip, count the update, and make it if nothing speaks against it."""
        self.window.clock.mark("model")  # and torchtitan's pass over the norm, which clips nothing
        trainer = self.trainer
        self.norm = optim.clip(self.parameters, self.run.optim.clip)
        self.trainer = replace(
            trainer,
            step=trainer.step + 1,
            samples=trainer.samples + self.run.batch_rows,
            tokens=trainer.tokens + self.tokens,
        )
        self.made = not self.left_out()
        if self.made:
            for optimiser in self.optimisers:
                optimiser.step()


def readers(world: World, tp: int) -> World:
    """Return which of the ranks that read different rows this one is; neighbours read the same."""
    return replace(world, rank=world.rank // tp, size=world.size // tp)
