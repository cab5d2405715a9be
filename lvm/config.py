"""What a run is: the model's shape, the optimiser, the rest; sizes and FLOPs without a model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from kernels.attention import Backend
from tokenizer.cli import InputError
from tokenizer.files import atomic_write
from visual_sentences.vocab import Vocab

Layout = Literal["bos", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of the decoder: pre-norm RMSNorm, rotary positions, SwiGLU, untied head."""

    width: int
    """Residual stream."""
    layers: int
    heads: int
    """Query heads."""
    ffn: int
    """Hidden width of the SwiGLU."""
    kv_heads: int | None = None
    """Key/value heads (default: as many as heads)."""
    head_dim: int | None = None
    """Default: width / heads."""
    vocab_size: int = 0
    """Rows of the embedding and of the head; 0 takes the size that the data's tokenizer needs."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys before the rotation, as in Qwen3."""
    init_std: float = 0.02
    """Standard deviation of every matrix; LVM scales none of them by depth."""

    def __post_init__(self) -> None:
        if self.head_dim is None and self.width % self.heads:
            raise InputError(
                f"width {self.width} is no multiple of {self.heads} heads; set head_dim"
            )
        if self.heads % self.groups:
            raise InputError(
                f"{self.heads} heads cannot share {self.groups} key/value heads evenly"
            )
        if self.dim % 2:
            raise InputError(f"head_dim {self.dim} is odd; rotary positions turn pairs of channels")

    @property
    def dim(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads

    @property
    def norms(self) -> int:
        """Weights of all norms."""
        heads = 2 * self.dim if self.qk_norm else 0
        return self.layers * (2 * self.width + heads) + self.width

    def num_params(self, *, embeddings: bool = True) -> int:
        """Count parameters; without the embedding and the head for `embeddings=False`."""
        attention = self.width * self.dim * (2 * self.heads + 2 * self.groups)
        layer = attention + 3 * self.width * self.ffn
        tables = 2 * self.vocab_size * self.width if embeddings else 0
        return self.layers * layer + self.norms + tables

    def flops_per_token(self, row_len: int, *, causal: bool = True) -> float:
        """Training FLOPs (forward and backward) a token: 6 per matrix weight, plus attention.

        Attention is 12·layers·heads·dim·row_len over all pairs; `causal` counts the half of them
        that a causal row reads. The embedding is a look-up and counts nothing.
        """
        matrices = self.num_params() - self.norms - self.vocab_size * self.width
        pairs = 12 * self.layers * self.heads * self.dim * row_len
        return 6.0 * matrices + (pairs / 2 if causal else pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What a model was trained to read; `lvm.json` beside its weights."""

    layout: Layout
    codes: int
    codes_per_image: int
    row_len: int
    image_size: int = 256
    tokenizer: str = ""
    """Id of the tokenizer whose codes these are; empty where unknown."""
    whole_rows: bool = False
    """Sentences of one row read each other (LVM's release)."""

    @property
    def vocab(self) -> Vocab:
        return Vocab(codes=self.codes, codes_per_image=self.codes_per_image)

    @property
    def images_per_row(self) -> int:
        return self.row_len // self.codes_per_image

    def save(self, folder: Path) -> None:
        vocab = self.vocab
        ids = {"bos": vocab.bos, "eos": vocab.eos, "pad": vocab.pad}
        with atomic_write(folder / "lvm.json", "w") as file:
            json.dump({"format": 1, **asdict(self), "specials": ids}, file, indent=1)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `lvm.json`; a folder without one is LVM's release: no specials, 8192 codes."""
        path = folder / "lvm.json"
        if not path.is_file():
            return cls(
                layout="none", codes=8192, codes_per_image=256, row_len=4096, whole_rows=True
            )
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format", None) != 1:
            raise InputError(f"{path} is of another format version; wanted 1")
        found.pop("specials", None)
        return cls(**found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """Optimiser and schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: torch.optim.Muon for the blocks' matrices, AdamW for embedding, head and norms."""
    lr: float = 3e-4
    """Peak learning rate (of AdamW's group when name is muon)."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon's group."""
    muon_scale: Literal["original", "match_rms_adamw"] = "original"
    """What multiplies Muon's rate for a matrix A x B, as torch names it: sqrt(max(1, A / B)); or
    0.2 sqrt(max(A, B)), which makes updates of AdamW's size, to take its rate and decay."""
    final: float = 0.1
    """The schedule ends at this fraction of the peak."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_all: bool = False
    """Decay norms and embeddings too, as LVM's released optimiser does."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: int = 0
    """Updates of linear warm-up from 0."""
    decay_steps: int = 0
    """cosine: update at which it ends, warm-up included; wsd: length of the last, falling part.
    0 means the run's end (cosine) or its last fifth (wsd)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run. A recipe returns one; the command line replaces single values."""

    recipe: str
    data: str = ""
    """Folder of shards with manifest.json, from visual_sentences.build."""
    mix: Mapping[str, float] = field(default_factory=dict)
    """Shares of the sources to train on, as `--mix depth 2 walk 1`, in place of those of the data;
    sources that it does not name are left out. Validation is on rows of all sources as ever, so
    that runs of different mixtures can be compared."""
    out: str = ""
    """Run folder: config, metrics, checkpoints. An existing one is resumed."""
    steps: int = 1000
    """Optimiser updates."""
    seconds: float = 0.0
    """Stop after this time if that comes before `steps`; the schedule is fitted to it (0: off)."""
    batch_rows: int = 512
    """Rows an update over all ranks and micro-batches."""
    micro_rows: int = 8
    """Rows a rank computes at once."""
    seed: int = 42
    layout: Layout = "bos"
    whole_rows: bool = False
    """One document a row: sentences packed together read each other, as in LVM's release."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute type; weights and optimiser state stay fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What a block's backward pass computes again rather than keep: nothing; all but products and
    attention; everything."""
    compile: bool = False
    """torch.compile each block: fuses what is between the products; the first update takes a minute
    longer."""
    shards: int = 0
    """Ranks that hold one copy of the model between them (0: all); with fewer, copies of the model
    sum their gradients: HSDP, which keeps the gathering of weights inside a node."""
    attention: Backend = "auto"
    """Which attention runs; auto takes what was measured to be fastest on the device."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition added to the loss (PaLM, section 5)."""
    spike_limit: float = 0.0
    """Leave out an update whose gradient is not finite, or has a norm over this many times the
    median of the last 64; to know it costs a wait for the device an update (0: off, and a loss that
    is not finite ends the run)."""
    max_skips: int = 8
    """Updates left out in a row after which the run ends."""
    hang_seconds: float = 1800.0
    """Without an update for this long a process writes its stacks and ends (0: never)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 0
    """Loader processes; warm local shards need none."""
    deterministic: bool = False
    """Only operators that give the same bits every time; slower on a GPU. Our kernels always do."""
    tensorboard: bool = False
    """Also write the numbers to RUN/tensorboard."""
    wandb: str = ""
    """Also log to this Weights & Biases project (WANDB_MODE=offline works)."""
    trace_from: int = 0
    trace_updates: int = 0
    """Record so many updates from `trace_from` on, as a Chrome trace in RUN/trace (0: none)."""
    log_every: int = 10
    save_every: int = 1000
    save_in_background: bool = True
    """Copy to the host and write while training goes on; holds one more copy of the state there."""
    eval_every: int = 0
    """Updates between validations on the data's `val` split (0: never)."""
    eval_rows: int = 64
    """Rows of a validation, evenly spread over the split; no row comes twice."""
    keep: int = 2
    """Checkpoints that are kept."""
    model: ModelConfig
    optim: Optim = Optim()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """Rebuild a run from its JSON; an unknown key names the format as newer than this code."""
        known = {f.name for f in fields(cls)}
        if unknown := set(found) - known:
            raise InputError(
                f"run config has unknown keys {sorted(unknown)}; written by other code?"
            )
        parts = {"model": ModelConfig(**found["model"]), "optim": Optim(**found["optim"])}
        return cls(**{**found, **parts})


FREE = frozenset({
    "out", "data", "steps", "seconds", "device", "workers", "micro_rows", "attention", "keep",
    "recompute", "compile", "shards", "save_in_background", "max_skips", "hang_seconds",
    "deterministic", "tensorboard", "wandb", "trace_from", "trace_updates",
    "log_every", "save_every", "eval_every", "eval_rows",
})  # fmt: skip
"""Values of a run that may differ when it is resumed: they change no number of what is learnt, or,
like `steps`, say only where to stop. The data is compared by its manifest, not by its path."""


def differences(old: Run, new: Run) -> list[str]:
    """Name what a resumed run would change, as `optim.lr: 0.001, now 0.003`."""

    def flat(run: Run) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in run.to_json().items():
            if isinstance(value, dict):
                out.update({f"{key}.{k}": v for k, v in value.items()})
            elif key not in FREE:
                out[key] = value
        return out

    a, b = flat(old), flat(new)
    return [f"{k}: {a.get(k)}, now {b.get(k)}" for k in sorted(a | b) if a.get(k) != b.get(k)]
