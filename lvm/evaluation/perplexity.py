"""Perplexity of held-out rows, by source, kind and place in the sentence.

In two definitions: exp of the mean over all codes, and LVM's, exp of the mean of each image given
those before it, then the mean over images. n codes an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvm.evaluation.in_context import POSITIONS
from lvm.generate import reads_of
from lvm.mask import attention_mask
from lvm.model import Transformer
from lvm.objectives.next_code import token_nll
from tokenizer.cli import Progress
from visual_sentences.batch import IGNORE
from visual_sentences.loader import Reader
from visual_sentences.manifest import Manifest
from visual_sentences.pack import Rows, pack


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageNLL:
    """Sums over the codes of each image of a corpus, one entry an image."""

    source: np.ndarray  # int, index into the manifest's sources
    row: np.ndarray  # int, its row among those of the source and split
    position: np.ndarray  # int, place in its sentence
    nll: np.ndarray  # float64, sum over its predicted codes
    codes: np.ndarray  # int, how many those are


@torch.inference_mode()
def code_nll(model: Transformer, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return -log p of each stored code given its row so far, fp32 [B, T], and where there is one.

    Codes that the layout does not predict (the first of a document in layout none) and padding have
    none.
    """
    reads = reads_of(model)
    batch = pack(rows, layout=reads.layout, vocab=reads.vocab, whole_rows=reads.whole_rows)
    ids = batch.ids.clamp_max(model.config.vocab_size - 1)  # pad, where a table has no room for it
    logits = model(ids, pos=batch.pos, mask=attention_mask(batch.doc, batch.block))
    nll, known = token_nll(logits, batch.labels), batch.labels != IGNORE
    if reads.layout == "none":  # the label of a position is the code of the next
        nll, known = nll.roll(1, dims=1), known.roll(1, dims=1)
    return nll, known


def image_nll(
    model: Transformer, reader: Reader, places: Sequence[tuple[int, int]], *, progress: Progress
) -> ImageNLL:
    """Evaluate the rows at `places`, pairs of source and row."""
    n, device = reads_of(model).codes_per_image, model.embed.weight.device
    step = max(1, POSITIONS // reader.manifest.row_len)
    parts: list[list[np.ndarray]] = []
    for first in range(0, len(places), step):
        sources, numbers = np.array(places[first : first + step], np.int64).T
        rows = reader.read(sources, numbers)
        nll, known = (x.unflatten(1, (-1, n)).cpu() for x in code_nll(model, rows.to(device)))
        codes = known.sum(-1).numpy()  # [B, images]
        index = np.arange(codes.shape[1])
        starts = np.zeros_like(codes)
        for i, begin in enumerate(rows.starts.numpy()):
            begin = begin[begin >= 0] // n
            starts[i, begin] = begin
        position = index - np.maximum.accumulate(starts, axis=1)
        there = codes > 0
        parts.append([
            np.broadcast_to(sources[:, None], codes.shape)[there],
            np.broadcast_to(numbers[:, None], codes.shape)[there],
            position[there],
            nll.double().sum(-1).numpy()[there],
            codes[there],
        ])  # fmt: skip
        progress.update(len(sources))
    source, row, position, total, counts = map(np.concatenate, zip(*parts, strict=True))
    return ImageNLL(source=source, row=row, position=position, nll=total, codes=counts)


def corpus(found: ImageNLL, manifest: Manifest) -> dict[str, Any]:
    """Return perplexities of all, by source, by kind and by place in the sentence."""

    def figures(chosen: np.ndarray) -> dict[str, float | int]:
        nll, codes = found.nll[chosen], found.codes[chosen]
        return {
            "perplexity": float(np.exp(nll.sum() / codes.sum())),
            "perplexity_lvm": float(np.exp(nll / codes).mean()),
            "codes": int(codes.sum()),
            "images": len(codes),
        }

    def positions(chosen: np.ndarray) -> list[dict[str, float | int]]:
        places = np.unique(found.position[chosen])
        return [{"position": int(p), **figures(chosen & (found.position == p))} for p in places]

    every = np.ones(len(found.nll), bool)
    sources, kinds = {}, {}
    for i in np.unique(found.source):
        chosen, entry = found.source == i, manifest.sources[i]
        sources[entry.name] = {
            "kind": entry.kind, **figures(chosen), "positions": positions(chosen)
        }  # fmt: skip
    kind_of = np.array([entry.kind for entry in manifest.sources])[found.source]
    for kind in sorted(set(kind_of.tolist())):
        kinds[kind] = figures(kind_of == kind)
    return {
        "all": figures(every), "sources": sources, "kinds": kinds, "positions": positions(every)
    }  # fmt: skip


def row_sums(found: ImageNLL, manifest: Manifest) -> dict[str, list[Any]]:
    """Return the sums of each row, one list a column: "source" by name, "row", "nll", "codes"."""
    where = np.stack([found.source, found.row])
    places, index = np.unique(where, axis=1, return_inverse=True)
    sums = np.bincount(index, weights=found.nll)
    return {
        "source": [manifest.sources[i].name for i in places[0]],
        "row": places[1].tolist(),
        "nll": [round(float(v), 4) for v in sums],
        "codes": np.bincount(index, weights=found.codes).astype(int).tolist(),
    }
