"""Whole optimizer chains in the right order, and the settings that evidence recommends.

    unscale -> finite? -> guard -> clip -> (momentum | adam) -> decoupled decay -> -rate(step)
        -> cap -> average

`with_loss_scale` does the first two and holds everything after them when a step is skipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmp.numerics import tree as trees
from jaxmp.optim import clipping, decay, scaling, schedules
from jaxmp.precision import loss_scale as scales

Mask = Callable[[Any], Any] | Any | None
Guard = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    mask: Mask = decay.decay_mask,
    clip: float | optax.GradientTransformation | None = 1.0,
    guard: Guard | None = None,
    cap: optax.GradientTransformation | None = None,
    ema: float | None = None,
    loss_scale: scales.LossScale | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay, behind loss scaling, the finite guard and clipping.

    Adam divides by the root of a second moment, an average of squared gradients; it is a first-order
    method, that average is not a second derivative. Both moments are float32 whatever the parameters
    are: in bfloat16 a moment with `b2` = 0.999 stops moving. Decay multiplies a weight by
    `1 - rate * weight_decay` a step, outside of Adam's division, which would cancel it.

    Args:
      learning_rate: a number, or a schedule of the number of updates applied so far.
      mask: which parameters decay, a tree of booleans or a function of the parameters.
      clip: the largest global gradient norm, or another clip such as `clip_by_unit_norm()`; None to
        not clip.
      guard: what wraps the chain to leave steps out, such as `skip_outliers`.
      cap: what limits the weights after the update, such as `clip_spectral_norm(1.0)`.
      ema: the decay of an average of the parameters (read it with `ema_of`), None for none.
      loss_scale: None for the finite guard alone.

    (Loshchilov and Hutter 2019, arXiv 1711.05101.)
    """
    direction = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    decayed = optax.add_decayed_weights(weight_decay, mask)
    return _chain(learning_rate, [direction, decayed], clip, guard, cap, ema, loss_scale)


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Mask = decay.decay_mask,
    clip: float | optax.GradientTransformation | None = None,
    guard: Guard | None = None,
    cap: optax.GradientTransformation | None = None,
    ema: float | None = None,
    loss_scale: scales.LossScale | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent with momentum and decoupled decay; arguments as for `adamw`.

    (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 1.)
    """
    direction = optax.trace(decay=momentum, nesterov=nesterov, accumulator_dtype=jnp.float32)
    decayed = optax.add_decayed_weights(weight_decay, mask)
    return _chain(learning_rate, [direction, decayed], clip, guard, cap, ema, loss_scale)


def _chain(
    learning_rate: optax.ScalarOrSchedule,
    direction: list[optax.GradientTransformation],
    clip: float | optax.GradientTransformation | None,
    guard: Guard | None,
    cap: optax.GradientTransformation | None,
    ema: float | None,
    loss_scale: scales.LossScale | None,
) -> optax.GradientTransformationExtraArgs:
    if isinstance(clip, int | float):
        clip = clipping.clip_by_global_norm(clip)
    parts = [
        *([] if clip is None else [clip]),
        *direction,
        optax.scale_by_learning_rate(learning_rate),
        *([] if cap is None else [cap]),
        *([] if ema is None else [params_ema(ema)]),
    ]
    chain = optax.chain(*parts)
    return scaling.with_loss_scale(in_float32(guard(chain) if guard else chain), loss_scale)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` seeing gradients and parameters in float32, so that its whole state is float32.

    optax makes moments in the dtype of the parameters; with bfloat16 parameters they would freeze.
    """
    inner = optax.with_extra_args_support(inner)
    full = lambda tree: trees.cast_floating(tree, jnp.float32)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return inner.update(full(updates), state, full(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(full(params)), update_fn)


class EmaState(NamedTuple):
    """The state of `params_ema`: the averaged parameters, float32."""

    ema: Any


def params_ema(decay: float) -> optax.GradientTransformation:
    """An exponential moving average of the parameters, kept beside them; the last link of a chain.

    It starts as the parameters themselves, so it needs no correction for a start at zero; updates pass
    through. Read it with `ema_of`. (Polyak and Juditsky 1992.)
    """

    def init_fn(params: Any) -> EmaState:
        # A copy, since a donated state may not hold one buffer twice.
        return EmaState(jax.tree.map(lambda p: jnp.array(p, copy=True), params))

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        average = lambda e, p, u: decay * e + (1 - decay) * (p + u)
        return updates, EmaState(jax.tree.map(average, state.ema, params, updates))

    return optax.GradientTransformation(init_fn, update_fn)


def ema_of(opt_state: Any) -> Any:
    """The averaged parameters in an optimizer state, however deep; None if none are kept."""
    is_ema = lambda node: isinstance(node, EmaState)
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_ema) if is_ema(node)]
    return found[0].ema if found else None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings that suit a family of models, each with the evidence for it. Plain data.

    The figures are from small runs on scikit-learn's handwritten digits (180 to 400 steps, one to three
    seeds) where no paper is named; take them for directions, not for constants.
    """

    optimizer: str
    learning_rate: float
    schedule: str
    warmup_fraction: float
    weight_decay: float
    clip: float | None
    settings: Mapping[str, float]
    evidence: Mapping[str, str]


RECIPES: Mapping[str, Recipe] = {
    "transformer": Recipe(
        optimizer="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_fraction=0.1,
        weight_decay=0.1,
        clip=1.0,
        settings={"b1": 0.9, "b2": 0.95},
        evidence={
            "optimizer": "ViT on digits: AdamW reaches 91 to 96%, SGD with momentum at best 43% "
            "(pre-LN) and 8% (post-LN). Adam evens out blocks whose gradients differ in size; its "
            "second moment is no second derivative.",
            "learning_rate": "ViT on digits, three seeds: at 1e-2 without warm-up post-LN stays at "
            "chance (10%), at 3e-2 with it, too; 1e-3 trains every kind of block, so the smaller rate "
            "is the default.",
            "warmup_fraction": "The largest single effect measured: at 1e-2, 60 of 180 steps of warm-up "
            "take post-LN from 10% to 85 to 87%, pre-LN from 77 to 90% up to 89 to 93% "
            "(scripts/warmup_experiment.py).",
            "weight_decay": "Decoupled decay sets the equilibrium size of a weight to "
            "sqrt(rate / (2 * decay)), hence the step relative to it; 0.1 as in GPT-3 "
            "(arXiv 2005.14165). Norms, biases and embeddings do not decay.",
            "clip": "After one batch with a gradient 2000 times too large the final loss is 0.0015 "
            "with clipping to 1.0 and 0.018 without (0.0018 undisturbed); after five in a row "
            "0.0014 and 0.045. A NaN passes through every clip: only what skips survives it.",
            "b2": "A shorter memory forgets a bad batch sooner: final loss 0.0024 at 0.95 against "
            "0.018 at 0.999 after the same batch, without clipping.",
        },
    ),
    "cnn": Recipe(
        optimizer="sgd",
        learning_rate=0.1,
        schedule="cosine",
        warmup_fraction=0.05,
        weight_decay=5e-4,
        clip=None,
        settings={"momentum": 0.9},
        evidence={
            "optimizer": "Small convolutional net on digits: SGD with momentum 97.2 to 97.8%, Adam "
            "at its best rate 95.8%.",
            "learning_rate": "The same net trains at rates up to 0.3; 0.1 is He et al.'s "
            "(arXiv 1512.03385).",
            "warmup_fraction": "Short: convolutional nets with batch normalisation need it only for "
            "large batches (Goyal et al., arXiv 1706.02677).",
            "weight_decay": "5e-4, as is usual for small images (arXiv 1605.07146); weights in front "
            "of a norm are scale-free, and decay sets their effective learning rate.",
            "clip": "Off: batch normalisation bounds the gradient of the weights before it. A net "
            "without it should clip: one batch with a gradient 2000 times too large ends the run "
            "of a plain one (final loss 2.3), which a clip to 1.0 does not notice (0.0003).",
            "momentum": "0.9, as in He et al.",
        },
    ),
}


def recipe(
    name: str, steps: int, *, loss_scale: scales.LossScale | None = None, **overrides: Any
) -> optax.GradientTransformationExtraArgs:
    """The optimizer chain recommended for "transformer" or "cnn" over a run of `steps` updates.

    Transformers: AdamW, larger decay, longer warm-up, smaller rate, clipping. Small convolutional nets:
    SGD with momentum. `RECIPES[name]` shows each setting and its evidence; keyword arguments replace
    settings (`learning_rate`, `warmup`, `clip`, `guard`, `cap`, `ema`, and those of `adamw` or `sgd`).
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}: choose one of {', '.join(RECIPES)}.")
    chosen = RECIPES[name]
    settings: dict[str, Any] = {
        "clip": chosen.clip,
        "weight_decay": chosen.weight_decay,
        **chosen.settings,
        **overrides,
    }
    peak = settings.pop("learning_rate", chosen.learning_rate)
    warmup = settings.pop("warmup", round(chosen.warmup_fraction * steps))
    rate = schedules.warmup_cosine(peak, steps, warmup) if isinstance(peak, int | float) else peak
    build = {"adamw": adamw, "sgd": sgd}[chosen.optimizer]
    return build(rate, loss_scale=loss_scale, **settings)
