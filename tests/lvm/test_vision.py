"""AIM: shapes as published, masks and losses against slow references, released key sets."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import lvm
from lvm import apple, export
from lvm.config import ModelConfig, Patches
from lvm.mask import allowed
from lvm.objectives.next_patch import next_embedding
from lvm.patch_learner import PatchLearner, refuse_sight
from lvm.patches import (
    normalise,
    patchify,
    pixel_targets,
    reading_order,
    scored,
    sequence,
    sincos,
    unpatchify,
)
from lvm.recipes import recipe
from lvm.vision import HeadBlock, PixelHead, VisionModel, flops_per_token, head_config
from tokenizer.cli import CommandError, InputError
from visual_sentences.image_loader import Images

TRUNK = ModelConfig(
    width=32, ffn=128, layers=2, heads=2, rotary=False, norm="layer", mlp="gelu", init="xavier"
)
SMALL = Patches(image_size=16, size=4, head_width=16, head_depth=2)


def images_of(count, patches=SMALL, *, prefix=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = patches.image_size
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8)
    if prefix is None:
        prefix = torch.randint(1, patches.count, (count,), generator=generator)
    return Images(
        pixels=pixels,
        prefix=torch.as_tensor(prefix, dtype=torch.int32),
        label=torch.zeros(count, dtype=torch.int32),
        source=torch.zeros(count, dtype=torch.int32),
        places=patches.count,
        step=patches.step,
    )


def learner_of(config=TRUNK, patches=SMALL, *, seed=0):
    learner = PatchLearner(config, patches)
    with torch.no_grad():
        for parameter, values in learner.draw_weights(seed):
            # Norms away from 1, so that a norm left out is seen.
            parameter.copy_(values + 0.2 * torch.randn_like(values) * (values == 1))
    return learner


@pytest.mark.parametrize(
    ("name", "trunk", "embedding"),
    [
        ("aim_600m", 679_627_776, 907_776),
        ("aim_1b", 1_208_160_256, 1_210_368),
        ("aim_3b", 2_718_210_048, 1_815_552),
        ("aim_7b", 6_442_983_424, 2_420_736),
    ],
)
def test_parameters_are_those_that_apple_published(name, trunk, embedding):
    run = recipe(name)
    with torch.device("meta"):
        model = VisionModel(run.model, run.patches)
        head = PixelHead(run.model, run.patches)
    counted = sum(p.numel() for p in model.embed.parameters())
    assert counted == embedding
    assert sum(p.numel() for p in model.parameters()) - counted == trunk
    assert run.model.num_params(embeddings=False) == trunk
    assert head.proj.out_features == 2048 and len(head.layers) == 12


@pytest.mark.parametrize(("name", "percent"), [("aim_600m", 60), ("aim_1b", 34), ("aim_7b", 6)])
def test_the_head_adds_to_the_flops_what_the_recipe_says(name, percent):
    run = recipe(name)
    whole = flops_per_token(run.model, run.patches)
    bare = flops_per_token(run.model, run.patches, head=False)
    # Of the matrices of the trunk alone, which is what the recipe states, in whole points.
    assert 100 * (whole - bare) / (6 * run.model.matrices) == pytest.approx(percent, abs=0.7)


def test_patches_go_there_and_back_in_row_column_channel_order():
    images = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
    patches = patchify(images, 4)
    assert patches.shape == (2, 4, 48)
    assert torch.equal(unpatchify(patches, 4), images)
    first = [float(images[0, c, 4 + r, k]) for r in range(4) for k in range(4) for c in range(3)]
    assert patches[0, 2].tolist() == first  # third patch: second row of patches


def test_positions_are_sines_and_cosines_of_the_column_and_then_of_the_row():
    table = sincos(3, 2, dim=8)
    for place, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        wanted = [
            f(value * 10_000 ** -(i / 2))
            for value in (column, row)
            for f in (math.sin, math.cos)
            for i in range(2)
        ]
        assert table[place].tolist() == pytest.approx(wanted, abs=1e-7)


def test_a_constant_zero_has_the_loss_that_unbiased_variance_gives():
    """(N - 1) / N of 588 values: 0.9983, measured with Apple's code too."""
    images = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    target = pixel_targets(images, 14)
    assert float(target.square().mean()) == pytest.approx(587 / 588, abs=1e-3)
    slow = patchify(images, 14)[1, 7].double()
    mean = sum(slow.tolist()) / 588
    variance = sum((x - mean) ** 2 for x in slow.tolist()) / 587
    wanted = (slow - mean) / math.sqrt(variance + 1e-6)
    torch.testing.assert_close(target[1, 7].double(), wanted, atol=1e-5, rtol=1e-5)  # fp32 sums


