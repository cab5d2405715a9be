"""Training of probes: what they learn, what they cannot, resume; k-NN and places by hand."""

import math

import numpy as np
import pytest
import torch

from lvm.probing import fit as module
from lvm.probing import knn
from lvm.probing.fit import Schedule, Setting, best, factor, fit, measure, places
from lvm.probing.heads import AttentiveBank, LinearBank

K, D, N = 4, 8, 3
SETTINGS = [Setting(1e-2, 0.0), Setting(3e-2, 0.1)]


class Given:
    """Features that are there already."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.asked: list[tuple[int, list[int]]] = []

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, rows: np.ndarray, epoch: int = 0) -> torch.Tensor:
        self.asked.append((epoch, rows.tolist()))
        return self.values[torch.from_numpy(rows)]


def bank_of(kind: str, settings: int = 2) -> LinearBank | AttentiveBank:
    if kind == "linear":
        return LinearBank(D, K, windows=torch.ones(1, 1), settings=settings)
    return AttentiveBank(D, 2, K, settings=settings)


def features_of(kind: str, labels: np.ndarray, rng: torch.Generator, signal: float) -> Given:
    """Unit noise, and `signal` in the channel of the class; of one random position, for tokens."""
    n = len(labels)
    x = torch.randn(n, 1 if kind == "linear" else N, D, generator=rng)
    where = torch.randint(0, x.shape[1], (n,), generator=rng)
    x[torch.arange(n), where, torch.from_numpy(labels)] += signal
    return Given(x)


def trained(kind, features, labels, rows, state, *, epochs=20, save_seconds=60.0):
    bank = bank_of(kind)
    schedule = Schedule(epochs=epochs, batch=64, save_seconds=save_seconds)
    fit(
        bank, SETTINGS, features, labels, rows, schedule=schedule, state=state,
        device=torch.device("cpu"),
    )  # fmt: skip
    return bank


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_separable_classes_are_learnt_and_noise_is_not(kind, tmp_path, rng, np_rng):
    labels = np_rng.integers(0, K, 900)
    learn, ask = np.arange(500), np.arange(500, 900)
    clear = features_of(kind, labels, rng, signal=20.0)
    bank = trained(kind, clear, labels, learn, tmp_path / "clear.pt")
    found = measure(bank, clear, labels, ask, batch=100)
    assert found.top1.shape == (2, 400)
    assert found.top1.all()
    noise = features_of(kind, labels, rng, signal=0.0)
    bank = trained(kind, noise, labels, learn, tmp_path / "noise.pt")
    found = measure(bank, noise, labels, ask, batch=100)
    # 400 draws of 1 in 4: five standard deviations, 6e-7 for a head that knows nothing
    deviation = math.sqrt(0.25 * 0.75 / 400)
    assert np.abs(found.top1.mean(1) - 0.25).max() < 5 * deviation
    assert found.top5.all(), "four classes are all among the first five"


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_killed_probe_ends_in_the_same_bits(kind, tmp_path, rng, np_rng, monkeypatch):
    labels = np_rng.integers(0, K, 200)
    features, rows = features_of(kind, labels, rng, signal=1.0), np.arange(200)
    whole = trained(kind, features, labels, rows, tmp_path / "whole.pt", epochs=3).state_dict()

    class Killed(Exception):
        pass

    def killed_at(step: int) -> None:
        def stop(now: int, total: int) -> float:
            if now == step:
                raise Killed
            return factor(now, total)

        monkeypatch.setattr(module, "factor", stop)

    state = tmp_path / "killed.pt"
    for step in (2, 7):  # in the middle of two epochs; the second time after a resume
        killed_at(step)
        with pytest.raises(Killed):
            trained(kind, features, labels, rows, state, epochs=3, save_seconds=0.0)
    monkeypatch.undo()
    features.asked.clear()
    again = trained(kind, features, labels, rows, state, epochs=3).state_dict()
    assert len(features.asked) == 2, "9 steps, of which 7 were done"
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_epochs_show_every_image_once_in_a_new_order(tmp_path, rng, np_rng):
    labels = np_rng.integers(0, K, 100)
    features = features_of("linear", labels, rng, signal=1.0)
    rows = np.arange(100)[::2]
    bank = bank_of("linear")
    fit(
        bank, SETTINGS, features, labels, rows, schedule=Schedule(epochs=2, batch=25),
        state=tmp_path / "s.pt", device=torch.device("cpu"),
    )  # fmt: skip
    assert [epoch for epoch, _ in features.asked] == [0, 0, 1, 1]
    first, second = ([i for e, r in features.asked if e == n for i in r] for n in (0, 1))
    assert sorted(first) == sorted(second) == rows.tolist()
    assert first != second


def test_a_member_learns_as_it_would_alone(tmp_path, rng, np_rng):
    """Settings side by side do not touch each other, not even one that ends in NaN."""
    labels = np_rng.integers(0, K, 128)
    features, rows = features_of("linear", labels, rng, signal=1.0), np.arange(128)
    both = [Setting(1e-2, 0.1), Setting(2e37, 1.0)]
    found = {}
    for name, settings in {"both": both, "alone": both[:1]}.items():
        bank = bank_of("linear", settings=len(settings))
        fit(
            bank, settings, features, labels, rows, schedule=Schedule(epochs=5, batch=32),
            state=tmp_path / f"{name}.pt", device=torch.device("cpu"),
        )  # fmt: skip
        found[name] = bank
    a, b = (found[name].member(0).linear.weight for name in ("both", "alone"))
    assert not torch.isfinite(found["both"](features.values)[1]).all()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # products of other shapes, 20 steps
    measured = measure(found["both"], features, labels, rows, batch=64)
    assert best(measured) == 0


def test_the_step_is_adamws_with_a_warm_cosine(tmp_path, rng, np_rng):
    """One member against torch's AdamW on one head, matrices alone decayed."""
    labels = np_rng.integers(0, K, 64)
    features, rows = features_of("linear", labels, rng, signal=1.0), np.arange(64)
    bank = bank_of("linear", settings=1)
    fit(
        bank, [Setting(1e-2, 0.5)], features, labels, rows,
        schedule=Schedule(epochs=4, batch=32, seed=3), state=tmp_path / "s.pt",
        device=torch.device("cpu"),
    )  # fmt: skip
    head = bank_of("linear", settings=1).members[0].train()
    head.init_weights(torch.Generator().manual_seed(3))
    optimiser = torch.optim.AdamW([
        {"params": [head.linear.weight], "weight_decay": 0.5},
        {"params": [head.linear.bias], "weight_decay": 0.0},
    ])  # fmt: skip
    for step, (_, chosen) in enumerate(features.asked):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * factor(step, 8)
        loss = torch.nn.functional.cross_entropy(
            head(features.values[chosen]), torch.from_numpy(labels[chosen])
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name in ("weight", "bias"):  # fp32, products in another order, 8 steps
        found, wanted = (getattr(h.linear, name) for h in (bank.members[0], head))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert [factor(s, 100) for s in (0, 4)] == [0.2, 1.0]
    assert factor(5, 100) == 1.0
    assert factor(52, 100) == pytest.approx(0.5, abs=0.01)
    assert factor(99, 100) < 1e-3


def test_places_count_ties_and_nan_as_misses():
    nan = math.nan
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 0.0], [nan, 0.0, 1.0], [0.0, nan, 1.0]])
    assert places(logits, torch.tensor([2, 0, 0, 2])).tolist() == [0, 1, 3, 1]
    assert places(torch.stack([logits, -logits]), torch.tensor([0, 2, 0, 1]))[1].tolist() == [
        0, 0, 3, 3,
    ]  # fmt: skip


def test_neighbours_vote_by_hand(monkeypatch):
    """Cosines 0, 0.8, 1, 0.6 to memories of any length; the three nearest of labels 1, 0, 1."""
    memory = torch.tensor([[0.0, 1.0], [0.4, 0.3], [2.0, 0.0], [6.0, 8.0]])
    labels = torch.tensor([2, 1, 0, 1])
    query = torch.tensor([[5.0, 0.0]])

    def voted(temperature: float, k: int = 3) -> list[float]:
        return knn.votes(query, memory, labels, classes=3, k=k, temperature=temperature)[0].tolist()

    assert voted(0.5) == pytest.approx([1.0, math.exp(-0.4) + math.exp(-0.8), 0.0])
    assert voted(0.07) == pytest.approx([1.0, math.exp(-0.2 / 0.07) + math.exp(-0.4 / 0.07), 0.0])
    assert voted(0.5, k=9)[2] == pytest.approx(math.exp(-2.0))  # all that there are
    whole = voted(0.5)
    monkeypatch.setattr(knn, "CHUNK", 1)
    assert voted(0.5) == pytest.approx(whole)
