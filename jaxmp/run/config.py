"""The settings of a run: frozen dataclasses whose every field is a number, a word or another such dataclass.

A config file builds one `Config`; the command line overrides its fields by dotted names; the work
directory keeps a copy. No setting is read with a default anywhere else: a number that matters
stands here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxmp.nn.models.gpt import GPTConfig
from jaxmp.nn.models.llama import LlamaConfig
from jaxmp.nn.models.mlp import MLPConfig
from jaxmp.nn.models.resnet import ResNetConfig
from jaxmp.nn.models.vit import ViTConfig
from jaxmp.precision import loss_scale as loss_scales
from jaxmp.precision import policy as policies
from jaxmp.run.data import DigitsConfig, PatternsConfig, TextConfig


class ConfigError(ValueError):
    """A user's mistake in a config or on the command line, told in a sentence that names the key."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move: an optimizer, its learning rate over time, decay and clipping."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    """Peak learning rate, reached at the end of the warm-up."""
    schedule: Literal["cosine", "rsqrt", "constant", "stable_decay"] = "cosine"
    """What the learning rate does after the warm-up."""
    warmup: float = 0.0
    """How long the learning rate rises from 0 to its peak: below 1 a share of all steps, else steps."""
    decay_steps: int = 0
    """stable_decay: steps of the final descent to 0 (0: a fifth of all)."""
    weight_decay: float = 0.0
    """Decoupled decay per step, times the learning rate; biases and norms are left out."""
    b1: float = 0.9
    """AdamW: decay of the first moment."""
    b2: float = 0.95
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    momentum: float = 0.9
    """SGD: decay of the velocity."""
    clip: float = 1.0
    """The limit of clipping (0: none), in what `clip_by` measures."""
    clip_by: Literal["norm", "unit", "value", "zscore", "quantile"] = "norm"
    """What is clipped: the global norm; each unit's norm, relative to its weights (AGC, such as 0.01); each
    value; a global norm that lies so many deviations above its mean (ZClip, such as 2.5); or that lies
    above this quantile of the newest ones (AutoClip, such as 0.9)."""
    skip_outliers: float = 0.0
    """Leave out steps whose gradient norm exceeds so many times its running mean, such as 10 (0: none)."""
    ema: float = 0.0
    """Decay of a running average of the parameters, evaluated beside them (0: none)."""


