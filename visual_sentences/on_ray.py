"""The units of a build on a Ray cluster: tasks on CPUs, one actor for each GPU.

Within an allocation of Slurm, `ray symmetric-run` starts Ray on every node and this program on one
(launch/build_ray.sh). RAY_ADDRESS says where a cluster is; without it Ray starts on this machine.
All nodes must see the same paths. A worker or node that is lost has its units done again elsewhere;
a lost driver is started again by hand, as any build.
"""

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokenizer.cli import CommandError, InputError
from visual_sentences.job import Job
from visual_sentences.plan import Unit
from visual_sentences.unit import Result
from visual_sentences.workers import Done, Worker, cores

RETRIES = 3  # of a unit whose worker was lost
WAITING = 2  # units that a core or actor has at hand, so that it never waits for the next
STORE = 128 << 20  # bytes: what goes through Ray's memory is small, whatever the build
REACHED = 30  # seconds within which a cluster must answer; Ray itself would try for minutes

Submit = Callable[[Unit], Any]  # starts a unit somewhere and returns what stands for its result


def on_ray(
    job: Job, units: Sequence[Unit], *, workers: int, log: Callable[[str], None]
) -> Iterator[Done]:
    """Yield results as they come; `workers` bounds the tasks or actors at work, 0: the cluster."""
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "--engine ray needs Ray: pip install 'large-vision-models[ray]', or --engine local"
        ) from error
    started = not ray.is_initialized()
    if started:
        _connect(ray, workers=workers)
    try:
        slots = by_actors if job.device == "cuda" else by_tasks
        yield from collect(ray, units, slots(ray, job, workers=workers), log=log)
    except ray.exceptions.RayTaskError as error:
        # Ray puts the worker's traceback into the message; what it was raised as is the message.
        if isinstance(error.cause, InputError | CommandError | OSError):
            raise error.cause from None
        raise
    finally:
        if started:
            ray.shutdown()


def _connect(ray: Any, *, workers: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address in ("", "local"):
        cpus = workers or cores()
        options |= {"address": "local", "num_cpus": cpus, "object_store_memory": STORE}
        ray.init(include_dashboard=False, **options)
        return
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "/" not in host:
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED).close()
        ray.init(address=address, **options)
    except (OSError, ValueError) as error:  # Ray's ConnectionError is an OSError
        raise InputError(
            f"no Ray cluster can be reached at RAY_ADDRESS={address} ({error}); start one there, "
            "or unset RAY_ADDRESS to use this machine alone"
        ) from error


def by_tasks(ray: Any, job: Job, *, workers: int) -> list[Submit]:
    """Return a slot for each task that may run or wait; a process of Ray keeps its encoder."""
    run, shared = ray.remote(num_cpus=1, max_retries=0)(_run), ray.put(job)
    count = workers or WAITING * max(1, round(ray.cluster_resources().get("CPU", 1)))
    return [lambda unit: run.remote(shared, unit)] * count


def by_actors(ray: Any, job: Job, *, workers: int) -> list[Submit]:
    """Return slots of one actor for each GPU, which decodes with its share of the node's cores."""
    gpus = round(ray.cluster_resources().get("GPU", 0))
    if not gpus:
        raise InputError("--device cuda: the Ray cluster has no GPU; use --device cpu")
    each = cores_for_a_gpu([node["Resources"] for node in ray.nodes() if node["Alive"]])
    # Calls that a lost actor had at hand go to the one that takes its place.
    kept = {"max_restarts": -1, "max_task_retries": RETRIES}
    kind = ray.remote(num_gpus=1, num_cpus=each, **kept)(Worker)
    threaded = replace(job, threads=max(1, each))
    return [kind.remote(threaded).run.remote for _ in range(min(workers or gpus, gpus))] * WAITING


def cores_for_a_gpu(nodes: Sequence[Mapping[str, float]]) -> int:
    """Return how many cores an actor may ask for, so that each node can hold one for each GPU."""
    return min(int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1)


def collect(
    ray: Any, units: Sequence[Unit], slots: Sequence[Submit], *, log: Callable[[str], None]
) -> Iterator[Done]:
    """Keep all slots busy; yield results as they come. What a lost worker was at is done again.

    Raises CommandError when that happens to a unit again and again.
    """
    gone = ray.exceptions
    lost = (
        *(gone.WorkerCrashedError, gone.RayActorError, gone.OutOfMemoryError),
        *(gone.NodeDiedError, gone.ObjectLostError),
    )
    free, left = list(slots), list(reversed(units))
    running: dict[Any, tuple[Submit, Unit]] = {}
    losses = Counter[str]()
    while left or running:
        while left and free:
            submit, unit = free.pop(), left.pop()
            running[submit(unit)] = (submit, unit)
        done, _ = ray.wait(list(running), num_returns=1)
        for ref in done:
            submit, unit = running.pop(ref)
            free.append(submit)
            try:
                result = ray.get(ref)
            except lost as error:
                losses[unit.name] += 1
                if losses[unit.name] > RETRIES:
                    raise CommandError(
                        f"a unit of {unit.source.name} lost its worker {RETRIES + 1} times, often "
                        "for want of memory; the same command goes on from what is finished, with "
                        "fewer --workers or a smaller --batch"
                    ) from error
                log("a worker of Ray was lost; what it was at is done again")
                left.append(unit)
                continue
            yield unit, result


_worker: Worker | None = None  # of this Ray process, which runs many tasks


def _run(job: Job, unit: Unit) -> Result:
    global _worker
    if _worker is None or _worker.job != job:
        _worker = Worker(job)
    return _worker.run(unit)
