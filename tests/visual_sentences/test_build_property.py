"""Random mixtures over random good and bad files: nothing is lost, doubled or mixed."""

import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visual_sentences.build import Build, build
from visual_sentences.manifest import Manifest
from visual_sentences.shards import open_shard

CODES = 64
KINDS = {
    "image": 1,
    "category": 1,
    "colorize": 1,
    "inpaint": 1,
    "pair": 2,
    "style": 2,
    "annotated": 3,
}


@pytest.fixture(scope="module")
def pictures(write_images: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a, b and c with 18 images of equal names each, in 3 groups."""
    root = tmp_path_factory.mktemp("pictures")
    for seed, folder in enumerate("abc"):
        write_images(root / folder, [f"{g}/{i}.png" for g in range(3) for i in range(6)], seed=seed)
    return root


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    sources = []
    for number in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from([*KINDS, "video", "orbit", "annotated_video"]))
        sources.append(
            {
                "name": f"s{number}",
                "kind": kind,
                "augment": draw(st.integers(1, 3)),
                "val": draw(st.sampled_from([0, 0.3])),
                "stride": draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)),
                "classes": draw(st.integers(1, 3)),
            }
        )
    return {
        "seed": draw(st.integers(0, 99)),
        "images": draw(st.sampled_from([6, 7, 8, 16])),
        "shard_rows": draw(st.integers(1, 4)),
        "sources": sources,
        "bad": draw(st.sets(st.tuples(st.sampled_from("abc"), st.integers(0, 17)), max_size=6)),
        "gone": draw(st.sets(st.tuples(st.sampled_from("abc"), st.integers(0, 17)), max_size=3)),
    }


def spec_of(mixture: dict[str, Any]) -> str:
    lines = [f"seed = {mixture['seed']}", f"row_len = {CODES * mixture['images']}"]
    for source in mixture["sources"]:
        kind = source["kind"]
        lines += ["[[source]]", f'name = "{source["name"]}"', f'kind = "{kind}"']
        lines += [f"augment = {source['augment']}"]
        if source["val"]:
            lines += [f"splits = {{val = {source['val']}}}"]
        if kind in ("pair", "style"):
            lines += ['inputs = "a"', 'targets = "b"']
        else:
            lines += ['path = "a"']
        if kind.startswith("annotated"):
            extra = ', more = "c"' if kind == "annotated" else ""
            lines += [f'annotations = {{note = "b"{extra}}}']
        if kind in ("video", "orbit", "annotated_video"):
            lines += [f"stride = {source['stride']}"]
        if kind == "category":
            lines += [f"classes = {source['classes']}"]
    return "\n".join(lines)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(mixture=mixtures())
def test_every_good_item_is_in_one_sentence_of_each_pass(
    pictures: Path, tok_dir: Path, mixture: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(pictures, root, dirs_exist_ok=True)
        for name, number in mixture["bad"]:
            (root / name / f"{number // 6}/{number % 6}.png").write_text("not a picture")
        for name, number in mixture["gone"]:
            (root / name / f"{number // 6}/{number % 6}.png").unlink()
        (root / "mix.toml").write_text(spec_of(mixture))
        command = Build(
            spec=root / "mix.toml",
            tokenizer=tok_dir,
            out=root / "out",
            workers=1,
            shard_rows=mixture["shard_rows"],
        )
        manifest = build(command, log=lambda line: None)
        assert manifest is not None
        for source in mixture["sources"]:
            check(manifest, root / "out", source, mixture)


def check(manifest: Manifest, out: Path, source: dict[str, Any], mixture: dict[str, Any]) -> None:
    spoilt = mixture["bad"] | mixture["gone"]
    kind = source["kind"]
    sentences, splits = [], defaultdict(set)
    for entry in (s for s in manifest.shards if s.source == source["name"]):
        shard = open_shard(out / entry.name)
        assert (shard.metadata["source"], shard.metadata["split"]) == (entry.source, entry.split)
        for row in range(shard.rows):
            keys = shard.keys(row)
            edges = [*(shard.starts(row) // CODES).tolist(), shard.length[row] // CODES]
            assert edges[0] == 0 and edges[-1] == len(keys) <= mixture["images"]
            sentences += [keys[a:b] for a, b in pairwise(edges)]
            for key in keys:
                splits[stem_of(key)].add(entry.split)
    assert all(len(found) == 1 for found in splits.values()), "a stem in two splits"
    counts = Counter(key for keys in sentences for key in keys)
    folders = {"pair": "ab", "style": "ab", "annotated": "abc", "annotated_video": "ab"}
    roles = folders.get(kind, "a")
    whole = {n for n in range(18) if not any((role, n) in spoilt for role in roles)}
    found = {n for n in range(18) if f"{n // 6}/{n % 6}" in {stem_of(key) for key in counts}}
    if kind in KINDS:
        assert found == whole
        width = 2 if kind in ("colorize", "inpaint") else KINDS[kind]
        assert sum(counts.values()) == len(whole) * width * source["augment"]
        # Two copies are equal only where both draw the same cut or mask, which is all but
        # impossible for a cut; the picture as it is comes once in each role.
        plain = Counter(key for key in counts.elements() if "|" not in key)
        assert set(plain.values()) <= {1}
    else:
        assert found <= whole
        # Of a clip with bad frames a pass may draw fewer than two good ones.
        clean = {clip for clip in range(3) if whole >= set(range(6 * clip, 6 * clip + 6))}
        usable = {clip for clip in range(3) if len(whole & set(range(6 * clip, 6 * clip + 6))) > 1}
        assert clean <= {int(stem_of(keys[0])[0]) for keys in sentences} <= usable
        assert all(len({stem_of(key)[0] for key in keys}) == 1 for keys in sentences)
    entry = next(s for s in manifest.sources if s.name == source["name"])
    if kind in KINDS:
        assert entry.inputs == entry.good + sum(entry.bad.values())


def stem_of(key: str) -> str:
    found = re.fullmatch(r"(?:\w+/)?(\d/\d)\.png(?:\|.*)?", key)
    assert found, key
    return found[1]