@dataclasses.dataclass(frozen=True)
class LossScaleConfig:
    """What the loss is multiplied by so that small float16 gradients survive."""

    kind: Literal["auto", "none", "static", "dynamic"] = "auto"
    """auto: dynamic when the policy computes in float16, none otherwise."""
    initial: float = 2.0**15
    """The scale of the first step; with `static`, of every step. Powers of two are exact."""
    period: int = 2000
    """Dynamic: finite steps in a row before the scale grows."""
    factor: float = 2.0
    """Dynamic: what it grows and shrinks by."""
    floor: float = 1.0
    """Dynamic: the smallest scale."""
    cap: float = 2.0**32
    """Dynamic: the largest scale."""
    hysteresis: int = 1
    """Dynamic: overflows in a row before the scale shrinks."""
    patience: int = 50
    """The run stops after this many skipped steps in a row, or steps in a row with the scale at its floor."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and how long it is kept."""

    every: int = 100
    """Steps between two checkpoints (0: only at the end and on a signal)."""
    keep: int = 3
    """How many of the newest to keep."""
    keep_every: int = 0
    """Also keep for ever those whose step is a multiple of this (0: none)."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When the held-out data is looked at."""

    every: int = 100
    """Steps between two evaluations (0: only at the end)."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is shown while the run goes on. metrics.jsonl always holds every step."""

    every: int = 20
    """Steps between two lines, where the output is not a terminal."""
    flow: int = 100
    """Steps between two records of the gradients by depth, in instruments.jsonl (0: none)."""
    blame: bool = True
    """At the first step that is not finite and that no loss scale could mend, find the operation."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs tensorboardX)."""
    report: bool = True
    """Write report.html and report.png at the end (needs matplotlib)."""
    stall: float = 600.0
    """Several processes: seconds without a step until each writes its stacks to stderr (0: never)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    model: MLPConfig | ViTConfig | ResNetConfig | GPTConfig | LlamaConfig
    data: DigitsConfig | PatternsConfig | TextConfig
    steps: int
    """Batches to train on."""
    batch_size: int
    """Examples in one batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    policy: str = "mixed_bfloat16"
    """float32, mixed_bfloat16, mixed_float16, or params=…,compute=…,output=…"""
    overrides: tuple[tuple[str, str], ...] = ()
    """Pairs of a parameter path pattern and the dtype that it computes in: '**/LayerNorm_*' float32."""
    autocast: bool = False
    """Decide precision operation by operation instead of casting parameters and inputs up front."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    accumulate: int = 1
    """Microbatches that a batch is cut into; their gradients are summed in float32."""
    replicas: int = 1
    """An experiment: backpropagate as one of so many identical workers whose losses are averaged."""
    mesh: str = ""
    """How devices share the work: data=8, data=2,fsdp=4, fsdp=4,tensor=2, data=-1 (empty: one device)."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradients are in while devices sum them; bfloat16 halves what is sent."""
    seed: int = 0
    """Seeds the initial parameters, dropout and the order of the data."""
    workdir: str = ""
    """Where checkpoints, metrics and the report go (default: runs/NAME, NAME being the config file's)."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()


RESUMABLE = ("steps", "workdir", "checkpoint.", "eval.", "log.", "loss_scale.patience", "mesh")
"""Settings that may change between two starts of one run; the others make it another run."""


def policy_of(config: Config) -> policies.Policy:
    """The policy with the config's overrides behind its own."""
    policy = policies.get_policy(config.policy)
    return dataclasses.replace(policy, overrides=(*policy.overrides, *config.overrides))


def warmup_steps(config: Config) -> int:
    """The warm-up in steps; a share of the run is rounded."""
    warmup = config.optimizer.warmup
    return round(warmup * config.steps) if warmup < 1 else int(warmup)


def loss_scale_kind(config: Config) -> Literal["none", "static", "dynamic"]:
    """The kind of loss scale, `auto` resolved by the policy alone, never by the device."""
    if config.loss_scale.kind != "auto":
        return config.loss_scale.kind
    return "dynamic" if policy_of(config).compute_dtype == "float16" else "none"


def loss_scale_of(config: Config) -> loss_scales.LossScale:
    """The loss scale that the run starts with."""
    kind, settings = loss_scale_kind(config), config.loss_scale
    if kind == "none":
        return loss_scales.NoOpLossScale()
    if kind == "static":
        return loss_scales.StaticLossScale(settings.initial)
    return loss_scales.DynamicLossScale(
        settings.initial,
        period=settings.period,
        factor=settings.factor,
        min_loss_scale=settings.floor,
        max_loss_scale=settings.cap,
        hysteresis=settings.hysteresis,
    )


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, as on the command line: {"optimizer.learning_rate": 0.001, …}."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        flat.update(flatten(value, key + ".") if dataclasses.is_dataclass(value) else {key: value})
    return flat


def to_json(config: Config) -> dict[str, Any]:
    """The settings as plain JSON values, with the kind of model and data as `model` and `data`."""
    kinds = {"model": type(config.model).__name__, "data": type(config.data).__name__}
    return kinds | {k: _plain(v) for k, v in flatten(config).items()}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def difference(stored: dict[str, Any], config: Config) -> tuple[str, Any, Any] | None:
    """The first setting (key, stored, asked) by which a stored config is of another run, or None."""
    asked = to_json(config)
    stored = _defaults(config) | stored  # an older version did not have all settings
    for key in (*asked, *(k for k in stored if k not in asked)):
        old, new = stored.get(key, "unset"), asked.get(key, "unset")
        if old != new and not key.startswith(RESUMABLE):
            return key, old, new
    return None


def _defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """The default of every setting that has one, by its dotted name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            found |= _defaults(value, key + ".")
        elif field.default is not dataclasses.MISSING:
            found[key] = _plain(field.default)
    return found
