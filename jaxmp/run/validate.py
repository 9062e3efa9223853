"""Looks a config over before anything runs, and tells each mistake in a sentence that names the key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

from jaxmp.nn.models.gpt import GPTConfig
from jaxmp.nn.models.llama import LlamaConfig
from jaxmp.run import config as configs
from jaxmp.run.config import Config, ConfigError
from jaxmp.run.data import BYTE_VALUES, PatternsConfig, TextConfig
from jaxmp.training import mesh as meshes

DIGIT_CLASSES = 10

# Key, what must hold, and how to say it.
_BOUNDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("steps", lambda x: x >= 1, "at least 1"),
    ("batch_size", lambda x: x >= 1, "at least 1"),
    ("accumulate", lambda x: x >= 1, "at least 1 (1: no accumulation)"),
    ("replicas", lambda x: x >= 1, "at least 1 (1: off)"),
    ("seed", lambda x: 0 <= x < 2**32, "between 0 and 4294967295"),
    ("optimizer.learning_rate", lambda x: x > 0, "above 0, such as 1e-3"),
    (
        "optimizer.warmup",
        lambda x: x >= 0 and (x < 1 or x == int(x)),
        "a share of the steps below 1, or a number of steps (0: no warm-up)",
    ),
    ("optimizer.decay_steps", lambda x: x >= 0, "at least 0 (0: a fifth of all steps)"),
    ("optimizer.weight_decay", lambda x: x >= 0, "at least 0 (0: none)"),
    ("optimizer.b1", lambda x: 0 <= x < 1, "in [0, 1), such as 0.9"),
    ("optimizer.b2", lambda x: 0 <= x < 1, "in [0, 1), such as 0.95"),
    ("optimizer.eps", lambda x: x > 0, "above 0, such as 1e-8"),
    ("optimizer.momentum", lambda x: 0 <= x < 1, "in [0, 1), such as 0.9"),
    ("optimizer.clip", lambda x: x >= 0, "at least 0 (0: no clipping)"),
    ("optimizer.skip_outliers", lambda x: x == 0 or x > 1, "above 1, such as 10 (0: no skipping)"),
    ("optimizer.ema", lambda x: 0 <= x < 1, "in [0, 1) (0: no average), such as 0.999"),
    ("loss_scale.initial", lambda x: x > 0, "above 0, such as 32768"),
    ("loss_scale.period", lambda x: x >= 1, "at least 1, such as 2000"),
    ("loss_scale.factor", lambda x: x > 1, "above 1; 2 keeps every scale a power of two"),
    ("loss_scale.floor", lambda x: x > 0, "above 0, such as 1"),
    ("loss_scale.hysteresis", lambda x: x >= 1, "at least 1"),
    ("loss_scale.patience", lambda x: x >= 1, "at least 1, such as 50"),
    ("checkpoint.every", lambda x: x >= 0, "at least 0 (0: only at the end)"),
    ("checkpoint.keep", lambda x: x >= 1, "at least 1"),
    ("checkpoint.keep_every", lambda x: x >= 0, "at least 0 (0: none)"),
    ("eval.every", lambda x: x >= 0, "at least 0 (0: only at the end)"),
    ("log.every", lambda x: x >= 1, "at least 1"),
    ("log.flow", lambda x: x >= 0, "at least 0 (0: none)"),
    ("log.stall", lambda x: x >= 0, "at least 0 (0: never), in seconds"),
)


def check(config: Any) -> None:
    """Returns if the config can be run; raises ConfigError, a sentence, at the first mistake."""
    if not isinstance(config, Config):
        raise ConfigError(
            f"get_config() returned a {type(config).__name__}; it must return a jaxmp.run.config.Config."
        )
    _check_types(config, "")
    settings = configs.flatten(config)
    for key, holds, words in _BOUNDS:
        if not holds(settings[key]):
            raise ConfigError(f"{key}={settings[key]} must be {words}.")
    for rule in (
        _check_policy,
        _check_batch,
        _check_mesh,
        _check_schedule,
        _check_clip,
        _check_loss_scale,
        _check_pair,
    ):
        rule(config)


def describe_type(annotation: Any) -> str:
    """What a setting of this type takes, for people: "a whole number", "one of adamw, sgd"."""
    plain = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    if annotation in plain:
        return plain[annotation]
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        inner = typing.get_args(annotation)
        if inner[-1] is Ellipsis:
            return f"any number of {describe_type(inner[0])}"
        return "(" + ", ".join(map(describe_type, inner)) + ")"
    if isinstance(annotation, types.UnionType):
        return "one of " + ", ".join(f"{a.__name__}(...)" for a in typing.get_args(annotation))
    return f"{annotation.__name__}(...)"


def setting_types(config: Any, prefix: str = "") -> dict[str, Any]:
    """The type of every setting by its dotted name; of those in `flatten(config)`."""
    hints, found = typing.get_type_hints(type(config)), {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            found.update(setting_types(value, key + "."))
        else:
            found[key] = hints[field.name]
    return found


def _check_types(config: Any, prefix: str) -> None:
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if not _fits(value, hints[field.name]):
            wanted = describe_type(hints[field.name])
            raise ConfigError(f"{key}={_shown(value)} is not {wanted}; write {wanted}.")
        if dataclasses.is_dataclass(value):
            _check_types(value, key + ".")


def _shown(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else repr(value)


def _fits(value: Any, annotation: Any) -> bool:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return value in inside
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inside[-1] is Ellipsis:
            return all(_fits(item, inside[0]) for item in value)
        return len(value) == len(inside) and all(map(_fits, value, inside))
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, option) for option in inside)
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, (int, float) if annotation is float else annotation)


def _check_policy(config: Config) -> None:
    try:
        policy = configs.policy_of(config)
    except ValueError as error:
        key = "overrides" if config.overrides and _parses(config.policy) else "policy"
        raise ConfigError(f"{key}: {error}") from error
    compute = policy.compute_dtype.name
    if policy.param_dtype != "float32":
        better = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}.get(compute, "float32")
        raise ConfigError(
            f"policy={config.policy!r} keeps parameters in {policy.param_dtype}, but a run keeps a float32 "
            f"master copy, since 16 bits lose small updates; write policy={better}."
        )
    if "float64" in (compute, policy.output_dtype.name):
        raise ConfigError(
            f"policy={config.policy!r} asks for float64, which a run does not use; write float32."
        )


def _parses(policy: str) -> bool:
    try:
        configs.policies.get_policy(policy)
    except ValueError:
        return False
    return True


def _check_batch(config: Config) -> None:
    size, parts = config.batch_size, config.accumulate
    if size % parts:
        nearest = max(parts, round(size / parts) * parts)
        raise ConfigError(
            f"batch_size={size} cannot be cut into accumulate={parts} equal microbatches; "
            f"write batch_size={nearest}, or an accumulate that divides {size}."
        )


def _check_mesh(config: Config) -> None:
    """Its form; whether it fits devices, batch and model is told when the run is built."""
    try:
        if config.mesh:
            meshes.parse_mesh(config.mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_schedule(config: Config) -> None:
    rate, steps, warmup = config.optimizer, config.steps, configs.warmup_steps(config)
    if warmup >= steps:
        raise ConfigError(
            f"optimizer.warmup={rate.warmup:g} leaves none of steps={steps} to train at the full rate; "
            f"write a warmup below {steps}, a share such as 0.1, or more steps."
        )
    if rate.schedule == "rsqrt" and warmup < 1:
        raise ConfigError(
            f"optimizer.schedule=rsqrt decays from the end of the warm-up, and "
            f"optimizer.warmup={rate.warmup:g} is none; "
            f"write optimizer.warmup={max(1, steps // 10)}, or another schedule."
        )
    if rate.schedule == "stable_decay" and warmup + rate.decay_steps > steps:
        raise ConfigError(
            f"optimizer.warmup={rate.warmup:g} and optimizer.decay_steps={rate.decay_steps} do not fit into "
            f"steps={steps}; write smaller ones, such as decay_steps={max(1, steps // 5)}."
        )


def _check_clip(config: Config) -> None:
    rate = config.optimizer
    if rate.clip_by == "quantile" and rate.clip > 1:
        raise ConfigError(
            f"optimizer.clip={rate.clip:g} is no quantile, which optimizer.clip_by=quantile asks for; "
            "write one up to 1, such as 0.9, or another clip_by."
        )


def _check_loss_scale(config: Config) -> None:
    scale = config.loss_scale
    if (
        configs.loss_scale_kind(config) == "dynamic"
        and not scale.floor <= scale.initial <= scale.cap
    ):
        raise ConfigError(
            f"loss_scale.initial={scale.initial:g} lies outside of loss_scale.floor={scale.floor:g} and "
            f"loss_scale.cap={scale.cap:g}; write an initial between them."
        )


def _check_pair(config: Config) -> None:
    """Model and data must fit together: images or tokens, and as many outputs as classes."""
    model, data = config.model, config.data
    decoder = isinstance(model, GPTConfig | LlamaConfig)
    if isinstance(model, GPTConfig | LlamaConfig) and isinstance(data, TextConfig):
        if model.vocab_size < BYTE_VALUES:
            raise ConfigError(
                f"model.vocab_size={model.vocab_size} is too small for bytes; write {BYTE_VALUES}."
            )
        if model.context < data.sequence_length:
            raise ConfigError(
                f"data.sequence_length={data.sequence_length} is longer than "
                f"model.context={model.context}; make them equal."
            )
        return
    if decoder or isinstance(data, TextConfig):
        other = (
            "TextConfig(...), which gives tokens"
            if decoder
            else "DigitsConfig(), which gives images"
        )
        raise ConfigError(
            f"model={type(model).__name__} cannot read data={type(data).__name__}; write data={other}."
        )
    classes = data.classes if isinstance(data, PatternsConfig) else DIGIT_CLASSES
    if model.num_classes < classes:
        raise ConfigError(
            f"model.num_classes={model.num_classes} is too small for {classes} classes; write {classes}."
        )
