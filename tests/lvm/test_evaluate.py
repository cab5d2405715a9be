"""Perplexities and the prompt experiment against slow loops; the bootstrap against resampling; the
command that measures them and draws answers."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenizer
from lvm import evaluate as command
from lvm import export
from lvm.evaluate import evaluate, summarise, target_nll
from lvm.evaluation.in_context import bootstrap, find_prompts, group_keys, spread
from lvm.generate import Sampling
from tokenizer.cli import InputError
from visual_sentences.loader import Reader
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.shards import write_shard

K, N, ROW = 40, 4, 24  # codes, codes an image, codes a row: those of make_model's default
# Images of the sentences of each row, by source: rows of up to 6 images.
ROWS = {
    ("plus", "pair"): [[6], [6], [4], [6]],
    ("minus", "pair"): [[6], [6], [2, 4], [6], [6]],
    ("photos", "image"): [[1, 1, 1], [1, 1, 1, 1, 1, 1]],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data"), "t" * 64)


def write(folder: Path, codes_of: str) -> Path:
    """Write a folder as the build does: split val alone, random codes, keys by map."""
    rng = np.random.default_rng(0)
    sources, shards = [], []
    for (name, kind), rows in ROWS.items():
        counts = [sum(row) for row in rows]
        tokens = np.zeros((len(rows), ROW), np.uint16)
        keys: list[list[str]] = []
        for i, count in enumerate(counts):
            tokens[i, : count * N] = rng.integers(0, K, count * N)
            roles = ("inputs", "targets") if kind == "pair" else ("photos", "photos")
            keys.append([f"{roles[j % 2]}/M{i % 3}-0/{i}{j // 2}.png" for j in range(count)])
        file = f"{name}-val-00000.arrow"
        written = write_shard(
            folder / file,
            tokens=tokens,
            docs=[[N * sum(row[:j]) for j in range(len(row))] for row in rows],
            length=np.array(counts, np.int32) * N,
            keys=keys,
            metadata={"tokenizer": codes_of},
        )
        shards.append(
            ShardEntry(
                name=file, source=name, split="val", rows=len(rows),
                documents=sum(map(len, rows)), images=sum(counts), bytes=written.bytes,
                sha256=written.sha256, offset=written.offset,
            )
        )  # fmt: skip
        sources.append(
            SourceEntry(
                name=name, kind=kind, weight=None, repeat=None, preprocess="squash", license="",
                note="", inputs=9, good=9, bad={},
            )
        )  # fmt: skip
    Manifest(
        tokenizer=codes_of, codebook_size=K, codes_per_image=N, image_size=8, row_len=ROW, seed=0,
        sources=tuple(sources), shards=tuple(shards),
    ).save(folder)  # fmt: skip
    return folder


def sentences(folder: Path):
    """Every sentence as (source, images [m, N]), read row by row."""
    manifest = Manifest.load(folder)
    reader = Reader(folder, manifest, split="val", random=False)
    for i, ((name, _), rows) in enumerate(ROWS.items()):
        for r, row in enumerate(rows):
            tokens = reader.read(np.array([i]), np.array([r])).tokens[0].long().view(-1, N)
            for j, count in enumerate(row):
                yield name, tokens[sum(row[:j]) :][:count]


def slow_nll(model, images: torch.Tensor) -> list[list[float]]:
    """-log p of every code of a sentence that the layout predicts, a forward pass a code."""
    reads, codes, out = model.reads, images.flatten().tolist(), []
    for i, code in enumerate(codes):
        before = ([reads.vocab.bos] if reads.layout == "bos" else []) + codes[:i]
        if before:
            with torch.no_grad():
                logp = model(torch.tensor([before]))[0, -1].log_softmax(-1)
            out.append((i // N, -float(logp[code])))
    return [[v for place, v in out if place == j] for j in range(len(images))]


@pytest.mark.parametrize("layout", ["bos", "none"])
def test_perplexities_equal_a_slow_loop(make_model, data, layout):
    model = make_model(layout=layout)
    whole = evaluate(model, data, prompts=0)
    report, sums = whole["corpus"], whole["rows"]
    assert sum(sums["codes"]) == report["all"]["codes"]
    # Four decimals of each row are kept.
    total = math.exp(sum(sums["nll"]) / sum(sums["codes"]))
    assert total == pytest.approx(report["all"]["perplexity"], rel=1e-5)
    places = [(name, r) for (name, _), every in ROWS.items() for r in range(len(every))]
    assert list(zip(sums["source"], sums["row"], strict=True)) == places
    rows = [
        (name, place, nll)
        for name, images in sentences(data)
        for place, nll in enumerate(slow_nll(model, images))
        if nll
    ]

    def check(found, chosen):
        every = [v for *_, nll in chosen for v in nll]
        by_image = [math.exp(np.mean(nll)) for *_, nll in chosen]
        # fp32 sums in another order.
        assert found["perplexity"] == pytest.approx(math.exp(np.mean(every)), rel=1e-4)
        assert found["perplexity_lvm"] == pytest.approx(np.mean(by_image), rel=1e-4)
        assert (found["codes"], found["images"]) == (len(every), len(chosen))

    check(report["all"], rows)
    assert list(report["sources"]) == ["plus", "minus", "photos"]
    for name, found in report["sources"].items():
        check(found, [r for r in rows if r[0] == name])
        for entry in found["positions"]:
            place = entry["position"]
            check(entry, [r for r in rows if r[0] == name and r[1] == place])
    check(report["kinds"]["pair"], [r for r in rows if r[0] != "photos"])
    check(report["kinds"]["image"], [r for r in rows if r[0] == "photos"])
    for entry in report["positions"]:
        check(entry, [r for r in rows if r[1] == entry["position"]])
    assert len(report["positions"]) == 6


@pytest.mark.parametrize(("layout", "qk_norm"), [("bos", False), ("none", False), ("bos", True)])
def test_perplexities_equal_a_plain_loop_over_transformers_logits(
    make_model, data, tmp_path, layout, qk_norm
):
    """Of whole rows and of targets, in both definitions; LVM's prompts have no bos."""
    transformers = pytest.importorskip("transformers", reason="the oracle; in the extra dev")
    model = make_model(layout=layout, qk_norm=qk_norm)
    export.write(model, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")

    def nll(images: torch.Tensor) -> list[np.ndarray]:
        """-log p of the codes of each image, a whole sentence at a time."""
        codes = images.flatten()
        ids = torch.cat([torch.tensor([K]), codes])[None] if layout == "bos" else codes[None]
        with torch.no_grad():
            logp = theirs(ids).logits[0].double().log_softmax(-1)
        known = codes if layout == "bos" else codes[1:]
        found = -logp[: len(known)].gather(1, known[:, None])[:, 0].numpy()
        found = found if layout == "bos" else np.concatenate([[np.nan], found])
        return [part[~np.isnan(part)] for part in found.reshape(-1, N)]

    report = evaluate(model, data, prompts=100)
    every = [part for _, images in sentences(data) for part in nll(images)]
    found = report["corpus"]["all"]
    # fp32 logits of two programs; the bound of the issue.
    assert found["perplexity"] == pytest.approx(np.exp(np.concatenate(every).mean()), rel=1e-5)
    assert found["perplexity_lvm"] == pytest.approx(
        np.mean([np.exp(part.mean()) for part in every]), rel=1e-5
    )
    prompts = find_prompts(reader_of(data), split="val", count=100, seed=0)
    for kind, context in (("right", prompts.right), ("none", prompts.shots(0))):
        last = [
            nll(torch.cat([c, t[None]]))[-1]
            for c, t in zip(context, prompts.target, strict=True)
        ]  # fmt: skip
        figures = report["perplexity"][kind]
        assert figures["mean"] == pytest.approx(np.exp(np.mean(last)), rel=1e-5)
        assert figures["lvm"] == pytest.approx(np.mean([np.exp(x.mean()) for x in last]), rel=1e-5)


def test_rows_of_lvms_release_are_one_document(make_model, data):
    model = make_model(layout="none", whole_rows=True)
    found = evaluate(model, data, prompts=0)["corpus"]["sources"]["photos"]
    assert (
        found["codes"] == 9 * N - 2
    )  # nine images in two rows: two codes have nothing before them


def test_a_table_without_specials_is_evaluated(make_model, data):
    model = make_model(layout="none", vocab_size=K)
    assert evaluate(model, data, prompts=0)["corpus"]["all"]["images"] > 0


@pytest.mark.parametrize(("layout", "least"), [("bos", 0), ("none", 1)])
def test_target_nll_equals_a_slow_loop(make_model, rng, layout, least):
    model = make_model(layout=layout)
    for m in (least, 3, 5):
        images = torch.randint(0, K, (3, m + 1, N), generator=rng)
        found = target_nll(model, images[:, :-1], images[:, -1])
        wanted = torch.tensor([slow_nll(model, one)[-1] for one in images])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_target_nll_is_the_same_in_any_batch(make_model, rng, monkeypatch):
    model = make_model()
    images = torch.randint(0, K, (7, 4, N), generator=rng)
    whole = target_nll(model, images[:, :-1], images[:, -1])
    monkeypatch.setattr("lvm.evaluation.in_context.POSITIONS", 40)  # two rows a pass
    parts = target_nll(model, images[:, :-1], images[:, -1])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_target_nll_refuses_what_the_model_cannot_read(make_model):
    target = torch.zeros(1, N).long()
    with pytest.raises(ValueError, match="no code without an image"):
        target_nll(make_model(layout="none"), torch.zeros(1, 0, N).long(), target)
    with pytest.raises(ValueError, match="a row has 6"):
        target_nll(make_model(), torch.zeros(1, 6, N).long(), target)


def reader_of(folder: Path) -> Reader:
    return Reader(folder, Manifest.load(folder), split="val", random=False)


def test_prompts_are_the_longest_pair_sentences(data):
    found = find_prompts(reader_of(data), split="val", count=100, seed=0)
    full = [(name, images) for name, images in sentences(data) if len(images) == 6]
    assert found.tasks.count("plus") == 3
    assert found.tasks.count("minus") == 4
    for right, wrong, target, task in zip(
        found.right, found.wrong, found.target, found.tasks, strict=True
    ):
        own = torch.cat([right, target[None]])
        assert sum(torch.equal(own, images) for name, images in full if name == task) == 1
        assert torch.equal(wrong[-1], right[-1])  # the same query
        others = [images for name, images in full if name != task]
        assert sum(torch.equal(wrong[:4], images[:4]) for images in others) == 1
    assert all(key.startswith("targets/") for key in found.keys)
    assert [found.shots(k).shape[1] for k in (0, 1, 2)] == [1, 3, 5]
    assert torch.equal(found.shots(1), found.right[:, 2:])


def test_prompts_depend_on_the_seed_alone(data):
    def made(seed):
        return find_prompts(reader_of(data), split="val", count=4, seed=seed)

    first, again, other = made(0), made(0), made(1)
    assert torch.equal(first.right, again.right)
    assert torch.equal(first.wrong, again.wrong)
    assert len(first.tasks) == 4
    assert not torch.equal(first.wrong, other.wrong)


def test_a_wrong_prompt_does_not_show_the_query(data):
    """Sources of one data set share their inputs, so another task may show the very same frame."""
    reader = reader_of(data)
    for seed in range(5):
        found = find_prompts(reader, split="val", count=100, seed=seed)
        for i, (wrong, task) in enumerate(zip(found.wrong, found.tasks, strict=True)):
            other = {"plus": 1, "minus": 0}[task]
            for r in range(len(list(ROWS.values())[other])):
                row = reader.read(np.array([other]), np.array([r])).tokens[0].long().view(-1, N)
                if torch.equal(row[:4], wrong[:4]):
                    assert found.keys[i] not in reader.keys(other, r)


def test_the_report_of_a_prompt_experiment_has_the_promised_form(make_model, data, tmp_path):
    model = make_model(tokenizer="t" * 64)
    report = evaluate(model, data, group_by=r"/(M\d)-")
    assert set(report) == {
        "corpus", "rows", "perplexity", "paired", "shots", "tasks", "targets"
    }  # fmt: skip
    assert list(report["perplexity"]) == ["right", "wrong", "none"]
    for figures in report["perplexity"].values():
        assert set(figures) == {"mean", "low", "high", "lvm", "n"}
        assert figures["n"] == 7
        assert figures["lvm"] >= figures["mean"]  # exp is convex
        assert figures["low"] <= figures["mean"] <= figures["high"]
    assert list(report["paired"]) == ["none/right", "wrong/right"]
    assert [s["pairs"] for s in report["shots"]] == [0, 1, 2]
    means = {k: v["mean"] for k, v in report["perplexity"].items()}
    assert report["shots"][0]["mean"] == means["none"]
    assert report["shots"][2]["mean"] == means["right"]
    ratio = report["paired"]["wrong/right"]["mean"]
    assert ratio == pytest.approx(means["wrong"] / means["right"])
    assert set(report["tasks"]) == {"plus", "minus"}
    minus = report["tasks"]["minus"]
    assert minus["perplexity"]["none"]["n"] == 4
    assert [s["pairs"] for s in minus["shots"]] == [0, 1, 2]
    assert minus["shots"][0]["mean"] == minus["perplexity"]["none"]["mean"]
    own = {kind: [t["nll"][kind] for t in report["targets"]] for kind in report["perplexity"]}
    for kind, values in own.items():
        # Six decimals are kept.
        assert np.exp(np.mean(values)) == pytest.approx(means[kind], rel=1e-5)
        assert np.exp(values).mean() == pytest.approx(report["perplexity"][kind]["lvm"], rel=1e-5)
    assert len({t["id"] for t in report["targets"]}) == 7
    assert {t["group"] for t in report["targets"]} == {"M0", "M1", "M2"} & {
        t["key"].split("/")[1][:2] for t in report["targets"]
    }


def test_the_command_writes_json_and_a_table(make_model, data, tmp_path, capsys):
    export.write(make_model(tokenizer="t" * 64), tmp_path / "m")
    found = command.Evaluate(model=tmp_path / "m", data=data, out=tmp_path / "r.json", rows=6)
    command.main(found)
    report = json.loads((tmp_path / "r.json").read_text())
    said = capsys.readouterr().out
    for words in (
        "source minus",
        "kind pair",
        "right prompt",
        "paired none/right",
        "2 right pairs",
    ):
        assert words in said
    assert report["split"] == "val"
    assert report["corpus"]["all"]["images"] < sum(map(sum, sum(ROWS.values(), [])))  # noqa: RUF017
    command.main(command.Evaluate(model=tmp_path / "m", data=data, out=tmp_path / "d", prompts=0))
    assert "perplexity" not in json.loads((tmp_path / "d/evaluation.json").read_text())


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Path:
    """A random tokenizer of the data's geometry: 8 pixels a side, 4 codes of 40."""
    config = tokenizer.VQGANConfig(
        image_size=8, channels=32, multipliers=(1,), patch=4, res_blocks=1, latent_dim=8,
        code_dim=8, codebook_size=K,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tok")
    tokenizer.save(tokenizer.VQGAN(config).eval(), folder)
    return folder


@pytest.fixture(scope="module")
def its_data(tok, tmp_path_factory) -> Path:
    """The data as if it were of that tokenizer."""
    return write(tmp_path_factory.mktemp("its_data"), tokenizer.load(tok).id)


def test_the_command_draws_and_scores_answers_and_shows_them(
    make_model, its_data, tok, tmp_path, capsys
):
    export.write(make_model(), tmp_path / "m")
    wanted = command.Evaluate(
        model=tmp_path / "m", data=its_data, out=tmp_path / "r.json", prompts=0, tokenizer=tok,
        generate=6, candidates=2, task=("plus=depth",), group_by=r"/(M\d)-",
    )  # fmt: skip
    command.main(wanted)
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["format"], report["version"]) == ("lvm-evaluation", 1)
    assert report["manifest"] == Manifest.load(its_data).hash
    found = report["answers"]
    assert {k: v["metric"] for k, v in found["tasks"].items()} == {
        "plus": "depth", "minus": "image"
    }  # fmt: skip
    kinds = {"right", "ranked", "best", "wrong", "none", "copy", "last", "mean"}
    assert set(found["tasks"]["plus"]["figures"]["rmse"]) == kinds
    assert len(found["targets"]) == 6
    said = capsys.readouterr().out
    for words in ("rmse ↓", "LPIPS: not measured", "FID: not measured", "r.html"):
        assert words in said
    page = (tmp_path / "r.html").read_text()
    loads = re.findall(r'(?:src|href|srcset|poster|data)="([^"]*)"', page)
    assert loads and all(v.startswith("data:image/png;base64,") for v in loads)
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", page)
    for words in ("best</b> by rmse", "worst</b> by psnr", "Perplexity of whole rows"):
        assert words in page
    command.main(replace(wanted, out=tmp_path / "again"))
    again = json.loads((tmp_path / "again/evaluation.json").read_text())
    assert again == report


def test_networks_given_by_path_measure_answers_too(
    make_model, its_data, tok, tmp_path, capsys, monkeypatch
):
    """Their weights are not here: modules of the same form stand in."""

    class Distance(torch.nn.Module):
        name = "lpips"

        def forward(self, images, targets):
            return (images - targets).abs().mean((1, 2, 3))

    class Features(torch.nn.Module):
        def forward(self, images):
            return images.double().mean((2, 3))

    given = []
    monkeypatch.setattr(command, "load_perceptual", lambda *a: given.append(a) or Distance())
    monkeypatch.setattr(command, "load_inception", lambda *a: given.append(a) or Features())
    export.write(make_model(), tmp_path / "m")
    command.main(
        command.Evaluate(
            model=tmp_path / "m",
            data=its_data,
            out=tmp_path / "r.json",
            tokenizer=tok,
            generate=6,
            perceptual="vgg",
            lpips_heads=Path("heads"),
            inception=Path("net"),
        )
    )
    assert given == [("vgg", Path("heads")), (Path("net"),)]
    plus = json.loads((tmp_path / "r.json").read_text())["answers"]["tasks"]["plus"]
    assert plus["figures"]["lpips"]["right"]["mean"] > 0
    assert plus["set"]["right"]["fid"] > 0
    said = capsys.readouterr().out
    assert "not measured" not in said
    assert "lpips ↓" in said and "fid of the whole set" in said and "FID: 3 images are" in said
    page = (tmp_path / "r.html").read_text()
    assert "fid of the set" in page and "the covariance is singular" in page


def test_a_page_without_answers_has_the_figures(make_model, data, tmp_path):
    export.write(make_model(), tmp_path / "<m>")
    command.main(command.Evaluate(model=tmp_path / "<m>", data=data, out=tmp_path / "r.json"))
    page = (tmp_path / "r.html").read_text()
    assert "Does the prompt help?" in page
    assert "Answers by task" not in page
    assert "<m>" not in page and "&lt;m&gt;" in page  # a name is text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": None}, "give --tokenizer DIR"),
        ({"task": ("nope=depth",)}, "no pair source is named 'nope'; these are: plus, minus"),
        ({"task": ("photos=depth",)}, "no pair source is named 'photos'"),
        ({"generate": 0}, "--task is for answers"),
        ({"generate": 0, "task": (), "perceptual": "x"}, "--perceptual is for answers"),
        ({"lpips_heads": Path("x")}, "give --perceptual PATH too"),
        ({"generate": -1}, "cannot be negative"),
        ({"batch": 0}, "--batch is 1 or more"),
        ({"temperature": -1.0}, "temperature"),
        ({"group_by": "("}, "no regular expression"),
        ({"split": "test"}, "no rows of split"),
    ],
)
def test_wrong_options_of_answers_are_refused(
    make_model, its_data, tok, tmp_path, options, words, capsys
):
    export.write(make_model(), tmp_path / "m")
    good = {"generate": 4, "tokenizer": tok, "task": ("plus=depth",)}
    wanted = command.Evaluate(model=tmp_path / "m", data=its_data, **{**good, **options})
    with pytest.raises(InputError, match=words):
        command.main(wanted)
    assert "answer:" not in capsys.readouterr().out  # said before any work


