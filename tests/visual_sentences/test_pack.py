"""`pack` against a slow reference that goes document by document, position by position."""

import pytest
import torch

from visual_sentences.batch import IGNORE, Batch
from visual_sentences.pack import Layout, Rows, pack
from visual_sentences.vocab import Vocab

VOCAB = Vocab(codes=50, codes_per_image=2)
WIDTH = 16
LAYOUTS: list[Layout] = ["bos", "none"]


def make_rows(documents: list[list[int]], *, seed: int = 0) -> Rows:
    """Make one row for each list of document lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(documents), WIDTH, dtype=torch.int32)
    starts = torch.full((len(documents), WIDTH // 2), -1, dtype=torch.int32)
    length = torch.tensor([sum(row) for row in documents], dtype=torch.int32)
    for i, row in enumerate(documents):
        codes = torch.randint(0, VOCAB.codes, (sum(row),), generator=generator, dtype=torch.int32)
        tokens[i, : len(codes)] = codes
        edges = torch.tensor([0, *row]).cumsum(0)[:-1]
        starts[i, : len(edges)] = edges
    source = torch.arange(len(documents), dtype=torch.int32)
    return Rows(
        tokens=tokens.to(torch.uint16),
        starts=starts,
        length=length,
        source=source,
        row=torch.zeros_like(source).long(),
    )


def slow(rows: Rows, layout: Layout, *, whole_rows: bool) -> dict[str, list[list[int]]]:
    out: dict[str, list[list[int]]] = {"ids": [], "labels": [], "doc": [], "block": [], "pos": []}
    for tokens, starts, length in zip(
        rows.tokens.tolist(), rows.starts.tolist(), rows.length.tolist(), strict=True
    ):
        begins = [0] if whole_rows else [s for s in starts if s >= 0]
        row: dict[str, list[int]] = {name: [] for name in out}
        for number, (begin, end) in enumerate(zip(begins, [*begins[1:], length], strict=True)):
            codes = tokens[begin:end]
            if layout == "bos":
                row["ids"] += [VOCAB.bos, *codes[:-1]]
                row["labels"] += codes
            else:
                row["ids"] += codes
                row["labels"] += [*codes[1:], IGNORE]
            row["doc"] += [number] * len(codes)
            row["pos"] += range(len(codes))
        rest = WIDTH - length
        row["ids"] += [VOCAB.pad] * rest
        row["labels"] += [IGNORE] * rest
        row["doc"] += [len(begins)] * rest
        row["pos"] += range(rest)
        row["block"] += range(WIDTH)
        for name in out:
            out[name].append(row[name])
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("whole_rows", [False, True])
def test_pack_equals_the_reference(layout: Layout, whole_rows: bool) -> None:
    rows = make_rows([[2, 4, 2], [16], [4, 4, 4, 4], [2] * 8, [2], [6, 8]])
    batch = pack(rows, layout=layout, vocab=VOCAB, whole_rows=whole_rows)
    for name, wanted in slow(rows, layout, whole_rows=whole_rows).items():
        assert getattr(batch, name).tolist() == wanted, name
    assert batch.island is None
    assert batch.source.tolist() == rows.source.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_document_is_the_same_as_alone(layout: Layout) -> None:
    packed = make_rows([[6, 4, 4]])
    batch = pack(packed, layout=layout, vocab=VOCAB)
    for begin, size in ((0, 6), (6, 4), (10, 4)):
        alone = make_rows([[size]])
        alone.tokens[0, :size] = packed.tokens[0, begin : begin + size]
        single = pack(alone, layout=layout, vocab=VOCAB)
        for name in ("ids", "labels", "pos"):
            found = getattr(batch, name)[0, begin : begin + size]
            assert found.tolist() == getattr(single, name)[0, :size].tolist(), name


def test_the_layouts_are_as_drawn() -> None:
    rows = Rows(
        tokens=torch.tensor([[10, 11, 12, 20, 21, 0]], dtype=torch.int32),
        starts=torch.tensor([[0, 3, -1]], dtype=torch.int32),
        length=torch.tensor([5], dtype=torch.int32),
        source=torch.zeros(1, dtype=torch.int32),
        row=torch.zeros(1, dtype=torch.int64),
    )
    b, p, none = VOCAB.bos, VOCAB.pad, IGNORE
    bos = pack(rows, layout="bos", vocab=VOCAB)
    assert bos.ids.tolist() == [[b, 10, 11, b, 20, p]]
    assert bos.labels.tolist() == [[10, 11, 12, 20, 21, none]]
    shifted = pack(rows, layout="none", vocab=VOCAB)
    assert shifted.ids.tolist() == [[10, 11, 12, 20, 21, p]]
    assert shifted.labels.tolist() == [[11, 12, none, 21, none, none]]
    for batch in (bos, shifted):
        assert batch.doc.tolist() == [[0, 0, 0, 1, 1, 2]]
        assert batch.pos.tolist() == [[0, 1, 2, 0, 1, 0]]


def test_code_zero_is_a_label_and_padding_is_none() -> None:
    """DeLVM's own collation never predicts code 0; ours must, and must not learn padding."""
    rows = make_rows([[4]])
    rows.tokens[0, :4] = 0
    labels = pack(rows, layout="bos", vocab=VOCAB).labels[0]
    assert labels[:4].tolist() == [0] * 4
    assert (labels[4:] == IGNORE).all()


def test_an_empty_row_is_all_padding() -> None:
    rows = make_rows([[]])
    rows.starts[:] = -1
    batch = pack(rows, layout="bos", vocab=VOCAB)
    assert (batch.labels == IGNORE).all()
    assert (batch.ids == VOCAB.pad).all()


@pytest.mark.parametrize("starts", [[2, 4, -1], [0, 4, 4], [0, -1, 4], [0, 12, -1]])
def test_documents_out_of_order_are_refused(starts: list[int]) -> None:
    rows = make_rows([[12]])
    rows.starts[0, :3] = torch.tensor(starts, dtype=torch.int32)
    with pytest.raises(AssertionError):
        pack(rows, layout="bos", vocab=VOCAB)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match='wanted "bos" or "none"'):
        pack(make_rows([[4]]), layout="eos", vocab=VOCAB)  # type: ignore[arg-type]


def test_split_covers_the_batch_with_views() -> None:
    batch = pack(make_rows([[4], [8], [2, 2]]), layout="bos", vocab=VOCAB)
    parts = batch.split(2)
    assert [part.rows for part in parts] == [2, 1]
    assert torch.cat([part.labels for part in parts]).equal(batch.labels)
    assert parts[1].ids.untyped_storage().data_ptr() == batch.ids.untyped_storage().data_ptr()
    assert (batch.rows, batch.tokens) == (3, 3 * WIDTH)


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = pack(make_rows([[4]]), layout="bos", vocab=VOCAB)
    moved: Batch = batch.to("meta")
    assert {t.device.type for t in (moved.ids, moved.labels, moved.doc, moved.source)} == {"meta"}


def test_the_table_of_8192_codes_is_8320_wide() -> None:
    vocab = Vocab(8192, 256)
    assert (vocab.bos, vocab.eos, vocab.pad, vocab.size) == (8192, 8193, 8194, 8320)
    assert Vocab(125, 1).size == 128  # 125 codes and 3 specials fill it exactly
    assert Vocab(126, 1).size == 256
