"""The probe command from folders to results.json: kinds of data and of model, resume, errors."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenizer
from lvm import export, models
from lvm.config import ModelConfig, Patches
from lvm.model import Transformer
from lvm.probe import Probe, main
from lvm.probing import experiment, features
from lvm.probing.data import open_split
from lvm.probing.features import Cache, Form
from lvm.probing.fit import fit, measure
from lvm.probing.heads import read_head
from lvm.probing.settings import hold_out
from lvm.probing.trunk import CodeTrunk, PatchTrunk, streams, untrained, wrap
from lvm.vision import VisionModel
from lvm.weights import WEIGHTS, write_file
from tokenizer.cli import CommandError, InputError
from tokenizer.config import VQGANConfig
from tokenizer.images import encode_image, save_image
from tokenizer.vqgan import VQGAN
from visual_sentences.augment import View
from visual_sentences.image_shards import write_images
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry

COLOURS = {"blue": (20, 30, 220), "green": (20, 210, 40), "red": (220, 20, 30)}
CPU = torch.device("cpu")


def painted(colour: str, rng: np.random.Generator) -> np.ndarray:
    """A picture of one colour and a little noise: classes that any probe tells apart."""
    noise = rng.integers(-20, 21, (10, 12, 3))
    return np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """16 pictures of each colour to learn from, 4 to be probed by."""
    folder, rng = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for colour in COLOURS:
            (folder / split / colour).mkdir(parents=True)
            for i in range(count):
                save_image(folder / split / colour / f"{i}.png", painted(colour, rng))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder of a trunk of four blocks, of 8 pixels and 4 patches, untrained."""
    config = ModelConfig(
        width=16, layers=4, heads=2, ffn=32, rotary=False, norm="layer", mlp="gelu", init="xavier"
    )
    patches = Patches(image_size=8, size=4)
    made = untrained(VisionModel(config, patches), seed=0)
    folder = tmp_path_factory.mktemp("model")
    about = {"format": "lvm", "version": 1, "model": asdict(config), "patches": asdict(patches)}
    (folder / "config.json").write_text(json.dumps(about))
    write_file(folder / WEIGHTS, made.state_dict(), dtype=torch.float32)
    return folder


@pytest.fixture
def probe(model, tree, tmp_path) -> Probe:
    return Probe(
        model=model, data=tree, out=tmp_path / "out", kind=("linear", "attentive", "knn"),
        epochs=8, rates=(1e-3, 1e-1), window=2, neighbours=5, held_out=0.2, batch=16,
        workers=1, device="cpu",
    )  # fmt: skip


def results(probe: Probe) -> dict[str, Any]:
    main(probe)
    return json.loads((probe.out / "results.json").read_text())


def shards(folder: Path) -> Path:
    """Image shards of one source: two colours with a class, and pictures without one."""
    rng, entries = np.random.default_rng(1), []
    folder.mkdir()
    names = ("blue", "red", "green")
    for split, count in (("train", 12), ("val", 3)):
        colours = [c for c in names for _ in range(count)]
        labels = [names.index(c) if c != "green" else -1 for c in colours]
        file = f"s-{split}-00000.arrow"
        written = write_images(
            folder / file,
            jpegs=[[encode_image(painted(c, rng), format="JPEG")] for c in colours],
            labels=np.array(labels, np.int32),
            keys=[[f"{c}/{i}.jpg"] for i, c in enumerate(colours)],
            metadata={},
        )
        entries.append(
            ShardEntry(
                name=file, source="s", split=split, rows=len(colours), documents=len(colours),
                images=len(colours), bytes=written.bytes, sha256=written.sha256, offset=0,
            )
        )  # fmt: skip
    source = SourceEntry(
        name="s", kind="image", weight=None, repeat=None, preprocess="squash", license="", note="",
        inputs=1, good=1, bad={}, classes=("blue", "red", "unused"),
    )  # fmt: skip
    Manifest(
        tokenizer="", codebook_size=0, codes_per_image=0, image_size=12, row_len=0, seed=0,
        sources=(source,), shards=tuple(entries), form="images",
    ).save(folder)  # fmt: skip
    return folder