def test_the_prefix_mask_is_its_definition_for_every_length():
    count = SMALL.count
    prefix = torch.arange(1, count, dtype=torch.int32)
    order = reading_order(prefix, SMALL)
    reads = allowed(torch.zeros_like(order), order)
    for s in range(1, count):
        for q in range(count):
            for k in range(count):
                assert bool(reads[s - 1, q, k]) == (k < s or k <= q)


def test_what_counts_is_every_patch_after_the_prefix_once():
    prefix = torch.arange(1, SMALL.count, dtype=torch.int32)
    counts = scored(prefix, SMALL)
    for s in range(1, SMALL.count):
        predicted = {q + 1 for q in range(SMALL.count) if counts[s - 1, q]}
        assert predicted == set(range(s, SMALL.count))
    batch = images_of(15, prefix=prefix)
    assert int(batch.predicted) == int(counts.sum())
    causal = replace(SMALL, prefix=False)
    assert int(scored(torch.zeros(1), causal).sum()) == SMALL.count - 1


def slow_loss(learner, batch):
    """AIM's loss image by image, place by place, through masks of booleans and no batch."""
    patches, total, count = learner.patches, 0.0, 0
    model, order = learner.model, sequence(patches)
    images = normalise(batch.pixels, patches)
    for image, s in zip(images, batch.prefix.tolist(), strict=True):
        kernel = model.embed.proj
        cut = image.unfold(1, patches.size, patches.size).unfold(2, patches.size, patches.size)
        flat = cut.permute(1, 2, 0, 3, 4).reshape(patches.count, -1)  # channel, row, column
        x = model.embed.norm(flat @ kernel.weight.flatten(1).T + kernel.bias)
        x = (x + sincos(patches.side, patches.side, dim=x.shape[-1]))[order]
        seen = torch.tensor(
            [[k < s or k <= q for k in range(patches.count)] for q in range(patches.count)]
        )
        for block in model.layers:
            h = block.attn_norm(x)
            heads = block.attn
            q, k, v = (y(h).unflatten(-1, (-1, heads.dim)) for y in (heads.q, heads.k, heads.v))
            scores = torch.einsum("qhc,khc->hqk", q, k) / math.sqrt(heads.dim)
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            x = x + heads.o(torch.einsum("hqk,khc->qhc", weights, v).flatten(1))
            x = x + block.mlp.down(nn.functional.gelu(block.mlp.up(block.mlp_norm(x))))
        head = learner.head
        y = head.proj(model.norm(x)) + sincos(4, 4, dim=head.proj.out_features)[order]
        for block in head.layers:
            y = y + block.attn_norm(y)
            y = y + block.mlp.down(nn.functional.gelu(block.mlp.up(block.mlp_norm(y))))
        y = head.pred(head.norm(y))
        for place in range(patches.count - 1):
            if place + 1 >= s:
                row, column = divmod(int(order[place + 1]), patches.side)
                size = patches.size
                window = image[
                    :, row * size : (row + 1) * size, column * size : (column + 1) * size
                ]
                values = window.permute(1, 2, 0).flatten().double()
                goal = (values - values.mean()) / (values.var(correction=1) + 1e-6).sqrt()
                total += float((y[place].double() - goal).square().mean())
                count += 1
    return total, count