def test_answers_need_the_tokenizer_of_the_data_and_pairs(make_model, data, its_data, tok):
    loaded = tokenizer.load(tok)
    wanted = command.Generate(tok=loaded, count=4, sampling=Sampling())
    with pytest.raises(InputError, match="are of tokenizer tttttttttttt…, not of the given"):
        command.answers(make_model(), data, wanted)
    with pytest.raises(InputError, match="another picture"):
        command.answers(make_model(tokenizer="0" * 64), its_data, wanted)


def test_the_command_says_what_it_left_out(make_model, data, tmp_path, capsys):
    export.write(make_model(), tmp_path / "m")
    manifest = Manifest.load(data)
    for name, words in (("photos", "no sentence of two pairs"), ("plus", "a second pair source")):
        (shard,) = manifest.shards_of(name, "val")
        (tmp_path / name).mkdir()
        (tmp_path / name / shard.name).write_bytes((data / shard.name).read_bytes())
        replace(manifest, shards=(shard,)).save(tmp_path / name)
        command.main(command.Evaluate(model=tmp_path / "m", data=tmp_path / name))
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ({"tokenizer": "0" * 64}, {}, "another picture"),
        ({"codes": 50}, {}, "the data has 40 codes, 4 an image; the model was trained on 50"),
        ({"codes_per_image": 2}, {}, "4 an image; the model was trained on 40 codes, 2"),
        ({"row_images": 4}, {}, "rows of 24 codes, the model was trained on 16"),
        ({}, {"split": "test"}, 'no rows of split "test"; this data has val'),
        ({}, {"group_by": "("}, "no regular expression"),
        ({}, {"group_by": "X"}, "does not match the key 'targets/"),
    ],
)
def test_data_and_options_that_do_not_fit_are_refused(make_model, data, model, options, words):
    with pytest.raises(InputError, match=words):
        evaluate(make_model(**model), data, **options)


