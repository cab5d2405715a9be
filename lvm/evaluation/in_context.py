"""Does the prompt help? The same targets under a right prompt, a wrong one, and none.

The last pair of a sentence of pairs is query and target:

    right   x1 y1 x2 y2 x3 y3 | x4 → y4?      none    x4 → y4?
    wrong   pairs of another source | x4 → y4?    shots   0, 1, 2, … of the right pairs

The test is the paired ratio, exp of the mean difference on the same targets, with a bootstrap over
groups of samples that belong together (a map, a clip): samples of one are not independent.
S samples, m images of context, n codes an image.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvm.generate import reads_of
from lvm.model import Transformer
from lvm.objectives.next_code import token_nll
from tokenizer.cli import InputError
from visual_sentences.loader import Reader

POSITIONS = 8192  # positions of one forward pass; logits take 4 bytes × table a position


@torch.inference_mode()
def target_nll(model: Transformer, context: Tensor, target: Tensor) -> Tensor:
    """Return -log p, fp32 [S, n], of each code of target [S, n] after images context [S, m, n].

    In layout none m is at least 1. Softmax over the whole table, as in training.
    """
    reads = reads_of(model)
    device = model.embed.weight.device
    ids = torch.cat([context.flatten(1), target], dim=1).long()
    if reads.layout == "bos":
        ids = torch.cat([ids.new_full((len(ids), 1), reads.vocab.bos), ids], dim=1)
    elif context.shape[1] == 0:
        raise ValueError("a model of layout none predicts no code without an image before it")
    if ids.shape[1] > reads.row_len + (reads.layout == "bos"):
        raise ValueError(
            f"{context.shape[1]} images and a target; a row has {reads.images_per_row}"
        )
    n, step = target.shape[1], max(1, POSITIONS // ids.shape[1])
    out = []
    for part in ids.split(step):
        features = model.features(part[:, :-1].to(device))[:, -n:]
        out.append(token_nll(model.head(features), part[:, -n:].to(device)).cpu())
    return torch.cat(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The prompt experiment: S targets, each with p right and p wrong pairs before its query."""

    right: Tensor  # int64 [S, 2p + 1, n], pairs and query
    wrong: Tensor | None  # the same with pairs of another source; None where there is only one
    target: Tensor  # int64 [S, n]
    tasks: list[str]  # source of each
    keys: list[str]  # key of each target

    @property
    def ids(self) -> list[str]:
        """One of each target: equal where right prompt and target are, code by code."""
        whole = torch.cat([self.right, self.target[:, None]], dim=1).to(torch.int64).numpy()
        return [
            hashlib.sha256(f"{task}\n".encode() + images.tobytes()).hexdigest()[:16]
            for task, images in zip(self.tasks, whole, strict=True)
        ]

    def shots(self, count: int) -> Tensor:
        """Return context [S, 2·count + 1, n]: the last `count` right pairs and the query."""
        return self.right[:, self.right.shape[1] - 1 - 2 * count :]


