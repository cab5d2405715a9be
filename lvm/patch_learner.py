"""A model of patches with its head and term: what an update of AIM and its kin computes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from kernels.attention import Backend
from kernels.mask import densify
from lvm.config import ModelConfig, Patches
from lvm.init import draw_weights
from lvm.mask import attention_mask
from lvm.objectives import Sums
from lvm.objectives.next_patch import next_embedding, next_pixels
from lvm.patches import normalise, pixel_targets, reading_order, scored
from lvm.vision import PixelHead, VisionModel, flops_per_token, order_of
from tokenizer.cli import CommandError
from visual_sentences.image_loader import Images


class PatchLearner(nn.Module):
    """The trunk, its head and the term as one module, so that FSDP gathers all in one forward."""

    def __init__(
        self, config: ModelConfig, patches: Patches, *, attention: Backend = "auto"
    ) -> None:
        super().__init__()
        self.patches, self.attention = patches, attention
        self.model = VisionModel(config, patches)
        self.head = PixelHead(config, patches) if patches.target == "pixels" else None

    @property
    def blocks(self) -> list[nn.Module]:
        """The units of sharding, recomputation and compilation, in the order they run."""
        return [*self.model.layers, *(self.head.layers if self.head is not None else ())]

    def draw_weights(self, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return draw_weights(self, self.model.config, seed=seed)

    def flops_per_token(self, row_len: int, *, causal: bool = True) -> float:
        """Return training FLOPs a patch, the head's counted."""
        return flops_per_token(self.model.config, self.patches, causal=causal)

    @staticmethod
    def measures(nll: float, correct: float, count: float) -> dict[str, float]:
        """Return what a line says of sums over `count` patches: the mean distance."""
        return {"distance": nll / count}

    def forward(self, batch: Images, kind: Tensor | None = None, kinds: int = 0) -> Sums:
        """Return the sums of a batch; given the `kind` [B] of each image, tensors [kinds]."""
        patches = self.patches
        images = normalise(batch.pixels, patches)
        order = order_of(patches, images.device)
        mask = attention_mask(
            torch.zeros(batch.rows, patches.count, dtype=torch.int32, device=images.device),
            reading_order(batch.prefix, patches),
            backend=self.attention,
        )
        x = self.model.embed(images.to(self.model.embed.proj.weight.dtype))[:, order]
        features = self.model.features(x, mask)
        counts = scored(batch.prefix, patches) & (batch.source >= 0)[:, None]
        term: Callable[..., Sums] = next_embedding
        found, goal = features, x
        if self.head is not None:
            term, found = next_pixels, self.head(features, order)
            goal = pixel_targets(images, patches.size)[:, order]
        if kind is None:
            return term(found, goal, counts, step=patches.step)
        parts = [
            term(found, goal, counts & (kind == k)[:, None], step=patches.step)
            for k in range(kinds)
        ]
        return Sums.stack(parts)


def refuse_sight(batch: Images, patches: Patches) -> None:
    """Raise CommandError if the mask lets a place read the patch that it predicts."""
    order = reading_order(batch.prefix, patches)
    mask = attention_mask(torch.zeros_like(order), order, backend="sdpa")
    reads = densify(mask, patches.count)
    assert reads is not None, "an order that never falls has an interval mask"
    ahead = reads.diagonal(offset=patches.step, dim1=1, dim2=2)
    found = int((ahead & scored(batch.prefix, patches)[:, : -patches.step]).sum())
    if found:
        raise CommandError(
            f"{found} places of the first batch may read the patch they predict; a model trained "
            "like this learns to copy. This is a defect of the recipe's order or mask"
        )
