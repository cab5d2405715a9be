"""The next-code term against its definition, position by position in float64."""

import math

import pytest
import torch

from lvm.objectives.next_code import next_code, token_nll
from visual_sentences.batch import IGNORE


@pytest.fixture
def case(rng) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [2, 5, 6], weight [7, 6] and labels [2, 5], two of them IGNORE."""
    features = torch.randn(2, 5, 6, generator=rng)
    weight = 1.5 * torch.randn(7, 6, generator=rng)
    labels = torch.randint(0, 7, (2, 5), generator=rng)
    labels[0, 1] = labels[1, 4] = IGNORE
    return features, weight, labels


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_sums_are_those_of_a_loop_over_the_positions_that_count(case, z_loss):
    features, weight, labels = case
    logits = features.double() @ weight.double().T
    nll = loss = 0.0
    count = correct = 0
    for row, wanted in zip(logits.flatten(0, 1).tolist(), labels.flatten().tolist(), strict=True):
        if wanted == IGNORE:
            continue
        log_z = math.log(math.fsum(math.exp(x) for x in row))
        nll += log_z - row[wanted]
        loss += log_z - row[wanted] + z_loss * log_z**2
        count += 1
        correct += row.index(max(row)) == wanted
    found = next_code(features, weight, labels, z_loss=z_loss)
    assert (int(found.count), int(found.correct)) == (count, correct) and count == 8
    # eight fp32 terms of at most about ten
    assert float(found.nll) == pytest.approx(nll, abs=1e-4)
    assert float(found.loss) == pytest.approx(loss, abs=1e-4)


def test_positions_without_a_label_give_no_gradient(case):
    features, weight, labels = case
    features.requires_grad_()
    next_code(features, weight, labels, z_loss=0.1).loss.backward()
    silent = features.grad.abs().sum(-1) == 0
    assert torch.equal(silent, labels == IGNORE)
    assert torch.equal(token_nll(features @ weight.T, labels) == 0, labels == IGNORE)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_the_term_is_what_autograd_makes_of_whole_logits(case, z_loss):
    """The sums, and the gradient of features and head, of `token_nll` on all logits at once."""
    features, weight, labels = case
    both = []
    for whole in (True, False):
        x, w = (t.clone().requires_grad_() for t in (features, weight))
        if whole:
            logits = x @ w.T
            nll = token_nll(logits, labels).sum()
            squares = logits.logsumexp(-1).square() * (labels != IGNORE)
            loss = nll + z_loss * squares.sum()
        else:
            sums = next_code(x, w, labels, z_loss=z_loss)
            nll, loss = sums.nll, sums.loss
        (loss / 8).backward()
        both.append((nll.detach(), loss.detach(), x.grad, w.grad))
    for one, other in zip(*both, strict=True):  # fp32 sums of ten terms in another order
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
