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
    """Shape of the trunk. The defaults are LLaMA's: pre-norm RMSNorm, rotary positions, SwiGLU, no
    biases, an untied head; other values make DeLVM's, AIM's and AIMv2's of it."""

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
    rotary: bool = True
    """Rotary positions; False where positions are added to the embedding (AIM)."""
    norm: Literal["rms", "layer"] = "rms"
    """layer: LayerNorm with weight and bias (AIM)."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """gelu: two matrices with an exact GELU between them (AIM)."""
    attn_bias: bool = False
    """Biases of the attention's four products (DeLVM)."""
    codebook_dim: int = 0
    """Channels of a frozen codebook whose projection is the embedding (DeLVM: 64; 0: a table)."""
    init: Literal["normal", "xavier", "delvm"] = "normal"
    """How matrices are drawn: all from N(0, init_std²), as LVM does; uniformly within
    sqrt(6 / (in + out)) (AIM); or with DeLVM's deviations, which shrink with depth."""
    init_std: float = 0.02
    """Standard deviation of every matrix under init normal."""

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
        if self.qk_norm and not self.rotary:
            raise InputError("qk_norm goes with rotary positions; rotary is False")

    @property
    def dim(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads

    @property
    def vectors(self) -> int:
        """Weights that are no matrices: of the norms, and biases."""
        norm = self.width * (2 if self.norm == "layer" else 1)
        heads = 2 * self.dim if self.qk_norm else 0
        biases = self.dim * (self.heads + 2 * self.groups) + self.width if self.attn_bias else 0
        return self.layers * (2 * norm + heads + biases) + norm

    @property
    def matrices(self) -> int:
        """Weights of the blocks' matrices."""
        attention = self.width * self.dim * (2 * self.heads + 2 * self.groups)
        return self.layers * (
            attention + (3 if self.mlp == "swiglu" else 2) * self.width * self.ffn
        )

    def num_params(self, *, embeddings: bool = True) -> int:
        """Count parameters; without the embedding and the head for `embeddings=False`."""
        trunk = self.matrices + self.vectors
        if not embeddings:
            return trunk
        table = self.vocab_size * self.width
        if self.codebook_dim:
            return trunk + (self.vocab_size + self.width) * self.codebook_dim + table
        return trunk + 2 * table

    def flops_per_token(self, row_len: int, *, causal: bool = True) -> float:
        """Training FLOPs (forward and backward) a token: 6 per matrix weight, plus attention.

        Attention is 12·layers·heads·dim·row_len over all pairs; `causal` counts the half of them
        that a causal row reads. The look-up of an embedding counts nothing.
        """
        tables = self.vocab_size * self.width + self.codebook_dim * self.width
        pairs = 12 * self.layers * self.heads * self.dim * row_len
        return 6.0 * (self.matrices + tables) + (pairs / 2 if causal else pairs)


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
    """muon: Muon for the blocks' matrices, AdamW for embedding, head and norms."""
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
class Patches:
    """Images as sequences of patches, and what is predicted of them (AIM and its kin)."""

    image_size: int = 224
    size: int = 14
    """Side of a patch in pixels."""
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """What red, green and blue in [0, 1] are normalised by; ImageNet's."""
    positions: Literal["sincos", "learned"] = "sincos"
    """Added to the embedding: a fixed 2-D sine-cosine table, or a learned one (AIMv2)."""
    order: Literal["raster", "spiral", "checkerboard", "random"] = "raster"
    """In which order patches follow one another; blocks are taken in raster order."""
    block: int = 1
    """Side, in patches, of the blocks that read themselves whole and predict the next one (XTRA);
    1 predicts the next patch."""
    prefix: bool = True
    """Draw for every image a prefix of 1 to N - 1 patches that all positions read and that is not
    predicted (AIM); without, the order alone says what is read."""
    target: Literal["pixels", "embedding"] = "pixels"
    """pixels: mean squared error of the next patch's pixels, normalised by its mean and deviation
    (AIM). embedding: 1 - cosine to the next patch's embedding, which gets no gradient (NEPA)."""
    head_width: int = 2048
    head_depth: int = 12
    """Width and blocks of the MLP head between the trunk and the pixels."""
    least_crop: float = 0.4
    """Smallest part of an image's area that a random crop keeps; 1 keeps all of it."""
    flip: bool = True
    """Mirror every second image."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Largest change of brightness, contrast, saturation and hue; all 0 leaves colours alone."""
    jitter_chance: float = 0.8

    def __post_init__(self) -> None:
        if self.image_size % self.size or self.side < 2:
            raise InputError(
                f"images of {self.image_size} pixels are no two or more patches of {self.size} "
                "pixels a side; choose an image_size that size divides"
            )
        if self.side % self.block:
            raise InputError(f"{self.side} patches a side are no whole blocks of {self.block}")
        if self.block > 1 and (self.prefix or self.order != "raster"):
            raise InputError("blocks go with order raster and without a prefix: prefix False")
        if not 0 < self.least_crop <= 1:
            raise InputError(f"least_crop {self.least_crop}: wanted a part of the area in (0, 1]")

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Rebuild from JSON, which has lists for tuples."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in found.items()
        }
        return cls(**values)

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.image_size // self.size

    @property
    def count(self) -> int:
        """Patches of an image."""
        return self.side**2

    @property
    def channels(self) -> int:
        """Values of a patch."""
        return 3 * self.size**2

    @property
    def step(self) -> int:
        """How many positions ahead the predicted patch stands."""
        return self.block**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Distil:
    """Learning from a teacher besides the codes (DeLVM)."""

    teacher: str = ""
    """Folder of a trained model of the same codes, layout and documents; empty: no teacher."""
    logits: str = ""
    """Folder of its stored logits, from `python -m lvm.distil`, in place of the teacher itself."""
    weight: float = 1.0
    """Of the divergence, which is multiplied by the temperature's square besides."""
    code_weight: float = 1.0
    """Of the cross-entropy on the codes themselves."""
    temperature: float = 1.0
    required: bool = False
    """Refuse to start without a teacher."""
    reverse: bool = False
    """KL(student, teacher), which keeps to what the teacher finds likely, in place of KL(teacher,
    student), which covers all of it."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(f"distil.temperature {self.temperature}: wanted above 0")
        if self.teacher and self.logits:
            raise InputError(
                "--distil.teacher and --distil.logits are two ways to the same: give one"
            )

    @property
    def on(self) -> bool:
        return bool(self.teacher or self.logits)


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
    codebook: str = ""
    """Folder of the data's tokenizer, whose codebook becomes the embedding of a model with
    codebook_dim; a run that goes on has it in its checkpoint."""
    model: ModelConfig
    optim: Optim = Optim()
    distil: Distil = Distil()
    patches: Patches | None = None
    """Train on the pixels of images rather than on codes; the data are then image shards."""

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
        parts: dict[str, Any] = {
            "model": ModelConfig(**found["model"]), "optim": Optim(**found["optim"])
        }  # fmt: skip
        parts["distil"] = Distil(**found.get("distil", {}))
        if patches := found.get("patches"):
            parts["patches"] = Patches.from_json(patches)
        return cls(**{**found, **parts})


FREE = frozenset({
    "out", "data", "codebook", "steps", "seconds", "device", "workers", "micro_rows", "attention",
    "keep", "recompute", "compile", "shards", "save_in_background", "max_skips", "hang_seconds",
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
