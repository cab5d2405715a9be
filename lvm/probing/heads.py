"""Heads of probes: one linear, one attentive, and banks of many that learn side by side.

B images, N positions, D width, K classes, W sets of blocks, R settings of the optimiser, M = W·R
members of a bank. Batch norm has neither weight nor bias and an eps of 1e-6 in both (El-Nouby et
al. 2024, section 3; for the linear probe as in He et al. 2022, appendix A).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lvm.probing.features import mean_of
from lvm.probing.trunk import Trunk
from tokenizer.cli import InputError
from tokenizer.formats.checkpoint import read_tensors
from tokenizer.interop import check_tensors

EPS = 1e-6


class LinearHead(nn.Module):
    """Batch norm and a linear layer on the mean over positions."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width, affine=False, eps=EPS)
        self.linear = nn.Linear(width, classes)

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] of features [B, N, D], or of their means [B, D]."""
        return self.linear(self.bn(x.mean(1) if x.dim() == 3 else x))


class AttentiveHead(nn.Module):
    """AIM's: one learned query attends to the normalised features in `heads` heads.

    Keys and values are projected without bias; neither the query nor the answer is projected; the
    classifier has no bias. Parameters: 2·D² + D + K·D. Names are those of the released heads.
    """

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.bn = nn.BatchNorm1d(width, affine=False, eps=EPS)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, classes, bias=False)

    def init_weights(self, generator: torch.Generator) -> None:
        width = self.k.in_features
        nn.init.normal_(self.cls_token, std=0.02, generator=generator)
        for matrix in (self.k.weight, self.v.weight, self.linear.weight):
            nn.init.uniform_(matrix, -(width**-0.5), width**-0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] of features [B, N, D]."""
        x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        q = self.cls_token.expand(len(x), -1, -1)
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (q, self.k(x), self.v(x))
        )
        found = F.scaled_dot_product_attention(q, k, v)
        return self.linear(found.transpose(1, 2).flatten(2).mean(1))


class LinearBank(nn.Module):
    """W·R linear heads on the pooled features of C sets of blocks, in two batched products.

    windows [W, C] says which mean of the sets each window reads. Each window has statistics of its
    own, which its R heads share. Member (w, r) has the number w·R + r.
    """

    def __init__(self, width: int, classes: int, *, windows: Tensor, settings: int) -> None:
        super().__init__()
        self.settings = settings
        self.windows: Tensor
        self.register_buffer("windows", windows, persistent=False)
        self.bn = nn.BatchNorm1d(len(windows) * width, affine=False, eps=EPS)
        count = len(windows) * settings
        self.members = nn.ModuleList(LinearHead(width, classes) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [M, B, K] of pooled features [B, C, D]."""
        count = len(self.windows)
        z = torch.einsum("wc,bcd->bwd", self.windows, x)
        z = self.bn(z.flatten(1)).unflatten(1, (count, -1)).transpose(0, 1)
        weight = _stack(self.members, "linear.weight").unflatten(0, (count, self.settings))
        bias = _stack(self.members, "linear.bias")
        logits = z @ weight.flatten(1, 2).transpose(1, 2)  # [W, B, R·K]
        logits = logits.unflatten(2, (self.settings, -1)).transpose(1, 2)
        return logits.flatten(0, 1) + bias[:, None]

    def member(self, number: int) -> LinearHead:
        """Return a head as a module of its own, its batch norm's statistics filled in."""
        head = self.members[number]
        assert isinstance(head, LinearHead)
        width = head.linear.in_features
        first = number // self.settings * width
        for name in ("running_mean", "running_var"):
            getattr(head.bn, name).copy_(getattr(self.bn, name)[first : first + width])
        assert head.bn.num_batches_tracked is not None and self.bn.num_batches_tracked is not None
        head.bn.num_batches_tracked.copy_(self.bn.num_batches_tracked)
        return head.train(self.training)


class AttentiveBank(nn.Module):
    """R attentive heads on the same features, in a fraction of the products of R modules.

    One query lets the projections of keys and values be folded: query times key is the feature
    times (Wk^T query), and the mean of values is Wv times the mean of features. That is
    2·N·D·H + D² products an image and member (H attention heads) in place of 2·N·D²: about a
    hundredth of it at AIM's 600M.
    """

    def __init__(self, width: int, heads: int, classes: int, *, settings: int) -> None:
        super().__init__()
        self.heads = heads
        self.bn = nn.BatchNorm1d(width, affine=False, eps=EPS)
        self.members = nn.ModuleList(AttentiveHead(width, heads, classes) for _ in range(settings))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [R, B, K] of features [B, N, D]."""
        z = self.bn(x.transpose(1, 2)).transpose(1, 2)
        query = _stack(self.members, "cls_token").flatten(1).unflatten(1, (self.heads, -1))
        key, value = (
            _stack(self.members, name).unflatten(1, (self.heads, -1))
            for name in ("k.weight", "v.weight")
        )  # [R, H, d, D]
        folded = torch.einsum("rhd,rhde->rhe", query, key) / math.sqrt(query.shape[-1])
        reads = (z @ folded.flatten(0, 1).T).softmax(1)  # [B, N, R·H]
        means = (reads.transpose(1, 2) @ z).unflatten(1, folded.shape[:2])  # [B, R, H, D]
        found = torch.einsum("brhe,rhde->rbhd", means, value).flatten(2)
        return found @ _stack(self.members, "linear.weight").transpose(1, 2)

    def member(self, number: int) -> AttentiveHead:
        """Return a head as a module of its own, its batch norm's statistics filled in."""
        head = self.members[number]
        assert isinstance(head, AttentiveHead)
        head.bn.load_state_dict(self.bn.state_dict())
        return head.train(self.training)


Bank = LinearBank | AttentiveBank
Head = LinearHead | AttentiveHead


def _stack(members: nn.ModuleList, name: str) -> Tensor:
    return torch.stack([member.get_parameter(name) for member in members])


def read_head(path: Path | str, trunk: Trunk) -> AttentiveHead:
    """Read an attentive head: one that a probe has saved, or a released one (.pth) of Apple's AIM.

    Raises InputError where the file holds none, or one of another width.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; wanted a head, .safetensors or .pth")
    found = read_tensors(path)
    state = {k.removeprefix("head."): v for k, v in found.items() if k.startswith("head.")}
    if not {"cls_token", "linear.weight"} <= {*state}:
        raise InputError(f"{path} holds no attentive head: head.cls_token, head.linear.weight, …")
    rows = len(state["linear.weight"])
    head = AttentiveHead(trunk.width, trunk.heads, rows)
    check_tensors(state, head.state_dict(), path)
    head.load_state_dict(state)
    return head.eval()


def classify(trunk: Trunk, head: Head, blocks: Sequence[int], images: Tensor) -> Tensor:
    """Return logits [B, K] of images uint8 [B, 3, H, W]: the head on the raw mean of the blocks."""
    return head(mean_of(trunk.features(images, blocks)))
