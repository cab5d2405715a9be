"""Heads of probes against their definitions; banks of heads against the heads alone."""

import copy

import pytest
import torch
from torch import nn

from lvm.config import ModelConfig, Patches
from lvm.probing.features import mean_of
from lvm.probing.heads import (
    AttentiveBank,
    AttentiveHead,
    LinearBank,
    LinearHead,
    classify,
    read_head,
)
from lvm.probing.trunk import PatchTrunk, chosen_blocks
from lvm.vision import VisionModel
from tokenizer.cli import InputError

B, N, D, H, K = 6, 5, 8, 2, 3


def drawn(module: nn.Module, rng: torch.Generator) -> nn.Module:
    """Give every parameter, and the statistics of batch norm, values far from their first."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=rng))
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=rng) + 0.5)
    return module


@pytest.fixture
def x(rng) -> torch.Tensor:
    return 3 * torch.randn(B, N, D, generator=rng) + 1


@pytest.mark.parametrize(
    ("width", "heads", "count"),
    [(1536, 12, 6_256_128), (2048, 16, 10_438_656), (3072, 24, 21_949_440), (4096, 32, 37_654_528)],
)
def test_attentive_heads_have_the_published_size_and_names(width, heads, count):
    """Counts and names of Apple's released heads of 600M, 1B, 3B and 7B."""
    with torch.device("meta"):
        head = AttentiveHead(width, heads, 1000)
    assert sum(p.numel() for p in head.parameters()) == count == 2 * width**2 + 1001 * width
    assert {f"head.{name}" for name in head.state_dict()} == {
        "head.cls_token", "head.k.weight", "head.v.weight", "head.linear.weight",
        "head.bn.running_mean", "head.bn.running_var", "head.bn.num_batches_tracked",
    }  # fmt: skip