def test_every_kind_and_baseline_tells_colours_apart(probe, capsys):
    found = results(replace(probe, baseline=("pixels", "random")))
    assert found["images"] == {"train": 48, "held_out": 8, "val": 12, "groups": 12}
    assert found["classes"] == ["blue", "green", "red"]
    assert found["chance"] == {"guess": pytest.approx(1 / 3), "commonest": pytest.approx(1 / 3)}
    for subject in ("model", "random", "pixels"):
        assert {*found["results"][subject]} == {"linear", "attentive", "knn"}
        for kind in ("linear", "knn"):
            assert found["results"][subject][kind]["top1"]["mean"] == 1.0, (subject, kind)
    attentive = found["results"]["model"]["attentive"]
    assert attentive["top1"]["mean"] == 1.0
    assert attentive["classes"]["red"] == {"top1": 1.0, "n": 4}
    assert attentive["chosen"]["blocks"] == [2, 3]
    assert [line["rate"] for line in attentive["sweep"]] == [1e-3, 1e-1]
    assert found["paired"]["model - pixels"]["knn"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    shown = capsys.readouterr().out
    assert "pooled of train, 48 images, take 1.5 KiB" in shown
    assert "all positions of train, 48 images, take 6 KiB" in shown
    assert "model attentive" in shown
    assert "100.00 [100.00, 100.00]" in shown


def test_a_saved_head_answers_as_it_did(probe, model, tree, tmp_path):
    """Features of 32 bits, and the head from its file on the whole model: the same answers."""
    probe = replace(probe, kind=("attentive",), dtype="fp32")
    before = results(probe)["results"]["model"]["attentive"]["top1"]
    path = probe.out / "heads" / "model-attentive.safetensors"
    again = replace(probe, head=path, window=2, out=tmp_path / "again")
    assert results(again)["results"]["model"]["attentive"]["top1"] == before
    trunk = wrap(models.load(model), None, CPU)
    assert read_head(path, trunk).linear.out_features == 3
    main(replace(again, split="train", out=tmp_path / "train"))  # wants no second split
    with pytest.raises(InputError, match="3 classes apart, and the images are of 2"):
        main(replace(again, data=two_classes(tree, tmp_path / "two"), out=tmp_path / "o"))
    with pytest.raises(InputError, match="--head is an attentive probe"):
        main(replace(again, kind=("linear",)))


def two_classes(tree: Path, folder: Path) -> Path:
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for colour in ("blue", "red"):
            (folder / split / colour).symlink_to(tree / split / colour)
    return folder


def test_blocks_are_searched_without_the_probed_split(probe, tree, tmp_path):
    """All windows are reported, for k-NN too; other pictures in val change no choice."""
    probe = replace(probe, blocks=("best",))
    found = results(probe)["results"]["model"]
    windows = [[0, 1], [1, 2], [2, 3]]
    assert [line["blocks"] for line in found["knn"]["sweep"]] == windows
    linear = found["linear"]["sweep"]
    assert [(line["blocks"], line["rate"]) for line in linear] == [
        (w, rate) for w in windows for rate in (1e-3, 1e-1)
    ]
    top = max(line["top1"] for line in linear)
    chosen = [x for x in linear if x["top1"] == top]
    least = min(chosen, key=lambda x: x["loss"])
    assert found["linear"]["chosen"] == {k: least[k] for k in ("blocks", "rate", "decay")}
    assert found["attentive"]["chosen"]["blocks"] == least["blocks"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "train").symlink_to(tree / "train")
    rng = np.random.default_rng(5)
    for place, colour in zip(COLOURS, reversed(COLOURS), strict=True):  # all named wrongly
        (other / "val" / place).mkdir(parents=True)
        save_image(other / "val" / place / "x.png", painted(colour, rng))
    wrong = results(replace(probe, data=other, out=tmp_path / "wrong"))["results"]["model"]
    for kind in ("linear", "attentive", "knn"):
        assert wrong[kind]["chosen"] == found[kind]["chosen"]
        assert wrong[kind]["sweep"] == found[kind]["sweep"]
    assert wrong["linear"]["top1"]["mean"] < 0.5


def test_held_out_images_choose_and_are_not_learnt_from(probe, tree, monkeypatch):
    """A sweep learns from the rest and is measured on them; the last head learns from all."""
    learnt, measured = [], []
    monkeypatch.setattr(
        experiment, "fit", lambda *a, **k: (learnt.append(a[4].tolist()), fit(*a, **k))
    )
    monkeypatch.setattr(
        experiment, "measure", lambda *a, **k: (measured.append(a[3].tolist()), measure(*a, **k))[1]
    )
    main(replace(probe, kind=("linear",), epochs=1))
    keys = open_split(tree, "train").keys
    held = np.flatnonzero(hold_out(keys, share=0.2, seed=0)).tolist()
    assert 0 < len(held) < 20
    assert learnt == [sorted({*range(48)} - {*held}), [*range(48)]]
    assert measured == [held, [*range(12)]]


def test_shards_give_labels_and_drop_what_has_none(probe, tmp_path):
    data = shards(tmp_path / "shards")
    found = results(replace(probe, data=data, kind=("knn",)))
    assert found["images"]["train"] == 24
    assert found["classes"] == ["blue", "red"]
    assert found["results"]["model"]["knn"]["top1"]["mean"] == 1.0
    by_key = replace(probe, data=data, kind=("knn",), label_by="^[a-z]+", out=tmp_path / "all")
    found = results(by_key)
    assert found["classes"] == ["blue", "green", "red"]
    assert found["images"]["train"] == 36
    assert found["results"]["model"]["knn"]["top1"]["mean"] == 1.0


def test_streamed_and_augmented_probes_keep_no_features_of_positions(probe, tmp_path):
    """Streaming changes nothing but where features come from; with fp32 not even a bit."""
    probe = replace(probe, kind=("attentive",), dtype="fp32", epochs=6)
    kept, streamed = probe, replace(probe, stream=True, out=tmp_path / "streamed")
    assert results(kept)["results"] == results(streamed)["results"]
    heads = [p.out / "heads" / "model-attentive.safetensors" for p in (kept, streamed)]
    assert heads[0].read_bytes() == heads[1].read_bytes()
    assert not (streamed.out / "features").exists()
    crops = replace(streamed, augment=True, out=tmp_path / "crops")
    results(crops)
    assert not (crops.out / "features").exists()
    assert (crops.out / "heads" / heads[0].name).read_bytes() != heads[0].read_bytes()
    results(replace(crops, out=tmp_path / "crops2"))
    again = tmp_path / "crops2" / "heads" / heads[0].name
    assert (crops.out / "heads" / heads[0].name).read_bytes() == again.read_bytes()


def test_random_views_depend_on_image_epoch_and_seed_alone(model, tree):
    trunk, data = PatchTrunk(models.load(model)), open_split(tree, "train")

    def views(rows: list[int], epoch: int, seed: int = 0) -> torch.Tensor:
        form, view = Form(sets=((0,),), tokens=True), View(size=8)
        streamed = features.Streamed(
            trunk, data, form, device=CPU, batch=2, workers=1, random=view, seed=seed
        )
        return streamed.batch(np.array(rows), epoch)

    first = views([3, 17, 30], 0)
    torch.testing.assert_close(views([30, 3], 0), first[[2, 0]])  # batches of two and of one
    assert not torch.equal(views([3, 17, 30], 1), first)
    assert not torch.equal(views([3, 17, 30], 0, seed=1), first)


def test_a_finished_probe_says_so_and_another_is_refused(probe, capsys):
    probe = replace(probe, kind=("knn",))
    with pytest.raises(InputError, match="from 0 to 3"):  # which is no probe yet
        main(replace(probe, blocks=("9",)))
    main(probe)
    main(replace(probe, workers=2))
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"neighbours: 5, now 6"):
        main(replace(probe, neighbours=6))


