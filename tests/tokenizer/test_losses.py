"""Training terms against formulas written out, taming's quantiser, and plain autograd."""

import copy
from dataclasses import replace

import pytest
import torch
from taming.modules.vqvae.quantize import VectorQuantizer
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer import losses
from tokenizer.config import VQGANConfig
from tokenizer.presets import Recipe
from tokenizer.trainer import RISE, Trainer
from tokenizer.world import World

MODEL = VQGANConfig(
    image_size=16, channels=32, multipliers=(1, 2), res_blocks=1, latent_dim=16, code_dim=4,
    codebook_size=32,
)  # fmt: skip
RECIPE = Recipe(model=MODEL, steps=10, batch=4, plain=0.0, precision="fp32", patch_layers=2)


def test_legacy_vq_loss_and_its_gradients_are_those_of_taming(rng: torch.Generator) -> None:
    theirs = VectorQuantizer(8, 4, beta=0.25)
    torch.nn.init.normal_(theirs.embedding.weight, generator=rng)
    latents = torch.randn(2, 4, 3, 3, generator=rng, requires_grad=True)
    quantized, loss, _ = theirs(latents)
    pull = torch.randn(quantized.shape, generator=rng)  # what a decoder would send back
    wanted = torch.autograd.grad((quantized * pull).sum() + loss, [latents, *theirs.parameters()])

    codes = theirs.embedding.weight.detach().clone().requires_grad_()
    ours = latents.detach().clone().requires_grad_()
    points = ours.movedim(1, -1)
    picked = torch.cdist(points.flatten(0, 2), codes).argmin(1)
    chosen = codes[picked].view_as(points)
    own = losses.vq_loss(points, chosen, beta=0.25, legacy=True)
    through = (points + (chosen - points).detach()).movedim(-1, 1)
    found = torch.autograd.grad((through * pull).sum() + own, [ours, codes])
    torch.testing.assert_close(own, loss)
    torch.testing.assert_close(through, quantized)
    for mine, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize(("legacy", "on_latents", "on_codes"), [(False, 0.3, 1), (True, 1, 0.3)])
def test_beta_weighs_one_side_of_the_vq_loss(legacy, on_latents, on_codes, rng) -> None:
    latents, chosen = torch.randn(2, 5, 4, generator=rng, requires_grad=True).unbind()
    loss = losses.vq_loss(latents, chosen, beta=0.3, legacy=legacy)
    gap = 2 * (latents - chosen).detach() / latents.numel()
    pulls = torch.autograd.grad(loss, [latents, chosen])
    torch.testing.assert_close(pulls[0], on_latents * gap)
    torch.testing.assert_close(pulls[1], -on_codes * gap)
    torch.testing.assert_close(loss, 1.3 * (latents - chosen).square().mean())


def test_hinge_losses_are_their_formulas() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.5])
    # real: 0, 0.5, 2 below the margin of 1; fake: 0, 1, 2.5 above that of -1
    assert losses.hinge_judge(real, fake) == pytest.approx(0.5 * (2.5 / 3 + 3.5 / 3))
    assert losses.hinge_deceive(fake) == pytest.approx(0.5)


def test_lecam_holds_logits_to_the_averages_of_the_other_kind() -> None:
    real, fake = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])
    means = {"real_mean": torch.tensor(0.75), "fake_mean": torch.tensor(-0.5)}
    # real above -0.5: by 1.5 and not at all; fake below 0.75: by 0.25 and 1.75
    wanted = 1.5**2 / 2 + (0.25**2 + 1.75**2) / 2
    assert losses.lecam(real, fake, **means) == pytest.approx(wanted)


def test_entropy_is_that_of_sums_written_out(rng: torch.Generator) -> None:
    points = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    codes = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    shares = []
    for point in points:
        weights = [torch.exp(-((point - code) ** 2).sum() / 0.7) for code in codes]
        shares.append(torch.stack([w / sum(weights) for w in weights]))
    each = torch.stack([-(p * p.log()).sum() for p in shares]).mean()
    mean = torch.stack(shares).mean(0)
    found = losses.entropy(points, codes, temperature=0.7, world=World())
    torch.testing.assert_close(found, each + (mean * mean.log()).sum())
    # A latent on each code: certain one by one, spread over all together.
    sharp = losses.entropy(codes, codes, temperature=1e-3, world=World())
    assert float(sharp) == pytest.approx(-torch.tensor(4.0).log().item(), abs=1e-6)