def find_prompts(reader: Reader, *, split: str, count: int, seed: int) -> Prompts | None:
    """Make about `count` prompts of the longest sentences of all pair sources, evenly.

    Which sentence stands in for the wrong pairs depends on the seed alone; one that shows the
    target's own images is not taken where there is another. Returns None where no sentence has two
    pairs.
    """
    manifest, n = reader.manifest, reader.manifest.codes_per_image
    found: dict[str, list[tuple[Tensor, list[str]]]] = {}
    for i, (name, rows) in enumerate(manifest.rows(split).items()):
        if manifest.sources[i].kind != "pair" or not rows:
            continue
        for row in spread(rows, count):
            read = reader.read(np.array([i]), np.array([row]))
            images = read.tokens[0, : int(read.length[0])].long().view(-1, n)
            starts = (read.starts[0][read.starts[0] >= 0] // n).tolist()
            keys = reader.keys(i, row)
            for a, b in zip(starts, [*starts[1:], len(images)], strict=True):
                found.setdefault(name, []).append((images[a:b], keys[a:b]))
    most = max((len(images) for s in found.values() for images, _ in s), default=0)
    if most < 4:
        return None
    found = {k: [s for s in v if len(s[0]) == most] for k, v in found.items()}
    found = {k: v for k, v in found.items() if v}
    rng = np.random.default_rng(seed)
    each = -(-count // len(found))
    right, wrong, targets, tasks, names = [], [], [], [], []
    for task, sentences in found.items():
        others = [s for other, v in found.items() if other != task for s in v]
        for place in rng.permutation(len(sentences))[:each]:
            images, keys = sentences[place]
            right.append(images[:-1])
            targets.append(images[-1])
            tasks.append(task)
            names.append(keys[-1])
            if others:
                order = rng.permutation(len(others))
                free = [j for j in order if not set(keys[-2:]) & set(others[j][1])]
                other = others[free[0] if free else order[0]][0]
                wrong.append(torch.cat([other[:-2], images[-2:-1]]))
    return Prompts(
        right=torch.stack(right),
        wrong=torch.stack(wrong) if wrong else None,
        target=torch.stack(targets),
        tasks=tasks,
        keys=names,
    )


def does_the_prompt_help(
    model: Transformer, prompts: Prompts, groups: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Return `summarise` of the targets under every kind of context, and each target's own figures.

    Beside the keys of `summarise`: "targets", a list of {"task", "key", "id", "group", "nll":
    {"right", "none", "wrong"}} with the mean -log p of a code.
    """
    pairs = prompts.right.shape[1] // 2
    shots = [target_nll(model, prompts.shots(k), prompts.target) for k in range(pairs + 1)]
    nll = {"right": shots[-1], "none": shots[0]}
    if prompts.wrong is not None:
        nll["wrong"] = target_nll(model, prompts.wrong, prompts.target)
    report = summarise(nll, groups, tasks=prompts.tasks, shots=shots, seed=seed)
    means = {kind: _per_sample(values) for kind, values in nll.items()}
    named = zip(prompts.tasks, prompts.keys, prompts.ids, groups, strict=True)
    report["targets"] = [
        {
            "task": task, "key": key, "id": name, "group": group,
            "nll": {kind: round(float(values[i]), 6) for kind, values in means.items()},
        }
        for i, (task, key, name, group) in enumerate(named)
    ]  # fmt: skip
    return report


def summarise(
    nll: Mapping[str, Tensor],
    groups: Sequence[str],
    *,
    tasks: Sequence[str] = (),
    shots: Sequence[Tensor] = (),
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return perplexities and paired ratios with 95 % bootstrap intervals over groups.

    A perplexity is exp of the mean over all codes, and "lvm" beside it LVM's: exp of the mean over
    the codes of a target, then the mean over targets.

    `nll` has [S] or [S, n] for "right", "wrong", "none" (those that there are), of the same targets
    in the same order; `shots[k]` the same with k pairs; `groups` and `tasks` name each sample's.

        {"perplexity": {"right": {"mean", "low", "high", "lvm", "n"}, …},
         "paired": {"none/right": {"mean", "low", "high"}, "wrong/right": {…}},
         "shots": [{"pairs", "mean", "low", "high", "lvm", "n"}, …],
         "tasks": {name: {the three above}}}

    From a single group there is no interval: low and high are None.
    """
    means = {condition: _per_sample(values) for condition, values in nll.items()}
    curve = [_per_sample(values) for values in shots]
    names = np.asarray(groups)

    def parts(chosen: np.ndarray) -> dict[str, Any]:
        def interval(values: np.ndarray) -> dict[str, float | None]:
            return bootstrap(values[chosen], names[chosen], draws=draws, seed=seed)

        def perplexity(values: np.ndarray) -> dict[str, float | int | None]:
            lvm = float(np.exp(values[chosen]).mean())
            return {**interval(values), "lvm": lvm, "n": int(chosen.sum())}

        kinds = [k for k in ("right", "wrong", "none") if k in means]
        return {
            "perplexity": {k: perplexity(means[k]) for k in kinds},
            "paired": {
                f"{k}/right": interval(means[k] - means["right"])
                for k in ("none", "wrong")
                if {k, "right"} <= means.keys()
            },
            "shots": [{"pairs": k, **perplexity(values)} for k, values in enumerate(curve)],
        }

    labels = np.asarray(tasks)
    return {
        **parts(np.ones(len(names), bool)),
        "tasks": {task: parts(labels == task) for task in dict.fromkeys(tasks)},
    }


def _per_sample(nll: Tensor) -> np.ndarray:
    """Return the mean over the codes of each sample, float64 [S]."""
    return nll.double().reshape(len(nll), -1).mean(1).cpu().numpy()


def bootstrap(
    values: np.ndarray,
    groups: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, float | None]:
    """Return exp of the mean of values [S], and its interval, as `bootstrap_mean`."""
    found = bootstrap_mean(values, groups, weights=weights, draws=draws, seed=seed)
    return {name: None if v is None else float(np.exp(v)) for name, v in found.items()}


def bootstrap_mean(
    values: np.ndarray,
    groups: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, float | None]:
    """Return the mean of values [S] as "mean", "low" and "high", the 95 % percentile interval when
    whole groups are redrawn; from a single group there is none. `weights` [S] are above 0."""
    labels, index = np.unique(groups, return_inverse=True)
    weights = np.ones(len(values)) if weights is None else weights
    mean = float((values * weights).sum() / weights.sum())
    if len(labels) < 2:
        return {"mean": mean, "low": None, "high": None}
    sums = np.bincount(index, weights=values * weights)
    sizes = np.bincount(index, weights=weights)
    even = np.full(len(labels), 1 / len(labels))
    times = np.random.default_rng(seed).multinomial(len(labels), even, size=draws)
    low, high = np.quantile(times @ sums / (times @ sizes), [0.025, 0.975])
    return {"mean": mean, "low": float(low), "high": float(high)}


def group_keys(keys: Sequence[str], pattern: str) -> list[str]:
    """Return the group of each key: the first group of `pattern` in it, or its whole match."""
    if not pattern:
        return list(keys)
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--group-by {pattern!r} is no regular expression: {error}") from error
    found = [rule.search(key) for key in keys]
    if None in found:
        raise InputError(
            f"--group-by {pattern!r} does not match the key {keys[found.index(None)]!r}"
        )
    return [match[1] if rule.groups else match[0] for match in found if match]


def spread(total: int, count: int) -> list[int]:
    """Return `count` of 0 … total-1 (all of them for 0), evenly spread."""
    if not 0 < count < total:
        return list(range(total))
    return [i * total // count for i in range(count)]
