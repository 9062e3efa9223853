"""What to do with a gradient whose norm is unlike those before it: shorten it, or leave it out."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmp.numerics import tree as trees
from jaxmp.optim import clipping, scaling


class RunningNorm(NamedTuple):
    """What gradient norms have been so far: how many were seen, their mean and variance in float32."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array

    @classmethod
    def start(cls) -> RunningNorm:
        """Nothing seen yet."""
        zero = lambda: jnp.zeros([], jnp.float32)
        return cls(jnp.zeros([], jnp.int32), zero(), zero())

    def see(self, norm: jax.Array, decay: float, warmup: int) -> RunningNorm:
        """With one norm more: plain averages over the first `warmup`, exponential ones afterwards.

        mean' = mean + w (x - mean) and variance' = (1 - w) (variance + w (x - mean)^2), which is
        Welford's recurrence at w = 1 / n and the exponentially weighted one at w = 1 - decay.
        """
        weight = jnp.where(self.count < warmup, 1 / (self.count + 1), 1 - decay)
        off = norm - self.mean
        return RunningNorm(
            jnp.minimum(self.count + 1, warmup),  # more need not be known, and it cannot overflow
            self.mean + weight * off,
            (1 - weight) * (self.variance + weight * jnp.square(off)),
        )


def clip_by_zscore(
    threshold: float = 2.5, *, decay: float = 0.97, warmup: int = 25
) -> optax.GradientTransformation:
    """Gradients scaled down where their global norm lies far above its running mean, by z-score.

        z     = (norm - mean) / deviation
        norm  <-  mean + deviation * threshold^2 / z      where z > threshold

    The further out a norm is, the closer to the mean it is brought: at the threshold nothing
    changes, at infinity the mean is left. Mean and variance are those of the norms after clipping, so a
    spike does not raise its own limit. The first `warmup` norms are only learned from. Gradients that are
    not finite stay so and are not learned from: the guard of `with_loss_scale` comes before.
    (ZClip, Kumar et al. 2025, arXiv 2504.02507; its variance averages squares of deviations from the new
    mean, which makes it smaller by the factor `decay`.)
    """
    clipping.require_positive("clip_by_zscore", threshold)
    _check_memory("clip_by_zscore", decay, warmup)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = trees.global_norm(updates)
        above = norm - state.mean
        far = (state.count >= warmup) & (above > threshold * jnp.sqrt(state.variance))
        limit = state.mean + threshold**2 * state.variance / jnp.where(far, above, 1.0)
        clipped = jnp.where(far, limit, norm)
        seen = state.see(clipped, decay, warmup)
        return clipping.scale_to(updates, norm, clipped), trees.select_tree(
            jnp.isfinite(norm), seen, state
        )

    return optax.GradientTransformation(lambda params: RunningNorm.start(), update_fn)


class QuantileState(NamedTuple):
    """The state of `clip_by_quantile`: the newest norms, float32 [window], and how many ever came."""

    norms: jax.Array
    count: jax.Array


def clip_by_quantile(
    quantile: float = 0.9, *, window: int = 128, warmup: int = 25
) -> optax.GradientTransformation:
    """Gradients scaled down so that their global norm is at most a quantile of the newest norms.

    The quantile is taken over the `window` norms before this one, as they were before clipping: a
    spike does not raise its own limit, and afterwards it is one value of many. Of undisturbed
    gradients the share 1 - `quantile` is shortened. The first `warmup` norms are only learned from.
    Gradients that are not finite stay so and are not learned from. (AutoClip, Seetharaman et al. 2020,
    arXiv 2007.14469, which takes the quantile over all norms so far.)
    """
    if not 0 < quantile <= 1:
        raise ValueError(
            f"clip_by_quantile expects a quantile in (0, 1], such as 0.9, got {quantile!r}."
        )
    if not 1 <= warmup <= window:
        raise ValueError(
            f"clip_by_quantile learns from {warmup} norms before it clips, which is not between 1 and "
            f"its window of {window}."
        )

    def init_fn(params: Any) -> QuantileState:
        del params
        return QuantileState(jnp.full([window], jnp.nan, jnp.float32), jnp.zeros([], jnp.int32))

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = trees.global_norm(updates)
        limit = jnp.nanquantile(state.norms, quantile)
        clipped = jnp.where((state.count >= warmup) & (norm > limit), limit, norm)
        # The place to write goes round; counting on from `window` to 2 * window keeps it in int32.
        after = QuantileState(
            state.norms.at[state.count % window].set(norm),
            jnp.where(state.count + 1 < 2 * window, state.count + 1, window),
        )
        return clipping.scale_to(updates, norm, clipped), trees.select_tree(
            jnp.isfinite(norm), after, state
        )

    return optax.GradientTransformation(init_fn, update_fn)