def test_groups_are_the_first_group_or_the_whole_match():
    keys = ["targets/E1M8-03/0007.png", "targets/MAP02-1/0001.png"]
    assert group_keys(keys, r"(E\dM\d|MAP\d+)-") == ["E1M8", "MAP02"]
    assert group_keys(keys, r"E\dM\d|MAP\d+") == ["E1M8", "MAP02"]
    assert group_keys(keys, "") == keys


def test_a_bootstrap_over_groups_is_wider_than_over_samples(np_rng):
    """Twelve maps of thirty targets that share most of their difficulty."""
    shared = np_rng.normal(0, 1, 12)
    values = np.repeat(shared, 30) + np_rng.normal(0, 0.2, 360)
    groups = np.repeat(np.arange(12), 30)
    by_group = bootstrap(values, groups, draws=2000, seed=0)
    by_sample = bootstrap(values, np.arange(360), draws=2000, seed=0)
    assert by_group["mean"] == by_sample["mean"] == pytest.approx(np.exp(values.mean()))
    width = {k: math.log(v["high"] / v["low"]) for k, v in
             (("group", by_group), ("sample", by_sample))}  # fmt: skip
    # Standard errors: 1/√12 of a map's spread against 1/√360 of about the same: a factor of 5.
    assert width["group"] > 3 * width["sample"]


