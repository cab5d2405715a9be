"""The next-code term against its definition, position by position in float64."""

import math

import pytest
import torch

from lvm.objectives.next_code import next_code, token_nll
from visual_sentences.batch import IGNORE


@pytest.fixture
def case(rng) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 3 * torch.randn(2, 5, 7, generator=rng)
    labels = torch.randint(0, 7, (2, 5), generator=rng)
    labels[0, 1] = labels[1, 4] = IGNORE
    return logits, labels


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_sums_are_those_of_a_loop_over_the_positions_that_count(case, z_loss):
    logits, labels = case
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
    found = next_code(logits, labels, z_loss=z_loss)
    assert (int(found.count), int(found.correct)) == (count, correct) and count == 8
    # eight fp32 terms of at most about ten
    assert float(found.nll) == pytest.approx(nll, abs=1e-4)
    assert float(found.loss) == pytest.approx(loss, abs=1e-4)


def test_positions_without_a_label_give_no_gradient(case):
    logits, labels = case
    logits.requires_grad_()
    next_code(logits, labels, z_loss=0.1).loss.backward()
    silent = logits.grad.abs().sum(-1) == 0
    assert torch.equal(silent, labels == IGNORE)
    assert torch.equal(token_nll(logits, labels) == 0, labels == IGNORE)
