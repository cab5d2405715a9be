"""The mask rule, its interval form, and the check that no label can be read."""

import pytest
import torch

from kernels.mask import densify, is_exact
from lvm.mask import allowed, attention_mask, intervals, leaks
from visual_sentences.pack import Rows, pack
from visual_sentences.vocab import Vocab


def slow_rule(doc, block, island):
    n = len(doc)
    return [
        [
            int(
                doc[q] == doc[k]
                and block[k] <= block[q]
                and (island[k] == 0 or island[k] == island[q])
            )
            for k in range(n)
        ]
        for q in range(n)
    ]


def test_the_drawn_examples():
    doc = torch.tensor([[0, 0, 0, 1, 1]])
    assert allowed(doc, torch.arange(5)[None])[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    prefix = allowed(torch.zeros(1, 4, dtype=torch.int), torch.tensor([[0, 0, 2, 3]]))
    assert prefix[0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_the_rule_equals_its_sentence_on_random_vectors(rng):
    doc, block, island = (torch.randint(0, 3, (4, 17), generator=rng) for _ in range(3))
    got = allowed(doc, block, island)
    for row in range(4):
        want = slow_rule(doc[row].tolist(), block[row].tolist(), island[row].tolist())
        assert got[row].int().tolist() == want


def test_the_rule_is_transitive(rng):
    doc, block, island = (torch.randint(0, 3, (8, 20), generator=rng) for _ in range(3))
    reads = allowed(doc, block, island).float()
    through_another = (reads @ reads) > 0
    assert not (through_another & (reads == 0)).any()


@pytest.mark.parametrize("kind", ["causal", "blocks", "prefix", "full"])
def test_intervals_are_the_rule(kind, rng):
    cuts = torch.rand(6, 50, generator=rng) < 0.1
    doc = cuts.cumsum(1)
    index = torch.arange(50).expand(6, 50)
    block = {
        "causal": index,
        "blocks": index // 7,
        "prefix": torch.where(index < 9, 0, index),
        "full": torch.zeros_like(index),
    }[kind]
    lo, hi = intervals(doc, block)
    mask = attention_mask(doc, block)
    assert torch.equal(densify(mask, 50), allowed(doc, block))
    assert lo.dtype == hi.dtype == torch.int32 and (hi > lo).all()


def test_islands_take_the_dense_form():
    doc, block = torch.zeros(1, 4, dtype=torch.int), torch.zeros(1, 4, dtype=torch.int)
    mask = attention_mask(doc, block, torch.tensor([[0, 1, 1, 2]]))
    assert mask.lo is None
    assert mask.dense[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1]]


def test_a_label_that_can_be_read_is_counted():
    ids, doc = torch.tensor([[9, 4, 5, 9, 6]]), torch.tensor([[0, 0, 0, 1, 1]])
    labels = torch.tensor([[4, 5, 7, 6, 8]])
    index = torch.arange(5)[None]
    assert leaks(allowed(doc, index), ids, labels, doc, ignore=-100) == 0
    pairs = allowed(doc, index // 2)  # positions 0 and 1 read each other
    assert leaks(pairs, ids, labels, doc, ignore=-100) == 1
    everything = allowed(doc, index * 0)
    assert leaks(everything, ids, labels, doc, ignore=-100) == 3
    with pytest.raises(AssertionError, match="not the next inputs"):
        leaks(everything, ids, labels + 1, doc, ignore=-100)


@pytest.mark.parametrize(("per_image", "exact"), [(128, True), (256, True), (64, False)])
@pytest.mark.parametrize("whole_rows", [False, True])
def test_packed_batches_say_rightly_that_they_are_exact(per_image, exact, whole_rows):
    """Rows of four images: one document, two, and one and padding."""
    vocab = Vocab(codes=10, codes_per_image=per_image)
    n = per_image
    rows = Rows(
        tokens=torch.zeros(3, 4 * n, dtype=torch.int32),
        starts=torch.tensor([[0, -1], [0, n], [0, -1]], dtype=torch.int32),
        length=torch.tensor([4 * n, 4 * n, 3 * n], dtype=torch.int32),
        source=torch.zeros(3, dtype=torch.int32),
        row=torch.zeros(3, dtype=torch.int64),
    )
    for layout in ("bos", "none"):
        batch = pack(rows, layout=layout, vocab=vocab, whole_rows=whole_rows)
        assert batch.exact is exact
        assert batch.split(2)[1].exact is exact and batch.to("cpu").exact is exact
        assert bool(is_exact(*intervals(batch.doc, batch.block))) is exact
        mask = attention_mask(batch.doc, batch.block, exact=batch.exact)
        assert mask.exact is exact
