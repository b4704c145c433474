"""What decides the weights of a run, as frozen values that go to JSON and back; nothing below the loop takes these."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from svdrr.errors import InputError

Range = tuple[str, Callable[[Any], bool]]
"""What a value has to be, in words, and whether it is."""

COUNT: Range = ("at least 1", lambda value: value >= 1)
AMOUNT: Range = ("at least 0", lambda value: 0 <= value < math.inf)
POSITIVE: Range = ("more than 0", lambda value: 0 < value < math.inf)
FRACTION: Range = ("0 to 1", lambda value: 0 <= value <= 1)
BELOW_1: Range = ("at least 0 and less than 1", lambda value: 0 <= value < 1)
ANYTHING: Range = ("anything", lambda value: True)
RANGES: dict[str, Range] = {
    "seed": ANYTHING,
    "steps": AMOUNT,
    "shift": ("0.01 to 1000", lambda value: 0.01 <= value <= 1000),  # beyond, 32 bits round the noise levels away
    "norm_eps": POSITIVE,
    "clip_norm": POSITIVE,
    **dict.fromkeys(["pa_fraction", "augment_fraction", "drop_source", "drop_stream", "ema_decay"], FRACTION),
    "betas": BELOW_1,
    "preset": ("a name that a folder can have", lambda value: set("/\0").isdisjoint(value)),
}
"""By the setting's name. Other whole numbers are a COUNT, and other numbers an AMOUNT."""


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder and its training. block_channels: each block but the last halves the side. crop: in pixels.

    gradient_weight: of the error of finite differences. equivariance_weight: see vae.equivariance. 0 is off.
    default: the trained one that is used where `--vae` names none: a folder or a hub id. measured: the scale of the
    latents is measured on the training views; without, it is the autoencoder's own.
    """

    latent_channels: int
    block_channels: tuple[int, ...]
    layers_per_block: int
    kl_weight: float
    crop: int
    steps: int
    batch: int
    learning_rate: float
    gradient_weight: float = 1.0
    equivariance_weight: float = 0.0
    default: str | None = None
    measured: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """The ViewTransformer's shape, and its switches, which are explained there.

    scaled_source: the source's latent comes normalised like the target's; without, as the autoencoder makes it.
    """

    patch_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    prediction: str = "velocity"
    preconditioned: bool = True
    learned_variance: bool = False
    scaled_source: bool = True
    pooled_source: bool = False
    image_embedding: int | None = None
    ray_maps: bool = True
    absolute_pose: bool = True
    pose_modulation: bool = True
    qk_norm: bool = True
    cross_norm: bool = True
    pixart_positions: bool = False
    norm_eps: float = 1e-5
    learned_null: bool = True


@dataclass(frozen=True)
class CoarseConfig:
    """The CoarseMean's shape, which is explained there, and its training, which comes before the transformer's."""

    kind: str
    cells: int
    width: int
    steps: int
    batch: int
    learning_rate: float
    volume_channels: int = 8


@dataclass(frozen=True)
class StageConfig:
    """One resolution of the weak-to-strong training. shift: of the noise levels, see flow.draw_sigmas."""

    size: int
    steps: int
    batch: int
    learning_rate: float
    shift: float

    @property
    def name(self) -> str:
        return f"{self.size}px"


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    preset: str
    seed: int
    vae: VAEConfig
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    pa_fraction: float  # of the source views; the others are any view
    augment_fraction: float  # of the sources, which are then encoded anew each time; 0 is off
    drop_source: float  # fraction of samples trained on the null condition, for guidance
    warmup_steps: int  # of every stage
    weight_decay: float
    clip_norm: float
    ema_decay: float
    mixed_precision: str  # "no", "bf16" or "fp16"
    log_every: int
    validate_every: int
    sample_every: int  # steps; so often views are synthesised for a look
    validation_pairs: int
    checkpoint_every: int
    keep_checkpoints: int
    drop_stream: float = 0.0  # fraction trained on that in one of the source's streams only, for each of them
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW; a short memory pays most in short runs
    decay: bool = True  # of the learning rate, after the warm-up; without, it stays
    token_rate: float = 1.0  # factor on the learning rate of the layer that makes a pooled source's token
    guidance_scale: float = 1.0  # of the finished pipeline, where its caller gives none
    init: str | None = None  # PixArt's weights, which the transformer begins from: a folder or a hub id
    coarse: CoarseConfig | None = None  # a coarse mean of the target that the transformer is given
    cache_latents: bool = True  # False encodes each batch when it is needed
    spread_weights: bool = False  # over the processes (FSDP), where there are several; else each has all of them
    image_encoder: str | None = None  # the CLIP that embeds the source: a folder or a hub id
    image_encoder_digest: str | None = None
    pretrained_vae: str | None = None  # the digest of the trained one that is used; None where the run trains its own

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """The config again. Raises InputError, naming the key, where it is missing, unknown or of no possible value."""
        return _build(cls, values, "config")


def read_config(path: Path) -> TrainConfig:
    """The settings in a JSON file, as `svdrr train --dry-run` prints them. Raises InputError saying what is wrong."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path} holds no settings ({error}): write some with `svdrr train --dry-run`") from error
    return _build(TrainConfig, values, str(path))


def _build(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where} is {value!r}, not a table of settings")
        names = {field.name for field in fields(kind)}
        for problem, keys in (("unknown", set(value) - names), ("missing", names - set(value))):
            if keys:
                raise InputError(f"{where}: {problem} {', '.join(sorted(keys))}; mistyped, or written by another svdrr")
        hints = get_type_hints(kind)
        return cast(Any, kind)(**{name: _build(hints[name], value[name], f"{where}.{name}") for name in names})
    if isinstance(kind, UnionType):
        present = next(option for option in get_args(kind) if option is not NoneType)
        return None if value is None else _build(present, value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} is {value!r}, not a list")
        inner = get_args(kind)
        if not value or (inner[-1] is not Ellipsis and len(value) != len(inner)):
            raise InputError(f"{where} has {len(value)} values: {'at least 1' if ... in inner else len(inner)} wanted")
        return tuple(_build(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise InputError(f"{where} is {value!r}, not {kind.__name__}")
    name = where.rpartition(".")[2].partition("[")[0]
    words, holds = RANGES.get(name, {int: COUNT, float: AMOUNT}.get(kind, ANYTHING))
    if not holds(value):
        raise InputError(f"{where} is {value!r}, and {words} is wanted")
    return value
