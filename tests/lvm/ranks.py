"""What test_parallel runs on each of several ranks: the runs of a JSON file, one after the other.

Each run opens a process group at a port of its own, from PORTS: a rank that is ahead must not meet
the store of the group before.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lvm.config import Run
from lvm.learner import Learner, backward
from lvm.model import build
from lvm.parallel import parallelize
from lvm.train import train
from tokenizer.world import world
from visual_sentences.loader import Loader
from visual_sentences.pack import pack


def sgd_step(run: Run, out: Path) -> None:
    """Save the whole weights after one step of plain SGD at rate 1 on the run's first batch."""
    with world("cpu") as here:
        model = build(run.model, seed=run.seed)
        learner = Learner(model)
        parallelize(learner, model.layers, here, precision="fp32", shards=run.shards)
        loader = Loader(
            run.data, batch_rows=run.batch_rows, seed=run.seed, rank=here.rank, world=here.size
        )
        batch = pack(next(iter(loader)), layout=run.layout, vocab=loader.manifest.vocab)
        backward(learner, batch, run=run, world=here)
        torch.optim.SGD(learner.parameters(), lr=1.0).step()
        whole = {
            name: (p.full_tensor() if here.size > 1 else p).detach()
            for name, p in learner.named_parameters()
        }
        if here.main:
            torch.save(whole, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = [Run.from_json(run) for run in json.loads(Path(sys.argv[1]).read_text())]
    for run, port in zip(runs, os.environ["PORTS"].split(), strict=True):
        os.environ["MASTER_PORT"] = port
        if run.out.endswith(".pt"):
            sgd_step(run, Path(run.out))
        else:
            assert train(run) == 0
        assert not dist.is_initialized()