def test_edge_term_sees_differences_and_no_offset(rng: torch.Generator) -> None:
    images = torch.rand(2, 3, 8, 8, generator=rng)
    assert losses.edge_l1(images + 0.25, images) == pytest.approx(0.0, abs=1e-7)
    step = torch.zeros(1, 1, 2, 2)
    step[..., 1] = 1.0  # one edge of height 1 across, in both rows, and none down
    assert losses.edge_l1(step, torch.zeros_like(step)) == pytest.approx(0.5)


def ready(recipe: Recipe) -> tuple[Trainer, Tensor]:
    """Return a trainer that quantises already, and a batch."""
    trainer = Trainer(recipe, World())
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    trainer.start_codes(iter([pixels] * 100))
    return trainer, pixels


class Blurred(nn.Module):
    """Stands for a perceptual net, which is tested by itself: a distance of averaged pixels."""

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return (F.avg_pool2d(images, 4) - F.avg_pool2d(targets, 4)).square().mean((1, 2, 3))


@pytest.mark.parametrize("adaptive", [True, False])
def test_one_step_has_the_gradients_of_one_plain_loss(
    adaptive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step runs each judge backward once; autograd over the sum of all terms must agree."""
    asked = []
    monkeypatch.setattr(
        "tokenizer.trainer.load_perceptual", lambda *names: asked.append(names) or Blurred()
    )
    recipe = replace(
        RECIPE, codes="gradient", adversarial=0.8, adversarial_from=0.2, adaptive=adaptive,
        entropy=0.1, clip=1e9, perceptual="vgg.pth", perceptual_weight=0.7,
    )  # fmt: skip
    trainer, pixels = ready(recipe)
    fraction = 0.2 + RISE / 4  # where the adversarial term has a quarter of its weight
    model, judge = copy.deepcopy(trainer.model), copy.deepcopy(trainer.adversary.net)
    parts = trainer.learn(pixels, fraction)

    images = pixels.float() / 255
    latents = model.latents(images).movedim(1, -1)
    codes = model.quantize.search(latents.detach().movedim(-1, 1))
    chosen = model.quantize.lookup(codes).view_as(latents)
    restored = model.pixels((latents + (chosen - latents).detach()).movedim(-1, 1))
    base = F.l1_loss(restored, images) + 2.0 * F.mse_loss(restored, images)
    base = base + 0.5 * losses.edge_l1(restored, images)
    base = base + 0.7 * Blurred()(restored, images).mean()
    deceive = -judge(restored * 2 - 1).mean()
    last = model.decoder.conv_out.weight
    scale = 1.0
    if adaptive:
        (of_base,) = torch.autograd.grad(base, last, retain_graph=True)
        (of_judge,) = torch.autograd.grad(deceive, last, retain_graph=True)
        scale = float(of_base.norm() / (of_judge.norm() + 1e-4))
        assert float(parts["adaptive"]) == pytest.approx(scale, rel=1e-4)
    entropy = losses.entropy(
        latents.flatten(0, 2), model.quantize.vectors(), temperature=0.01, world=World()
    )
    vq = F.mse_loss(chosen, latents.detach()) + 0.25 * F.mse_loss(latents, chosen.detach())
    loss = base + 0.25 * 0.8 * scale * deceive + vq + 0.1 * entropy
    loss.backward()
    assert asked == [("vgg.pth", None)]
    assert float(parts["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        # fp32 sums of the same terms in another order, down a network of a dozen layers
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_codes_that_move_by_averages_have_the_commitment_term_alone() -> None:
    trainer, pixels = ready(replace(RECIPE, codes="ema"))
    with torch.no_grad():
        latents = trainer.model.latents(pixels.float() / 255)
        codes = trainer.model.quantize.search(latents)
        chosen = trainer.model.quantize.lookup(codes).view(4, 8, 8, 4).movedim(-1, 1)
        wanted = 0.25 * F.mse_loss(latents, chosen)
    before = trainer.model.quantize.embedding.weight.clone()
    parts = trainer.learn(pixels, 0.1)
    torch.testing.assert_close(parts["vq"], wanted)
    assert trainer.model.quantize.embedding.weight.grad is None
    assert not torch.equal(trainer.model.quantize.embedding.weight, before)


def test_before_its_part_of_the_run_no_discriminator_takes_part() -> None:
    recipe = replace(RECIPE, adversarial=0.8, adversarial_from=0.5)
    trainer, pixels = ready(recipe)
    assert "judge" not in trainer.learn(pixels, 0.49) and trainer.adversary.steps == 0
    assert "judged" in trainer.learn(pixels, 0.51) and trainer.adversary.steps == 1
