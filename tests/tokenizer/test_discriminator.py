"""The discriminator: taming's topology, patches of the stated size, and a judge that learns."""

import pytest
import torch
from taming.modules.discriminator.model import NLayerDiscriminator
from torch import Tensor, nn

from tokenizer.cli import InputError
from tokenizer.discriminator import GROUPS, Adversary, PatchGAN
from tokenizer.world import World

SHAPE = {"image_size": 32, "in_channels": 3, "layers": 2, "lr": 2e-3}


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_logits_equal_those_of_taming_with_its_norm_replaced(layers: int) -> None:
    theirs = NLayerDiscriminator(n_layers=layers)
    for place, module in enumerate(theirs.main):
        if isinstance(module, nn.BatchNorm2d):
            theirs.main[place] = nn.GroupNorm(GROUPS, module.num_features)
    ours = PatchGAN(layers=layers)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(("layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_the_stated_size(layers: int, side: int) -> None:
    net = PatchGAN(layers=layers, channels=32)
    for place, module in enumerate(net.main):
        if isinstance(module, nn.GroupNorm):  # it looks at the whole image
            net.main[place] = nn.Identity()
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    logits = net(images)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    seen = images.grad.abs().sum(1)[0].nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [side, side]


def test_an_image_is_judged_alone(rng: torch.Generator) -> None:
    net, images = PatchGAN(layers=2), torch.rand(4, 3, 32, 32, generator=rng)
    alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(net(images), alone, atol=1e-5, rtol=1e-5)  # order of fp32 sums


def judge(images: Tensor, restored: Tensor, *, steps: int, lecam: float = 0.0) -> list[float]:
    torch.manual_seed(0)
    adversary = Adversary(World(), lecam=lecam, **SHAPE)
    return [float(adversary.learn(images, restored, bf16=False)["judged"]) for _ in range(steps)]


@pytest.mark.parametrize("lecam", [0.0, 0.1])
def test_judge_learns_to_tell_blurred_from_sharp(lecam: float, rng: torch.Generator) -> None:
    images = torch.rand(8, 3, 32, 32, generator=rng)
    blurred = nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    shares = judge(images, blurred, steps=20, lecam=lecam)
    assert shares[0] < 0.8 and shares[-1] > 0.95
    same = judge(images, images, steps=5)
    assert same == pytest.approx([0.5] * 5, abs=1e-6)  # equal images: half of them wrong, always


def test_deceiving_moves_the_images_and_not_the_judge(rng: torch.Generator) -> None:
    adversary = Adversary(World(), lecam=0.0, **SHAPE)
    restored = torch.rand(2, 3, 32, 32, generator=rng).requires_grad_()
    adversary.deceive(restored).backward()
    assert restored.grad.abs().max() > 0
    assert all(p.grad is None and p.requires_grad for p in adversary.net.parameters())


def test_averages_of_logits_follow_what_was_seen(rng: torch.Generator) -> None:
    adversary = Adversary(World(), lecam=0.0, **SHAPE | {"lr": 0.0})
    images = torch.rand(2, 4, 3, 32, 32, generator=rng)
    with torch.no_grad():
        logits = [adversary.net(x * 2 - 1).mean() for x in images]
    for _ in range(3):
        adversary.learn(images[0], images[1], bf16=False)
    torch.testing.assert_close(adversary.means, torch.stack(logits), atol=1e-5, rtol=1e-4)
    again = Adversary(World(), lecam=0.0, **SHAPE)
    again.restore(adversary.state())
    assert torch.equal(again.means, adversary.means) and again.steps == 3
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.net.parameters(), adversary.net.parameters(), strict=True)
    )


def test_images_too_small_for_its_layers_are_refused() -> None:
    with pytest.raises(InputError, match="give fewer"):
        Adversary(World(), image_size=16, in_channels=3, layers=3, lr=1e-3, lecam=0.0)