def test_group_by_keeps_groups_together(probe, tree, tmp_path):
    held = hold_out(["a", "b", "a", "c", "b", "d"], share=0.5, seed=1)
    assert held[0] == held[2] and held[1] == held[4]
    found = results(replace(probe, kind=("knn",), group_by=r"(\d)\.png"))
    assert found["images"]["groups"] == 4
    with pytest.raises(InputError, match="nothing held out"):
        main(replace(probe, group_by="png", seed=1, held_out=1e-9, out=tmp_path / "one"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere"}, "neither manifest.json nor a folder val"),
        ({"split": "test"}, "nor a folder test"),
        ({"train": "val"}, "both val"),
        ({"tokenizer": Path("tok")}, "reads patches of pixels"),
        ({"blocks": ("4",)}, "from 0 to 3"),
        ({"label_by": "("}, "--label-by"),
        ({"source": "s"}, "no manifest.json"),
        ({"batch": 1}, "--batch 1"),
        ({"rates": (0.0,)}, "--rates"),
        ({"trunk_batch": 0}, "--trunk-batch is 1 or more"),
        ({"held_out": 1.0}, "--held-out 1.0"),
        ({"kind": ()}, "at least one value"),
        ({"head": Path("none.pth"), "kind": ("attentive",)}, "no file none.pth"),
    ],
)
def test_mistakes_are_named(probe, tree, change, message):
    if change.get("data") == "nowhere":
        change = {"data": tree / "nowhere"}
    with pytest.raises(InputError, match=message):
        main(replace(probe, **change))