def test_attentive_head_is_its_definition(x, rng):
    head = drawn(AttentiveHead(D, H, K), rng).eval()
    z = (x - head.bn.running_mean) / (head.bn.running_var + 1e-6).sqrt()
    answers = []
    for image in z:
        parts = []
        for h in range(H):
            rows = slice(h * D // H, (h + 1) * D // H)
            query = head.cls_token[0, 0, rows]
            key, value = image @ head.k.weight[rows].T, image @ head.v.weight[rows].T
            weights = (key @ query / (D // H) ** 0.5).softmax(0)
            parts.append(weights @ value)
        answers.append(head.linear.weight @ torch.cat(parts))
    # fp32 sums of 8 to 40 products of order one, in another order
    torch.testing.assert_close(head(x), torch.stack(answers), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [LinearHead, AttentiveHead])
def test_batch_norm_reads_the_batch_in_training_and_its_averages_after(kind, x):
    head = LinearHead(D, K) if kind is LinearHead else AttentiveHead(D, H, K)
    seen = x.mean(1) if kind is LinearHead else x.flatten(0, 1)
    assert head.bn.eps == 1e-6
    assert not head.bn.affine
    inside = []
    head.bn.register_forward_hook(lambda module, args, out: inside.append(out))

    def normalised(mean: torch.Tensor, var: torch.Tensor) -> None:
        given = seen if kind is LinearHead else x.transpose(1, 2)
        shape = (-1,) if kind is LinearHead else (-1, 1)
        wanted = (given - mean.view(shape)) / (var.view(shape) + 1e-6).sqrt()
        torch.testing.assert_close(inside.pop(), wanted, rtol=1e-5, atol=1e-5)

    head.train()(x)
    normalised(seen.mean(0), seen.var(0, unbiased=False))
    torch.testing.assert_close(head.bn.running_mean, 0.1 * seen.mean(0))
    torch.testing.assert_close(head.bn.running_var, 0.9 + 0.1 * seen.var(0))  # unbiased
    before = copy.deepcopy(head.bn.state_dict())
    head.eval()(x)
    normalised(before["running_mean"], before["running_var"])
    assert all(torch.equal(v, before[k]) for k, v in head.bn.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_attentive_bank_equals_its_heads_and_their_gradients(training, x, rng):
    bank = drawn(AttentiveBank(D, H, K, settings=3), rng).train(training)
    alone = [copy.deepcopy(bank.member(i)) for i in range(3)]
    logits = bank(x)
    logits.square().sum().backward()
    for i, head in enumerate(alone):
        found = head(x)
        # fp32; the bank multiplies in another order, values are of order ten
        torch.testing.assert_close(logits[i], found, rtol=1e-4, atol=1e-4)
        found.square().sum().backward()
        for (name, a), b in zip(head.named_parameters(), bank.members[i].parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=2e-3, atol=2e-3, msg=name)
    for name, buffer in bank.member(1).named_buffers():
        torch.testing.assert_close(buffer, dict(alone[1].named_buffers())[name])


@pytest.mark.parametrize("training", [True, False])
def test_linear_bank_equals_its_heads_on_the_mean_of_their_blocks(training, x, rng):
    """Four blocks, two windows of two and three, two settings: the mean of pooled blocks is the
    pooled mean of blocks."""
    blocks = [x, x.square(), x.flip(2), x.sin()]
    sets = [(0, 1), (1, 2, 3)]
    windows = torch.zeros(2, 4)
    for w, chosen in enumerate(sets):
        windows[w, list(chosen)] = 1 / len(chosen)
    bank = drawn(LinearBank(D, K, windows=windows, settings=2), rng).train(training)
    alone = [copy.deepcopy(bank.member(m)) for m in range(4)]
    logits = bank(torch.stack([b.mean(1) for b in blocks], 1))
    for m, head in enumerate(alone):
        found = head(mean_of([blocks[i] for i in sets[m // 2]]))
        torch.testing.assert_close(logits[m], found, rtol=1e-4, atol=1e-4)  # fp32, other order
        for name, buffer in bank.member(m).named_buffers():
            torch.testing.assert_close(buffer, dict(head.named_buffers())[name])


@pytest.mark.parametrize("kind", [LinearHead, AttentiveHead])
def test_a_probe_reads_the_raw_mean_of_the_chosen_blocks(kind, rng):
    """By hooks on the blocks themselves; the trunk's last norm is not part of it."""
    config = ModelConfig(
        width=12, layers=4, heads=2, ffn=24, rotary=False, norm="layer", mlp="gelu"
    )
    model = drawn(VisionModel(config, Patches(image_size=8, size=4)), rng)
    trunk = PatchTrunk(model.eval())
    head = LinearHead(12, K) if kind is LinearHead else AttentiveHead(12, 2, K)
    drawn(head, rng).eval()
    outputs = {}
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda module, args, out, i=i: outputs.update({i: out}))
    images = torch.randint(0, 256, (B, 3, 8, 8), generator=rng, dtype=torch.uint8)
    with torch.no_grad():
        found = classify(trunk, head, [0, 2], images)
        wanted = head((outputs[0] + outputs[2]) / 2)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert max(outputs) == 2, "a block after the last wanted was computed"


def test_blocks_are_those_asked_for():
    assert chosen_blocks(["last"], blocks=24, window=6) == [(18, 19, 20, 21, 22, 23)]
    assert chosen_blocks(["last"], blocks=4, window=6) == [(0, 1, 2, 3)]
    best = chosen_blocks(["best"], blocks=24, window=6)
    assert len(best) == 19
    assert (14, 15, 16, 17, 18, 19) in best  # AIM-600M's, by its authors
    assert chosen_blocks(["3", "1"], blocks=4, window=6) == [(1, 3)]
    for wrong in (["4"], ["-1"], ["last", "1"], []):
        with pytest.raises(InputError, match="from 0 to 3"):
            chosen_blocks(wrong, blocks=4, window=6)


def test_a_head_is_read_from_a_file_of_apples(tmp_path, rng, x):
    config = ModelConfig(width=D, layers=1, heads=H, ffn=8, rotary=False)
    trunk = PatchTrunk(VisionModel(config, Patches(image_size=8, size=4)))
    head = drawn(AttentiveHead(D, H, K), rng).eval()
    state = {f"head.{name}": value for name, value in head.state_dict().items()}
    torch.save(state, tmp_path / "head.pth")
    torch.testing.assert_close(read_head(tmp_path / "head.pth", trunk)(x), head(x))
    torch.save({"trunk.x": torch.zeros(1)}, tmp_path / "trunk.pth")
    with pytest.raises(InputError, match="no attentive head"):
        read_head(tmp_path / "trunk.pth", trunk)
    torch.save({k: v[..., :4] if v.dim() else v for k, v in state.items()}, tmp_path / "wide.pth")
    with pytest.raises(InputError, match=r"k\.weight"):
        read_head(tmp_path / "wide.pth", trunk)