@pytest.mark.parametrize("order", ["raster", "spiral", "checkerboard", "random"])
def test_the_loss_is_that_of_a_slow_reference(order):
    learner = learner_of(patches=replace(SMALL, order=order))
    batch = images_of(3, learner.patches)
    with torch.no_grad():
        sums = learner(batch)
        total, count = slow_loss(learner, batch)
    assert int(sums.count) == count == int(batch.predicted)
    assert float(sums.loss) == pytest.approx(total, rel=2e-5)  # fp32 against sums in double


@pytest.mark.parametrize(
    "patches",
    [
        SMALL,
        replace(SMALL, order="spiral"),
        replace(SMALL, prefix=False),
        replace(SMALL, prefix=False, block=2),
        replace(SMALL, prefix=False, target="embedding"),
    ],
    ids=["prefix", "spiral", "causal", "blocks", "embedding"],
)
def test_no_place_sees_what_it_predicts(patches):
    """Gradient probe: a place's features do not depend on patches that its mask hides."""
    learner = learner_of(patches=patches)
    s = 5 if patches.prefix else 0
    batch = images_of(1, patches, prefix=[s])
    model, order = learner.model, sequence(patches)
    x = model.embed(normalise(batch.pixels, patches))[:, torch.from_numpy(order)]
    x = x.detach().requires_grad_()
    numbers = reading_order(batch.prefix, patches)
    from lvm.mask import attention_mask

    mask = attention_mask(torch.zeros_like(numbers), numbers)
    features = model.features(x, mask)
    reads = allowed(torch.zeros_like(numbers), numbers)[0]
    for q in range(patches.count):
        (gradient,) = torch.autograd.grad(features[0, q].sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0
        assert torch.equal(seen, reads[q])
        if scored(batch.prefix, patches)[0, q]:
            assert not seen[q + patches.step]
    refuse_sight(batch, patches)


def test_a_mask_that_shows_the_answer_is_refused(monkeypatch):
    monkeypatch.setattr(
        "lvm.patch_learner.reading_order", lambda prefix, patches: torch.zeros(2, 16).int()
    )
    with pytest.raises(CommandError, match="may read the patch they predict"):
        refuse_sight(images_of(2), SMALL)


def test_a_block_predicts_the_same_place_of_the_next_block():
    patches = replace(SMALL, prefix=False, block=2)
    order = sequence(patches)
    assert order[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]  # 4 x 4 patches in blocks of 2 x 2
    numbers = reading_order(torch.zeros(1, dtype=torch.int32), patches)
    assert numbers[0].tolist() == [i // 4 for i in range(16)]
    assert scored(torch.zeros(1), patches)[0].tolist() == [i < 12 for i in range(16)]


def test_orders_are_permutations_and_start_as_published():
    for order in ("raster", "spiral", "checkerboard", "random"):
        for side in (16, 14, 7):
            found = sequence(Patches(image_size=side * 14, order=order))
            assert sorted(found.tolist()) == list(range(side * side))
    starts = {
        order: sequence(Patches(order=order))[:6].tolist()
        for order in ("spiral", "checkerboard", "raster")
    }
    assert starts["spiral"] == [120, 136, 135, 119, 103, 104]
    assert starts["checkerboard"] == [0, 2, 4, 6, 8, 10]


def test_the_embedding_is_a_target_without_a_gradient():
    patches = replace(SMALL, prefix=False, target="embedding")
    learner = learner_of(patches=patches)
    assert learner.head is None
    batch = images_of(2, patches)
    with torch.no_grad():
        x = learner.model.embed(normalise(batch.pixels, patches))
        order = reading_order(batch.prefix * 0, patches)
        from lvm.mask import attention_mask

        y = learner.model.features(x, attention_mask(torch.zeros_like(order), order))
    slow = sum(
        1 - float(torch.dot(a, b) / (a.norm() * b.norm()))
        for i in range(2)
        for a, b in zip(y[i, :-1], x[i, 1:], strict=True)
    )
    sums = learner(replace(batch, prefix=batch.prefix * 0))
    assert float(sums.loss.detach()) == pytest.approx(slow, rel=1e-5)  # sums in another order


def test_the_target_embedding_gets_no_gradient_but_the_features_do():
    generator = torch.Generator().manual_seed(0)
    found, goal = (torch.randn(2, 6, 8, generator=generator).requires_grad_() for _ in range(2))
    sums = next_embedding(found, goal, torch.ones(2, 6, dtype=torch.bool))
    sums.loss.backward()
    assert goal.grad is None and int(sums.count) == 10
    assert (found.grad[:, :-1].abs().sum(-1) > 0).all() and not found.grad[:, -1].any()


def test_the_head_block_keeps_apples_extra_residual():
    block = HeadBlock(head_config(TRUNK, SMALL))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        middle = x + nn.functional.layer_norm(x, (16,), eps=TRUNK.norm_eps)
        inner = nn.functional.layer_norm(middle, (16,), eps=TRUNK.norm_eps)
        mlp = nn.functional.gelu(inner @ block.mlp.up.weight.T) @ block.mlp.down.weight.T
        torch.testing.assert_close(block(x), middle + mlp, atol=1e-6, rtol=1e-6)


def test_splitting_a_batch_changes_neither_its_sums_nor_its_count():
    learner = learner_of()
    batch = images_of(6)
    with torch.no_grad():
        whole = learner(batch)
        parts = [learner(part) for part in batch.split(2)]
    assert sum(int(p.count) for p in parts) == int(whole.count)
    assert sum(float(p.loss) for p in parts) == pytest.approx(float(whole.loss), rel=1e-6)


def test_sums_by_kind_are_parts_of_the_whole():
    learner = learner_of()
    batch = images_of(4)
    kind = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        apart, whole = learner(batch, kind, 2), learner(batch)
    assert apart.loss.shape == (2,)
    assert float(apart.loss.sum()) == pytest.approx(float(whole.loss), rel=1e-6)
    assert int(apart.count[0]) == int(learner(replace(batch, source=-kind.int())).count)


def test_features_are_raw_streams_and_stop_at_the_last_wanted():
    model = learner_of().model.eval()
    images = images_of(2).pixels
    seen = []
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, i=i: seen.append(i))
    with torch.no_grad():
        first, last = model.block_outputs(images, [0, 1])
        assert torch.equal(model.norm(last), model(images))
        seen.clear()
        assert torch.equal(model.block_outputs(images, [0])[0], first)
    assert seen == [0]


# Released weights --------------------------------------------------------------------------------


def apple_state(config, patches, *, version, classes=0, seed=0):
    """Return tensors under the names of Apple's files, drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    d, n = config.width, patches.count
    norm = ("weight", "bias") if version == 1 else ("weight",)
    state = {
        "preprocessor.patchifier.proj.weight": draw(d, 3, patches.size, patches.size),
        "preprocessor.patchifier.proj.bias": draw(d),
        **{f"preprocessor.patchifier.norm.{k}": draw(d) for k in norm},
        **{f"trunk.post_trunk_norm.{k}": draw(d) for k in norm},
    }
    if version == 2:
        state["preprocessor.pos_embed"] = draw(1, n, d)
    for i in range(config.layers):
        block = f"trunk.blocks.{i}."
        state[block + "attn.qkv.weight"] = draw(3 * d, d)
        state[block + "attn.proj.weight"] = draw(d, d)
        state |= {f"{block}norm_{j}.{k}": draw(d) for j in (1, 2) for k in norm}
        state[block + "mlp.fc1.weight"] = draw(config.ffn, d)
        state[block + "mlp.fc2.weight"] = draw(d, config.ffn)
        if version == 2:
            state[block + "mlp.fc3.weight"] = draw(config.ffn, d)
    if classes:
        state |= {
            "head.cls_token": draw(1, 1, d),
            "head.k.weight": draw(d, d),
            "head.v.weight": draw(d, d),
            "head.linear.weight": draw(classes, d),
            "head.bn.running_mean": draw(d),
            "head.bn.running_var": draw(d).abs(),
            "head.bn.num_batches_tracked": torch.tensor(7),
        }
    return state


WIDE = replace(TRUNK, width=256, ffn=320, heads=2, norm_eps=1e-6)


def test_apples_file_opens_as_a_model_with_its_head_apart(tmp_path):
    state = apple_state(WIDE, Patches(), version=1, classes=10)
    torch.save(state, tmp_path / "aim_backbone.pth")
    found = apple.read(tmp_path / "aim_backbone.pth")
    assert found.head.keys() == {
        "cls_token", "k.weight", "v.weight", "linear.weight",
        "bn.running_mean", "bn.running_var", "bn.num_batches_tracked",
    }  # fmt: skip
    model = lvm.load(tmp_path / "aim_backbone.pth")
    assert isinstance(model, VisionModel)
    assert model.config == replace(WIDE, layers=2)
    assert model.patches.count == 256
    q, _, v = state["trunk.blocks.1.attn.qkv.weight"].chunk(3)
    assert torch.equal(model.layers[1].attn.q.weight, q)
    assert torch.equal(model.layers[1].attn.v.weight, v)
    assert torch.equal(model.layers[0].mlp.up.weight, state["trunk.blocks.0.mlp.fc1.weight"])


def test_the_key_set_of_every_size_is_apples():
    """205 names for 24 blocks, 269 for 32, the probe's head among them."""
    for name, count in (("aim_600m", 205), ("aim_7b", 269)):
        run = recipe(name)
        with torch.device("meta"):
            ours = VisionModel(run.model, run.patches).state_dict()
        fused = {re.sub(r"attn\.[qkv]\.", "attn.qkv.", k) for k in ours}
        assert len(fused) + 7 == count


def test_ml_l3ms_split_names_are_the_same_model(tmp_path):
    state = apple_state(WIDE, Patches(), version=1)
    split = {"preprocessor.blocks.0.pos_embed": torch.zeros(1, 256, 256)}
    for name, tensor in state.items():
        name = name.replace("preprocessor.patchifier", "preprocessor.blocks.0.patchifier")
        if name.endswith("qkv.weight"):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace("qkv", f"{part}_proj")] = rows.clone()
        else:
            split[name] = tensor
    torch.save(state, tmp_path / "one.pth")
    torch.save(split, tmp_path / "two.pth")
    one, two = lvm.load(tmp_path / "one.pth"), lvm.load(tmp_path / "two.pth")
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture
def aimv2():
    transformers = pytest.importorskip("transformers", reason="the oracle; in the extra dev")
    config = transformers.Aimv2VisionConfig(
        hidden_size=256, num_hidden_layers=3, num_attention_heads=2, intermediate_size=320,
        image_size=56, patch_size=14, use_head=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Aimv2VisionModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return theirs


def test_aimv2_blocks_equal_transformers(aimv2, tmp_path):
    aimv2.save_pretrained(tmp_path / "v2")
    ours = lvm.load(tmp_path / "v2")
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        found = aimv2(pixels, output_hidden_states=True)
        x = ours.embed(pixels)
        torch.testing.assert_close(x, found.hidden_states[0], atol=1e-5, rtol=1e-5)
        streams = list(ours._stream(x, None))
        for ours_, theirs in zip(streams[:2], found.hidden_states[1:3], strict=True):
            torch.testing.assert_close(ours_, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.features(x), found.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_apples_names_of_aimv2_are_the_same_model(aimv2, tmp_path):
    theirs = aimv2.state_dict()
    state = {
        "preprocessor.patchifier.proj.weight": theirs["embeddings.patch_embed.weight"],
        "preprocessor.patchifier.proj.bias": theirs["embeddings.patch_embed.bias"],
        "preprocessor.patchifier.norm.weight": theirs["embeddings.rms_norm.weight"],
        "preprocessor.pos_embed": theirs["embeddings.position_embedding.weight"][None],
        "trunk.post_trunk_norm.weight": theirs["rms_norm.weight"],
    }
    for i in range(3):
        a, b = f"encoder.layers.{i}.", f"trunk.blocks.{i}."
        parts = [theirs[f"{a}attention.{p}_proj.weight"] for p in "qkv"]
        state[b + "attn.qkv.weight"] = torch.cat(parts)
        state[b + "attn.proj.weight"] = theirs[a + "attention.out_proj.weight"]
        state[b + "norm_1.weight"] = theirs[a + "rms_norm1.weight"]
        state[b + "norm_2.weight"] = theirs[a + "rms_norm2.weight"]
        for ours, name in (("fc1", "gate"), ("fc3", "up"), ("fc2", "down")):
            state[f"{b}mlp.{ours}.weight"] = theirs[f"{a}ffn.{name}_proj.weight"]
    torch.save(state, tmp_path / "v2.pth")
    model = lvm.load(tmp_path / "v2.pth")
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(
            model.features(model.embed(pixels)),
            aimv2(pixels).last_hidden_state,
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("trunk.blocks.1.mlp.fc2.weight"), "layers.1.mlp.down.weight"),
        (lambda s: s.update({"trunk.extra": torch.zeros(1)}), "trunk.extra"),
        (lambda s: s.pop("preprocessor.patchifier.proj.weight"), "embed.proj.weight"),
    ],
    ids=["missing", "surplus", "no kernel"],
)
def test_a_file_that_is_no_whole_aim_is_refused_by_name(tmp_path, change, said):
    state = apple_state(WIDE, Patches(), version=1)
    change(state)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=said):
        lvm.load(tmp_path / "bad.pth")