def test_a_class_without_images_to_learn_from_is_refused(probe, tree, tmp_path):
    data = two_classes(tree, tmp_path / "data")
    (data / "val" / "green").symlink_to(tree / "val" / "green")
    with pytest.raises(InputError, match="no image to learn from, such as green"):
        main(replace(probe, data=data))


def test_a_damaged_picture_is_named(probe, tree, tmp_path):
    data = tmp_path / "data"
    for split in ("train", "val"):
        for colour in ("blue", "red"):
            (data / split / colour).mkdir(parents=True)
            file = (tree / split / colour / "0.png").read_bytes()
            (data / split / colour / "0.png").write_bytes(file)
            (data / split / colour / "1.png").write_bytes(file)
    (data / "val" / "red" / "1.png").write_bytes(b"no picture")
    with pytest.raises(CommandError, match=r"red/1\.png cannot be decoded"):
        main(replace(probe, data=data, kind=("knn",), held_out=0.5))


# Models of codes


@pytest.fixture
def codes(make_model, tmp_path) -> tuple[Transformer, VQGAN]:
    config = VQGANConfig(
        image_size=8, channels=32, multipliers=(1, 1, 1), res_blocks=1, latent_dim=4, code_dim=4,
        codebook_size=40,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tok = VQGAN(config)
        torch.nn.init.normal_(tok.quantize.embedding.weight)
    tokenizer.save(tok, tmp_path / "tok")
    return make_model(tokenizer=tok.id), tokenizer.load(tmp_path / "tok")


@pytest.mark.parametrize("layout", ["bos", "none"])
def test_streams_of_codes_are_those_of_the_model(make_model, layout, rng):
    """The last block's, normalised, are `Transformer.features` of bos and all codes."""
    model = make_model(layout=layout)
    ids = torch.randint(0, 40, (3, 4), generator=rng)
    with torch.no_grad():
        found = streams(model, model.reads, ids, [1, 0])
        bos = ids.new_full((3, 1), model.reads.vocab.bos)
        inputs = torch.cat([bos, ids], 1) if layout == "bos" else ids
        torch.testing.assert_close(model.norm(found[0]), model.features(inputs))
    assert not torch.equal(found[0], found[1])


def test_a_model_of_codes_is_probed_by_its_tokenizer(codes, probe, tmp_path, rng):
    model, tok = codes
    trunk = CodeTrunk(model, tok)
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=rng, dtype=torch.uint8)
    with torch.no_grad():
        (found,) = trunk.features(images, [1])
        codes_ = tok.encode(images.float() / 255)
        (whole,) = streams(model, model.reads, codes_, [1])
    assert found.shape == (2, trunk.positions, trunk.width) == (2, 4, 32)
    torch.testing.assert_close(found, whole[:, 1:])
    export.write(model, tmp_path / "model")
    probe = replace(probe, model=tmp_path / "model", epochs=2)
    with pytest.raises(InputError, match="give --tokenizer DIR"):
        main(probe)
    found = results(replace(probe, tokenizer=tmp_path / "tok", baseline=("random",)))
    assert found["results"]["model"]["knn"]["chosen"] == {"blocks": [0, 1]}
    assert {*found["results"]} == {"model", "random"}


