"""Rounds of a draw: which images are drawn together, and after which."""

import pytest
import torch

from lvm.decoding.windows import Round, log_likelihood, rounds
from lvm.generate import Sampling, draw


def test_lvms_frame_count_and_context():
    """12 frames and 8 new in a row of 16: four at once, then one at a time after the last 15."""
    plan = list(rounds([12], new=8, room=16))
    assert plan[0] == Round(0, 4, 0, (12,))
    assert plan[1:] == [Round(f, 1, f, (15 - f,)) for f in range(4, 8)]


@pytest.mark.parametrize("lengths", [[0], [3], [5], [5, 1, 0], [2, 2, 4]])
@pytest.mark.parametrize("room", [1, 2, 6])
def test_every_image_has_the_window_that_its_prompt_alone_would_give(lengths, room):
    lengths = [min(length, room - 1) for length in lengths]
    seen = []
    for part in rounds(lengths, new=9, room=room):
        for frame in range(part.first, part.first + part.count):
            seen.append(frame)
            for length, kept in zip(lengths, part.kept, strict=True):
                before = length + frame
                wanted = before if before < room else room - 1
                # Those drawn since the window was read count too.
                assert kept + part.own + (frame - part.first) == wanted
                assert part.own <= part.first and kept <= length
    assert seen == list(range(9))


@pytest.mark.parametrize("layout", ["bos", "none"])
def test_codes_are_scored_as_they_were_drawn(make_model, rng, layout):
    """In all windows, of prompts of two lengths."""
    model = make_model(layout=layout)
    prompts = [torch.randint(0, 40, (k, 4), generator=rng) for k in (4, 2)]
    drawn = draw(model, prompts, Sampling(new=7, candidates=3))
    scored = log_likelihood(model, model.reads, prompts, drawn.codes)
    # fp32, the same sums in another order
    torch.testing.assert_close(scored, drawn.log_likelihood, atol=1e-4, rtol=1e-5)