def test_an_export_opens_with_the_same_features(tmp_path):
    model = learner_of().model.eval()
    export.write(model, tmp_path / "m", format="native")
    again = lvm.load(tmp_path / "m")
    images = images_of(2).pixels
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    with pytest.raises(InputError, match="native"):
        export.write(model, tmp_path / "n", format="hf")
    export.write(model, tmp_path / "m", format="native")  # an earlier export is replaced


def test_a_downloaded_model_is_never_replaced_by_an_export(tmp_path):
    theirs = tmp_path / "LVM_ckpts"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "llama"}')
    (theirs / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match="which is no export"):
        export.write(learner_of().model, theirs, format="native")
    assert (theirs / "model.safetensors").read_bytes() == b"weights"


def test_a_float_image_is_the_same_as_bytes():
    pixels = images_of(1).pixels
    torch.testing.assert_close(
        normalise(pixels.float() / 255, SMALL), normalise(pixels, SMALL), atol=1e-6, rtol=0
    )


def test_prefixes_are_uniform_from_one_to_all_but_one(image_data):
    """Chi-square over 4,000 draws: 62 degrees of freedom, p > 0.001."""
    from visual_sentences.image_loader import Cut, ImageLoader, View

    cut = Cut(view=View(size=8), places=64)
    loader = ImageLoader(image_data, cut=cut, batch_rows=500, seed=1)
    batches = iter(loader)
    drawn = np.concatenate([next(batches).prefix.numpy() for _ in range(8)])
    counts = np.bincount(drawn, minlength=64)
    assert counts[0] == 0 and len(counts) == 64
    expected = len(drawn) / 63
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 102.2