def test_the_bootstrap_is_resampling_of_whole_groups(np_rng):
    sizes = [1, 5, 2, 9, 3, 4, 6, 2]
    groups = np.repeat(np.arange(8), sizes)
    values = np_rng.normal(2, 0.3, 32) + groups * 0.1
    found = bootstrap(values, groups, draws=20_000, seed=0)
    means = []
    for _ in range(4000):
        drawn = np_rng.integers(0, 8, 8)
        means.append(np.concatenate([values[groups == g] for g in drawn]).mean())
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    # Two quantiles of 4000 and 20,000 draws: about 2 % of the interval's width each.
    assert found["low"] == pytest.approx(low, rel=0.02)
    assert found["high"] == pytest.approx(high, rel=0.02)
    assert found == bootstrap(values, groups, draws=20_000, seed=0)


def test_one_group_gives_no_interval():
    found = bootstrap(np.ones(5), np.zeros(5), draws=10, seed=0)
    assert found == {"mean": pytest.approx(math.e), "low": None, "high": None}


def test_a_paired_ratio_shows_what_separate_intervals_hide(np_rng):
    """Targets differ in difficulty far more than the prompt helps, as in the demo."""
    hard = torch.from_numpy(np_rng.normal(2, 0.5, 300))
    nll = {
        "right": hard,
        "none": hard + 0.06 + 0.02 * torch.from_numpy(np_rng.normal(0, 1, 300)),
        "wrong": (hard + 0.5)[:, None].expand(-1, N),  # by code or by sample: the same
    }
    found = summarise(nll, [str(i) for i in range(300)])
    assert found["perplexity"]["right"]["high"] > found["perplexity"]["none"]["low"]
    assert (
        1.05 < found["paired"]["none/right"]["low"] < found["paired"]["none/right"]["high"] < 1.08
    )
    assert found["paired"]["wrong/right"]["mean"] == pytest.approx(math.exp(0.5))
    assert found["shots"] == []
    assert found["tasks"] == {}


def test_rows_are_chosen_evenly():
    assert spread(5, 0) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(10, 3) == [0, 3, 6]
