"""Distillation: both divergences against float64, a stored teacher against a live one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lvm import interop
from lvm.checkpoint import load_model_state
from lvm.config import Distil, Run
from lvm.distil import Store, bytes_of, store
from lvm.learner import Learner
from lvm.model import build
from lvm.objectives.distil import Soft, distilled_code
from lvm.recipes import recipe
from lvm.run_folder import resolve
from lvm.teacher import Live, guide_of
from lvm.train import Training, train
from tokenizer.cli import CommandError, InputError
from tokenizer.world import World
from visual_sentences.batch import IGNORE
from visual_sentences.manifest import Manifest

ONE = World(device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(*, columns=23, masked=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 5, 8, generator=generator)
    weight = torch.randn(columns, 8, generator=generator)
    labels = torch.randint(0, columns, (3, 5), generator=generator)
    if masked:
        labels[0, 2:] = labels[2, 0] = IGNORE
    teacher = 2 * torch.randn(3, 5, columns, generator=generator)
    return features, weight, labels, teacher


def slow(features, weight, labels, teacher, distil):
    """Sum position by position in float64."""
    total = nll = 0.0
    for x, label, t in zip(
        features.flatten(0, 1), labels.flatten(), teacher.flatten(0, 1), strict=True
    ):
        if label == IGNORE:
            continue
        z = weight.double() @ x.double()
        log_q = (z / distil.temperature).log_softmax(0)
        log_p = (t.double() / distil.temperature).log_softmax(0)
        a, b = (log_q, log_p) if distil.reverse else (log_p, log_q)
        divergence = (a.exp() * (a - b)).sum()
        nll = nll - z.log_softmax(0)[label]
        total = total + distil.weight * distil.temperature**2 * divergence
    return total + distil.code_weight * nll, nll


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradients_are_those_of_float64(masked, reverse, temperature):
    distil = Distil(
        teacher="x", weight=0.7, code_weight=0.4, temperature=temperature, reverse=reverse
    )
    features, weight, labels, teacher = problem(masked=masked)
    features.requires_grad_()
    weight.requires_grad_()
    found = distilled_code(features, weight, labels, Soft(teacher), distil=distil)
    wanted, nll = slow(features, weight, labels, teacher, distil)
    assert int(found.count) == int((labels != IGNORE).sum())
    # fp32 sums of about 100 terms of size 1.
    torch.testing.assert_close(found.loss.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.nll.double(), nll, rtol=1e-5, atol=0)
    ours = torch.autograd.grad(found.loss, (features, weight))
    theirs = torch.autograd.grad(wanted, (features, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_teacher_like_the_student_teaches_nothing(reverse):
    features, weight, labels, _ = problem()
    weight.requires_grad_()
    same = features @ weight.detach().T
    distil = Distil(teacher="x", code_weight=0.0, temperature=2.0, reverse=reverse)
    found = distilled_code(features, weight, labels, Soft(same), distil=distil)
    assert abs(float(found.loss.detach())) < 1e-4  # the difference of two fp32 sums of size 30
    (gradient,) = torch.autograd.grad(found.loss, weight)
    assert float(gradient.abs().max()) < 1e-5


def test_deLVMs_formula_is_ours_where_all_positions_count():
    """CE + batchmean KL · T², both means over tokens, as its code has it."""
    features, weight, labels, teacher = problem(masked=False)
    n, t = labels.numel(), 2.0
    found = distilled_code(
        features, weight, labels, Soft(teacher), distil=Distil(teacher="x", temperature=t)
    )
    z = (features @ weight.T).flatten(0, 1)
    ce = torch.nn.functional.cross_entropy(z, labels.flatten())
    kl = torch.nn.functional.kl_div(
        (z / t).log_softmax(-1), (teacher.flatten(0, 1) / t).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(found.loss / n, ce + kl * t * t, rtol=1e-5, atol=1e-6)


def test_all_logits_kept_are_the_teacher_and_fewer_are_its_largest_alone():
    *_, teacher = problem()
    values, ids = teacher.topk(23, dim=-1)
    for temperature in (1.0, 3.0):
        torch.testing.assert_close(
            Soft(values, ids).probabilities(23, temperature),
            Soft(teacher).probabilities(23, temperature),
            atol=1e-7,
            rtol=1e-6,
        )
    few = Soft(torch.tensor([[1.0, 0.0]]), torch.tensor([[3, 1]])).probabilities(5, 1.0)
    e = float(torch.tensor(1.0).exp())
    assert few[0].tolist() == pytest.approx([0, 1 / (e + 1), 0, e / (e + 1), 0])
    wider = Soft(torch.zeros(1, 4)).probabilities(6, 1.0)
    assert wider[0].tolist() == [0.25] * 4 + [0, 0]
    narrower = Soft(torch.zeros(1, 8)).probabilities(4, 1.0)
    assert narrower[0].tolist() == [0.25] * 4


# Runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    run = replace(small(data, out), steps=30)
    assert train(run) == 0
    return out


def small(data: Path, out: Path, **values) -> Run:
    tiny = recipe("tiny")
    base = replace(
        tiny,
        model=replace(tiny.model, layers=1, width=32, ffn=48),
        optim=replace(tiny.optim, warmup=2, decay_steps=40),
        precision="fp32",
        device="cpu",
        steps=6,
        log_every=1,
        save_every=100,
    )
    return replace(base, data=str(data), out=str(out), **values)


def losses(run: Run) -> list[float]:
    text = (Path(run.out) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, text) if line["split"] == "train"]


def test_a_stored_teacher_of_all_logits_trains_like_a_live_one(data, teacher, tmp_path):
    table = interop.load(teacher).config.vocab_size
    logits = tmp_path / "logits"
    command = Store(
        teacher=teacher, data=data, out=logits, kept=table, type="fp32", precision="fp32",
        device="cpu",
    )  # fmt: skip
    store(command, show=False)
    live = small(data, tmp_path / "live", distil=Distil(teacher=str(teacher), temperature=2.0))
    stored = small(data, tmp_path / "stored", distil=Distil(logits=str(logits), temperature=2.0))
    alone = small(data, tmp_path / "alone")
    for run in (live, stored, alone):
        assert train(run) == 0
    # The stored logits come from batches of another size: fp32 rounding, through six updates.
    assert losses(stored) == pytest.approx(losses(live), rel=1e-5)
    assert losses(alone)[0] != pytest.approx(losses(live)[0], rel=1e-2)


def test_the_teacher_is_no_part_of_what_is_trained_or_saved(data, teacher, tmp_path):
    run = small(data, tmp_path / "run", distil=Distil(teacher=str(teacher)), steps=1)
    manifest = Manifest.load(data)
    run = resolve(run, manifest, ONE)
    from lvm.checkpoint import Trainer

    training = Training(run, Trainer(), None, manifest=manifest, world=ONE)
    assert isinstance(training.guide, Live)
    names = {name for name, _ in training.learner.named_parameters()}
    held = {id(p) for o in training.optimisers for g in o.param_groups for p in g["params"]}
    theirs = list(training.guide.module.parameters())
    assert theirs and not any(id(p) in held or p.requires_grad for p in theirs)
    assert all(name.startswith("model.") for name in names) and len(held) == len(names)
    before = [p.clone() for p in theirs]
    training.update(iter(training.feed.rows(0)))
    assert all(p.grad is None for p in theirs)
    assert all(map(torch.equal, before, theirs))
    assert train(run) == 0
    assert all("guide" not in name for name in load_model_state(Path(run.out)))


@pytest.mark.slow
def test_a_sharded_teacher_teaches_the_same(data, teacher, two_ranks, tmp_path):
    runs = [
        small(data, tmp_path / name, distil=Distil(teacher=str(teacher)), micro_rows=4)
        for name in ("one", "two")
    ]
    assert train(runs[0]) == 0
    two_ranks(runs[1])
    # AdamW in fp32: sums in another order, through six updates (DESIGN 10).
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)


def test_a_student_learns_its_teacher_from_the_divergence_alone(data, teacher, tmp_path):
    distil = Distil(teacher=str(teacher), code_weight=0.0)
    run = small(data, tmp_path / "run", distil=distil, steps=30)
    assert train(run) == 0
    found = losses(run)
    assert found[-1] < 0.5 * found[0]


def test_logits_of_a_shard_are_the_models_at_each_position(data, teacher, tmp_path):
    command = Store(
        teacher=teacher, data=data, out=tmp_path / "logits", kept=5, precision="fp32", device="cpu"
    )
    index = store(command, show=False)
    manifest = Manifest.load(data)
    run = small(data, tmp_path / "run", distil=Distil(logits=str(tmp_path / "logits")))
    guide = guide_of(run, manifest, ONE)
    from lvm.feed import CodeFeed

    feed = CodeFeed(resolve(run, manifest, ONE), manifest, ONE)
    rows = next(iter(feed.rows(3)))
    batch = guide.attach(feed.batch(rows), rows)
    assert batch.soft.shape == (*batch.ids.shape, 5)
    model = interop.load(teacher)
    from lvm.mask import attention_mask

    with torch.no_grad():
        logits = model(batch.ids, pos=batch.pos, mask=attention_mask(batch.doc, batch.block))
    values, ids = logits.topk(5, dim=-1)
    known = batch.labels != IGNORE
    assert torch.equal(batch.soft_id[known].long(), ids[known])
    wanted = (values - values[..., :1])[known]
    torch.testing.assert_close(batch.soft.float()[known], wanted, atol=0.01, rtol=2e-3)  # fp16
    part = batch.split(3)[1]
    assert torch.equal(part.soft, batch.soft[3:6])
    stamp = index.stat().st_mtime_ns
    assert store(command, show=False) == index and index.stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="holds other logits"):
        store(replace(command, kept=6), show=False)


def test_an_interrupted_store_goes_on_with_the_shard_it_was_at(
    data, teacher, tmp_path, monkeypatch
):
    command = Store(
        teacher=teacher, data=data, out=tmp_path / "logits", kept=3, precision="fp32", device="cpu"
    )
    from lvm import distil as module

    whole, calls = module.store_shard, []

    def once(*args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        whole(*args, **kwargs)

    monkeypatch.setattr(module, "store_shard", once)
    with pytest.raises(KeyboardInterrupt):
        store(command, show=False)
    assert not (command.out / "logits.json").exists()
    made = {p.name: p.stat().st_mtime_ns for p in command.out.glob("*.npy")}
    assert len(made) == 2
    monkeypatch.setattr(module, "store_shard", whole)
    store(command, show=False)
    assert all((command.out / n).stat().st_mtime_ns == t for n, t in made.items())
    assert len(list(command.out.glob("*.npy"))) == 4
    with pytest.raises(InputError, match="--kept 0"):
        store(replace(command, kept=0, out=tmp_path / "x"), show=False)


def test_a_full_disk_is_said_before_the_work(data, teacher, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    command = Store(teacher=teacher, data=data, out=tmp_path / "logits", device="cpu")
    with pytest.raises(CommandError, match="GB free; keep fewer"):
        store(command, show=False)
    manifest = Manifest.load(data)
    rows = sum(manifest.rows("train").values())
    assert bytes_of(manifest, 64, 2) == rows * manifest.row_len * 64 * 4


def test_what_does_not_fit_is_refused(data, make_data, teacher, image_data, tmp_path):
    other = make_data(tmp_path / "other", tokenizer="u" * 64)
    with pytest.raises(InputError, match=r"the teacher in .* does not fit: tokenizer t"):
        train(small(other, tmp_path / "a", distil=Distil(teacher=str(teacher))))
    with pytest.raises(InputError, match="layout bos, the run has none"):
        run = small(data, tmp_path / "b", distil=Distil(teacher=str(teacher)), layout="none")
        train(run)
    with pytest.raises(InputError, match=r"there is no logits\.json"):
        train(small(data, tmp_path / "c", distil=Distil(logits=str(tmp_path))))
    with pytest.raises(InputError, match="give one"):
        Distil(teacher="a", logits="b")
    with pytest.raises(InputError, match="wanted above 0"):
        Distil(temperature=0)
    with pytest.raises(InputError, match="learns from a teacher, and none was given"):
        train(small(data, tmp_path / "e", distil=Distil(required=True)))
    aim = recipe("aim_tiny")
    with pytest.raises(InputError, match="goes with a model of codes"):
        run = replace(aim, data=str(image_data), out=str(tmp_path / "d"), device="cpu")
        train(replace(run, distil=Distil(teacher=str(teacher))))


def test_logits_of_other_data_are_refused(data, make_data, teacher, tmp_path):
    logits = tmp_path / "logits"
    store(Store(teacher=teacher, data=data, out=logits, kept=2, device="cpu"), show=False)
    other = make_data(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="are of other data: manifest"):
        train(small(other, tmp_path / "run", distil=Distil(logits=str(logits))))
    np.save(logits / "a-train-00000.ids.npy", np.zeros(3))
    (logits / "a-train-00000.values.npy").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        train(small(data, tmp_path / "run", distil=Distil(logits=str(logits)), steps=5))


def test_without_a_teacher_the_loss_is_the_code_alone():
    model = build(replace(recipe("tiny").model, vocab_size=64), seed=0)
    assert Learner(model).guide is None
