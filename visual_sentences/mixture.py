"""Which row of which source is sample i: arithmetic, so that any run can go on anywhere.

    sample i → epoch e = i div M, slot = shuffle(seed, e)(i mod M)        M slots a virtual epoch
    slot     → source s, offset                                          m_s slots of source s
    draw     d = e · m_s + offset → row = shuffle(seed, s, d div n_s)(d mod n_s)     n_s rows

Every row of a source is used ⌊x⌋ or ⌈x⌉ times, and the state of a run is one number: how many
samples it has used. The number of ranks appears nowhere.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np

from tokenizer.cli import InputError
from visual_sentences.manifest import Manifest
from visual_sentences.sampler import Integers, mix, permute
from visual_sentences.seeds import seeded


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A source's rows and its part of the mixture, by at most one of:

    weight  its share of the tokens of a virtual epoch
    repeat  how often its rows come in one, may be a fraction; "sqrt": √(rows of the largest source
            without a weight / its own), so that sources share in proportion to √rows. It lifts the
            long tail as DeLVM asks for, with the largest source passed once. Neither: 1.
    """

    name: str
    rows: int
    weight: float | None = None
    repeat: float | str | None = None


class Mixture:
    """Sample numbers to (source, row). Sources without rows take no part."""

    def __init__(self, shares: Sequence[Share], *, seed: int) -> None:
        self.shares, self.seed = tuple(shares), seed
        quotas = _quotas(self.shares)
        self.slots = sum(quotas)
        """Samples of a virtual epoch: M."""
        self._counts = np.array(quotas, np.int64)
        self._edges = np.cumsum(self._counts)
        self._rows = np.array([share.rows for share in shares], np.int64)
        self._slot_key = np.uint64(seeded(seed, "slots"))
        self._row_keys = np.array([seeded(seed, "rows", s.name) for s in shares], np.uint64)

    @classmethod
    def of(
        cls, manifest: Manifest, *, split: str, seed: int, mix: Mapping[str, float] | None = None
    ) -> Self:
        """Mix the sources of a manifest by its weights and repeats.

        `mix`, where it names any, replaces those by weights and leaves all other sources out.
        """
        rows = manifest.rows(split)
        if not sum(rows.values()):
            raise InputError(
                f'there are no rows of split "{split}"; this data has '
                f"{', '.join(manifest.splits) or 'none at all'}"
            )
        if not mix:
            shares = [
                Share(name=s.name, rows=rows[s.name], weight=s.weight, repeat=s.repeat)
                for s in manifest.sources
            ]
            return cls(shares, seed=seed)
        for name, weight in mix.items():
            if not rows.get(name):
                raise InputError(
                    f'the mixture names "{name}", which has no rows of split "{split}"; there are '
                    f"{', '.join(name for name, count in rows.items() if count)}"
                )
            if not 0 < weight < math.inf:
                raise InputError(f'the mixture gives "{name}" {weight}; wanted a number above 0')
        return cls(
            [
                Share(name=name, rows=count if name in mix else 0, weight=mix.get(name))
                for name, count in rows.items()
            ],
            seed=seed,
        )

    def counts(self) -> dict[str, int]:
        """Return the slots of each source in a virtual epoch."""
        return {s.name: int(n) for s, n in zip(self.shares, self._counts, strict=True)}

    def rows(self, samples: Integers) -> tuple[Integers, Integers]:
        """Return the source and the row in it, both int64, of each sample number."""
        samples = np.asarray(samples, np.int64)
        epoch, place = np.divmod(samples, self.slots)
        with np.errstate(over="ignore"):
            slot = permute(place, self.slots, mix(self._slot_key + epoch.astype(np.uint64)))
            source = np.searchsorted(self._edges, slot, side="right")
            count, rows = self._counts[source], self._rows[source]
            draw = epoch * count + slot - (self._edges[source] - count)
            turn, place = np.divmod(draw, rows)
            keys = mix(self._row_keys[source] + turn.astype(np.uint64))
            return source, permute(place, rows, keys)


def _quotas(shares: Sequence[Share]) -> list[int]:
    """Return m_s: exact shares, rounded by largest remainder, at least 1 where there are rows."""
    used = [share for share in shares if share.rows]
    free = [share for share in used if share.weight is None]
    largest = max((share.rows for share in free), default=0)
    exact: dict[str, Fraction] = {}
    for share in free:
        times = share.repeat if share.repeat is not None else 1
        times = math.sqrt(largest / share.rows) if times == "sqrt" else float(times)
        exact[share.name] = Fraction(times) * share.rows
    weights = {s.name: Fraction(s.weight) for s in used if s.weight is not None}
    total = sum(weights.values(), Fraction())
    if free and total >= 1:
        raise InputError(
            f"the weights add up to {float(total):g}, which leaves nothing for "
            f"{', '.join(s.name for s in free)}; wanted a sum below 1"
        )
    if free:
        whole = sum(exact.values(), Fraction()) / (1 - total)
        exact |= {name: weight * whole for name, weight in weights.items()}
    else:
        whole = Fraction(sum(share.rows for share in used))
        exact |= {name: weight / total * whole for name, weight in weights.items()}
    scale = max(1, math.ceil(1 / min(exact.values())))  # a longer epoch, lest a source have no slot
    quotas = [exact.get(share.name, Fraction()) * scale for share in shares]
    slots = [math.floor(quota) for quota in quotas]
    left = round(sum(quotas, Fraction())) - sum(slots)
    by_remainder = sorted(range(len(quotas)), key=lambda s: slots[s] - quotas[s])
    for s in by_remainder[:left]:
        slots[s] += 1
    return slots
