"""What test_titan runs on each rank: the runs of a JSON file under torchtitan, one after the other.

Each run opens a process group at a port of its own, from PORTS. A process of its own, also where it
is the only one, since torchtitan changes what torch is for the whole process.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lvm.config import Run
from lvm.titan import Titan, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for (values, tp), port in zip(jobs, os.environ["PORTS"].split(), strict=True):
        os.environ["MASTER_PORT"] = port
        assert train(Titan(run=Run.from_json(values), tp=tp)) == 0
        assert not dist.is_initialized()