class SkipOutliersState(NamedTuple):
    """The state of `skip_outliers`: the norms of the gradients it let through, and counters."""

    norms: RunningNorm
    skipped: jax.Array
    """Updates skipped since the start, an int32 scalar."""
    skipped_in_a_row: jax.Array
    """Finite outliers since the last update that was let through, an int32 scalar."""
    inner_state: Any


def skip_outliers(
    inner: optax.GradientTransformation,
    factor: float = 10.0,
    *,
    decay: float = 0.97,
    warmup: int = 25,
    patience: int = 10,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, held whole where the gradient's norm exceeds `factor` times its running mean or is not finite.

    A skip returns zero updates and leaves the state of `inner` as it is: moments, schedules and
    counters included. Only gradients that were let through enter the mean. Put it around everything that
    has a memory, and inside of `with_loss_scale`, which unscales and itself skips what is not finite:

        with_loss_scale(skip_outliers(chain(...)), DynamicLossScale())

    Norms may also change for good. After `patience` finite outliers in a row the next one is let
    through and the mean starts anew from it, so a change of regime costs `patience` updates and never
    stops the run. Gradients that are not finite are always skipped and use up no patience. The first
    `warmup` norms, also after a new start, are only learned from.
    """
    clipping.require_positive("skip_outliers", factor)
    _check_memory("skip_outliers", decay, warmup)
    if patience < 1:
        raise ValueError(f"skip_outliers expects a patience of 1 step or more, got {patience}.")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> SkipOutliersState:
        zero = lambda: jnp.zeros([], jnp.int32)
        return SkipOutliersState(RunningNorm.start(), zero(), zero(), inner.init(params))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        norm, finite = trees.norm_and_finite(updates)
        outlier = (state.norms.count >= warmup) & (norm > factor * state.norms.mean)
        give_in = outlier & (state.skipped_in_a_row >= patience)
        applied = finite & (~outlier | give_in)
        known = trees.select_tree(give_in, RunningNorm.start(), state.norms)
        in_a_row = jnp.where(applied, 0, state.skipped_in_a_row + jnp.int32(finite))
        new_updates, new_inner = inner.update(updates, state.inner_state, params, **extra_args)
        return scaling.zero_unless(applied, new_updates), SkipOutliersState(
            norms=trees.select_tree(applied, known.see(norm, decay, warmup), state.norms),
            skipped=state.skipped + jnp.int32(~applied),
            skipped_in_a_row=in_a_row,
            inner_state=trees.select_tree(applied, new_inner, state.inner_state),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def skipped_outliers_of(opt_state: Any) -> jax.Array:
    """Updates that `skip_outliers` left out since the start, however deep in the state; 0 without it."""
    is_skip = lambda node: isinstance(node, SkipOutliersState)
    nodes = jax.tree.leaves(opt_state, is_leaf=is_skip)
    counts = [node.skipped for node in nodes if is_skip(node)]
    return sum(counts, jnp.zeros([], jnp.int32))


def _check_memory(name: str, decay: float, warmup: int) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"{name} expects a decay in [0, 1), such as 0.97, got {decay!r}.")
    if warmup < 1:
        raise ValueError(f"{name} expects a warmup of 1 norm or more to learn from, got {warmup}.")
