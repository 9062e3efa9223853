"""Loss scaling and the finite guard as one optax transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmp.numerics import tree as trees
from jaxmp.precision import loss_scale as scales


class LossScaleState(NamedTuple):
    """The state of `with_loss_scale`: the scale that the next loss is multiplied by, and counters."""

    loss_scale: scales.LossScale
    skipped: jax.Array
    """Steps skipped since the start, an int32 scalar."""
    skipped_in_a_row: jax.Array
    """Steps skipped since the last one that was applied, an int32 scalar."""
    inner_state: Any


def with_loss_scale(
    inner: optax.GradientTransformation, loss_scale: scales.LossScale | None = None
) -> optax.GradientTransformationExtraArgs:
    """`inner` fed with unscaled gradients, and held whole on steps whose gradients are not finite.

    In each update, in this order, since every other order is wrong somewhere:

        gradients = gradients / S              # the S that multiplied the loss of this very step
        finite    = all(isfinite(gradients))   # before clipping, which turns one inf into NaNs
        updates   = inner(gradients) if finite else 0
        state     = inner's new state if finite else its old one, counters and schedules included
        S         = adjusted for the next step

    The caller multiplies its loss by `loss_scale_of(opt_state)` and passes on the scaled gradients;
    `training.make_train_step` does both. Passing `value=loss` to `update` (the loss without scale, as
    optax's own transformations take it) also skips the step where the loss is not finite, and then
    leaves S alone: S does not enter the forward pass, so no S could mend it.

    Without a `loss_scale` this is the guard alone, for float32 and bfloat16.
    """
    inner = optax.with_extra_args_support(inner)
    loss_scale = scales.NoOpLossScale() if loss_scale is None else loss_scale

    def init_fn(params: Any) -> Any:
        # One buffer each: a donated state may not hold the same buffer twice.
        start = jax.tree.map(lambda x: jnp.array(x, copy=True), loss_scale)
        zero = lambda: jnp.zeros([], jnp.int32)
        return LossScaleState(start, zero(), zero(), inner.init(params))

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        unscaled = state.loss_scale.unscale(updates)
        # The compiler merges this norm with the one that a clip in `inner` computes of the same
        # gradients, so the check costs no second pass over them.
        _, finite = trees.norm_and_finite(unscaled)
        forward_finite = jnp.array(True) if value is None else jnp.all(jnp.isfinite(value))
        applied = finite & forward_finite
        if value is not None:
            extra_args["value"] = value
        new_updates, new_inner = inner.update(unscaled, state.inner_state, params, **extra_args)
        adjusted = state.loss_scale.adjust(finite)
        return (
            zero_unless(applied, new_updates),
            LossScaleState(
                loss_scale=trees.select_tree(forward_finite, adjusted, state.loss_scale),
                skipped=state.skipped + jnp.int32(~applied),
                skipped_in_a_row=jnp.where(applied, 0, state.skipped_in_a_row + 1),
                inner_state=trees.select_tree(applied, new_inner, state.inner_state),
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def zero_unless(applied: jax.Array, updates: Any) -> Any:
    """The updates where a step is applied, else zeros."""
    # Behind a barrier, or the compiler makes one array of it and of any other zeros of that shape
    # (an embedding's gradient starts as such), and the update reads that from memory.
    zero = jax.lax.optimization_barrier(jnp.zeros([], jnp.float32))
    return jax.tree.map(lambda u: jnp.where(applied, u, zero.astype(u.dtype)), updates)


def is_loss_scale_state(node: Any) -> bool:
    """Whether a node of an optimizer state is that of `with_loss_scale`."""
    return isinstance(node, LossScaleState)


def loss_scale_state_of(opt_state: Any) -> LossScaleState | None:
    """The state of `with_loss_scale` inside an optimizer state, however deep; None if there is none.

    Raises:
      ValueError: there are several, and it is unclear which one scales the loss.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=is_loss_scale_state)
    found = [node for node in nodes if is_loss_scale_state(node)]
    if len(found) > 1:
        raise ValueError(
            f"The optimizer state holds {len(found)} loss scales, expected at most one: wrap the whole "
            "chain in a single with_loss_scale(...)."
        )
    return found[0] if found else None


def loss_scale_of(opt_state: Any) -> jax.Array:
    """The factor that the next loss is multiplied by, a float32 scalar; 1 if nothing scales."""
    state = loss_scale_state_of(opt_state)
    return jnp.asarray(1 if state is None else state.loss_scale.loss_scale, jnp.float32)


def hold_unless(applied: jax.Array, new_state: Any, old_state: Any) -> Any:
    """`new_state` where a step is applied, else `old_state`, but for the loss scale and its counters.

    It covers what stands beside `with_loss_scale` in a chain, and chains without it.
    """

    def choose(new: Any, old: Any) -> Any:
        if not is_loss_scale_state(new):
            return trees.select_tree(applied, new, old)
        return new._replace(
            inner_state=trees.select_tree(applied, new.inner_state, old.inner_state)
        )

    return jax.tree.map(choose, new_state, old_state, is_leaf=is_loss_scale_state)