# Killed


def test_features_are_resumed_by_whole_parts_and_stale_ones_refused(
    model, tree, tmp_path, monkeypatch
):
    monkeypatch.setattr(features, "PART_BYTES", 16 * 16 * 2)  # 16 images a part
    trunk, data = PatchTrunk(models.load(model)), open_split(tree, "train")

    def cache(form: Form | None = None, dtype: str = "fp16") -> Cache:
        form = form or Form(sets=((2, 3),))
        return Cache(tmp_path, trunk, data, form, split="train", dtype=dtype, device=CPU)

    calls = []
    whole = trunk.features

    def counted(stop: int) -> Callable[..., list[torch.Tensor]]:
        def call(images: torch.Tensor, blocks: list[int]) -> list[torch.Tensor]:
            calls.append(len(images))
            if len(calls) == stop:
                raise KeyboardInterrupt
            return whole(images, blocks)

        return call

    trunk.features = counted(stop=4)  # in the second part, its second batch
    with pytest.raises(KeyboardInterrupt):
        cache().fill(batch=8, workers=1)
    assert cache().missing == [1, 2]
    calls.clear()
    trunk.features = counted(stop=99)
    cache().fill(batch=8, workers=1, rank=0, world=2)  # of two ranks the first has part 2
    assert cache().missing == [1]
    cache().fill(batch=8, workers=1)
    assert calls == [8] * 4
    rows = np.array([40, 3, 17, 3])
    found = cache().batch(rows)
    pixels = [data.pixels(int(i), size=8, view="centre") for i in rows]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = torch.stack(whole(images, [2, 3])).mean(0).mean(1, keepdim=True)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)  # kept in fp16
    folder = cache().folder
    assert cache(Form(sets=((1, 2),))).folder != folder
    assert cache(dtype="fp32").folder != folder
    changed = json.loads((folder / "features.json").read_text()) | {"model": "another"}
    (folder / "features.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match="features of another model"):
        cache().fill(batch=8, workers=1)
    free = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(InputError, match="--stream"):
        cache(Form(sets=((0,),), tokens=True)).fill(batch=8, workers=1)
    trunk.features = lambda images, blocks: [whole(images, blocks)[0] * 1e6]
    monkeypatch.undo()
    with pytest.raises(CommandError, match="use --dtype fp32"):
        cache(Form(sets=((0,),))).fill(batch=8, workers=1)


@pytest.mark.slow
def test_a_killed_command_ends_in_the_same_bits(probe, tmp_path):
    """kill -9 of a process in the middle of a head's training."""
    probe = replace(probe, kind=("attentive",), epochs=60, save_seconds=0.0)
    options = [
        "--data", probe.data, "--out", probe.out, "--kind", "attentive", "--epochs", "60",
        "--rates", "1e-3", "1e-1", "--window", "2", "--neighbours", "5", "--held-out", "0.2",
        "--batch", "16", "--workers", "1", "--device", "cpu", "--save-seconds", "0",
    ]  # fmt: skip
    command = [sys.executable, "-m", "lvm.probe", str(probe.model), *map(str, options)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    state = probe.out / "state" / "model-sweep-attentive.pt"
    try:
        until = time.monotonic() + 120
        while not state.is_file():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until, "no state after two minutes"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert state.is_file()
    short = replace(probe, save_seconds=60.0)
    killed = results(short)
    whole = results(replace(short, out=tmp_path / "whole"))
    assert killed["results"] == whole["results"]
    name = "heads/model-attentive.safetensors"
    assert (probe.out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
