"""Learning-rate schedules: a linear warm-up, then cosine, inverse square root, constant or linear decay.

Each takes the number of updates applied so far and returns a float32 rate. All of them are `start` at 0
and exactly `peak` at `warmup`; those that end are exactly `end` at `steps` and afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def warmup_cosine(
    peak: float, steps: int, warmup: int, *, start: float = 0.0, end: float = 0.0
) -> Schedule:
    """Warm-up, then half a cosine wave down to `end`. (Loshchilov and Hutter 2017, arXiv 1608.03983.)"""
    _check_room("warmup_cosine", steps, warmup, 1)

    def decay(count: jax.Array) -> jax.Array:
        done = _fraction(count - warmup, steps - warmup)
        weight = 0.5 * (1 + jnp.cos(jnp.pi * done))
        return peak * weight + end * (1 - weight)

    return _after_warmup(peak, warmup, start, decay)


def warmup_rsqrt(peak: float, warmup: int, *, start: float = 0.0) -> Schedule:
    """Warm-up, then `peak * sqrt(warmup / count)`, without an end. (Vaswani et al. 2017, 1706.03762.)"""
    if warmup < 1:
        raise ValueError(
            f"warmup_rsqrt decays from the end of its warm-up: it expects warmup >= 1, got {warmup}."
        )
    return _after_warmup(
        peak, warmup, start, lambda count: peak * jnp.sqrt(warmup / jnp.maximum(count, warmup))
    )


def warmup_constant(peak: float, warmup: int, *, start: float = 0.0) -> Schedule:
    """Warm-up, then `peak` for good."""
    return _after_warmup(peak, warmup, start, lambda count: jnp.full_like(count, peak))


def warmup_stable_decay(
    peak: float, steps: int, warmup: int, decay: int, *, start: float = 0.0, end: float = 0.0
) -> Schedule:
    """Warm-up, a plateau at `peak`, and a straight line down to `end` over the last `decay` steps.

    A run can be prolonged from its plateau, since nothing before the decay depends on `steps`.
    (Hu et al. 2024, arXiv 2404.06395.)
    """
    _check_room("warmup_stable_decay", steps, warmup, decay)

    def fall(count: jax.Array) -> jax.Array:
        done = _fraction(count - (steps - decay), decay)
        return peak * (1 - done) + end * done

    return _after_warmup(peak, warmup, start, fall)


def _after_warmup(
    peak: float, warmup: int, start: float, decay: Callable[[jax.Array], jax.Array]
) -> Schedule:
    if warmup < 0:
        raise ValueError(f"A warm-up lasts 0 steps or more, got {warmup}.")

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        done = _fraction(count, warmup)
        # Written so that both ends are exact: start + (peak - start) would round.
        return jnp.where(count < warmup, start * (1 - done) + peak * done, decay(count))

    return schedule


def _fraction(count: jax.Array, total: int) -> jax.Array:
    return jnp.clip(count / max(total, 1), 0.0, 1.0)


def _check_room(name: str, steps: int, warmup: int, decay: int) -> None:
    if decay < 1:
        raise ValueError(f"{name}: the decay lasts 1 step or more, got {decay}.")
    if warmup + decay > steps:
        raise ValueError(
            f"{name}: a warm-up of {warmup} steps and a decay of at least {decay} do not fit into "
            f"{steps} steps. Shorten the warm-up or raise the number of steps."
        )
