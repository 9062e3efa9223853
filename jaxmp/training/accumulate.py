"""Gradient accumulation: one large batch as several small ones, summed in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.numerics import tree as trees

# (microbatch, its index, model_state) -> (metrics, gradients, model_state)
MicroStep = Callable[[Any, jax.Array | int, Any], tuple[Any, Any, Any]]


def accumulate(
    micro_step: MicroStep, params: Any, batch: Any, model_state: Any, parts: int
) -> tuple[Any, Any, Any]:
    """Means over `parts` microbatches of the metrics and gradients, and the last model state.

    Gradients are summed in float32, so that 16-bit ones do not lose small terms, and one infinity in
    one microbatch shows in the result. The mean of means equals the mean over the batch when each
    example weighs the same. `model_state` passes from one microbatch to the next. `params` are what
    the gradients are taken at: their shapes are all that is used.

    Raises:
      ValueError: the leading axis of a leaf of the batch is not divisible by `parts`.
    """
    if parts == 1:
        metrics, gradients, model_state = micro_step(batch, 0, model_state)
        return metrics, jax.tree.map(_widen_stored, gradients), model_state

    def body(carry: Any, micro: Any) -> Any:
        total, model_state = carry
        examples, index = micro
        metrics, gradients, model_state = micro_step(examples, index, model_state)
        add = lambda t, g: t + g.astype(jnp.float32)
        return (jax.tree.map(add, total, gradients), model_state), metrics

    split = jax.tree.map(lambda x: _split(x, parts), batch)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    xs = (split, jnp.arange(parts))
    (total, model_state), metrics = jax.lax.scan(body, (zeros, model_state), xs)
    mean = lambda m: jnp.mean(m.astype(jnp.promote_types(m.dtype, jnp.float32)), axis=0)
    gradients = jax.tree.map(lambda t: t / parts, total)
    return jax.tree.map(mean, metrics), gradients, model_state


def _widen_stored(gradient: jax.Array) -> jax.Array:
    """The gradient in float32, read from memory in the 16 bits that it was computed in.

    Without the barrier XLA drops the rounding to 16 bits wherever it can and stores float32, which
    the norm and the update then read; and from the kernels that it writes for products it reads a
    gradient once for each of the norm's three sums.
    """
    narrow = trees.is_floating(gradient) and gradient.dtype.itemsize == 2
    stored = jax.lax.optimization_barrier(gradient) if narrow else gradient
    return trees.cast_leaf(stored, jnp.float32)


def _split(x: jax.Array, parts: int) -> jax.Array:
    size = x.shape[0] if x.ndim else 1
    if size % parts:
        raise ValueError(
            f"A batch of {size} examples cannot be accumulated in {parts} equal parts: choose a "
            f"batch size divisible by {parts}, or another number of parts."
        )
    # Every part takes each parts-th example: a batch sharded over devices stays spread over all.
    return x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1)
