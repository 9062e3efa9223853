"""Loss scaling: multiply the loss so that small 16-bit gradients survive, divide them afterwards.

Float16 rounds magnitudes up to 2^-25 to zero. Backpropagation is linear, so a loss multiplied by S
yields every cotangent multiplied by S, and dividing the float32 gradients by S undoes it exactly when
S is a power of two. (Micikevicius et al. 2018, arXiv 1710.03740.)
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")


@flax.struct.dataclass
class NoOpLossScale:
    """No scaling: for float32 and bfloat16, whose exponents reach as far as the gradients do."""

    @property
    def loss_scale(self) -> int:
        return 1

    def scale(self, tree: T) -> T:
        """The tree itself."""
        return tree

    def unscale(self, tree: T) -> T:
        """The tree itself."""
        return tree

    def adjust(self, grads_finite: jax.Array) -> NoOpLossScale:
        """Itself, whatever happened."""
        del grads_finite
        return self


@flax.struct.dataclass
class StaticLossScale:
    """Scaling by one constant, part of the compiled program. Powers of two are exact."""

    loss_scale: float = flax.struct.field(pytree_node=False)

    def __post_init__(self) -> None:
        # A number, not an array: static fields must hash. The constructor also sees placeholders.
        if isinstance(self.loss_scale, np.ndarray | np.generic | jax.Array):
            object.__setattr__(self, "loss_scale", float(self.loss_scale))

    def scale(self, tree: T) -> T:
        """The tree times the scale, in float32 or wider."""
        return _multiply(tree, self.loss_scale)

    def unscale(self, tree: T) -> T:
        """The tree divided by the scale, in float32 or wider: 16 bits would flush the quotient."""
        return _multiply(tree, 1 / self.loss_scale)

    def adjust(self, grads_finite: jax.Array) -> StaticLossScale:
        """Itself, whatever happened."""
        del grads_finite
        return self


@flax.struct.dataclass
class DynamicLossScale:
    """The largest scale that keeps gradients finite, found by trying.

        S, counter = 2**15, 0
        for every step:
            gradients of (loss * S), divided by S
            if all are finite:
                counter += 1
                if counter == period:                  # long enough without overflow: try more
                    S, counter = min(S * factor, max_loss_scale), 0
            else:                                      # the step is skipped
                overflows in a row += 1
                if overflows in a row == hysteresis:   # not a single bad batch: retreat
                    S, counter = max(S / factor, min_loss_scale), 0

    Defaults: start at 2^15, half of float16's largest power of two, so that a loss of order 1 does not
    overflow at once; `period` 2000 costs one skipped step in 2001 at the steady state; `factor` 2 keeps
    every scale a power of two, so scaling never rounds; floor 1, below which scaling would add underflow
    to float16's; cap 2^32, beyond which nothing more is recovered that an optimizer in float32 could use
    and S·loss stays far inside float32; `hysteresis` 1, retreat at every overflow.

    It flattens to two leaves, `[loss_scale, counter]`; the other fields are static. `counter` counts
    finite steps since the last change, or, below zero, overflows in a row that hysteresis let pass.
    """

    loss_scale: Any = 2.0**15
    counter: Any = flax.struct.field(default_factory=lambda: np.zeros([], np.int32))
    period: int = flax.struct.field(pytree_node=False, default=2000)
    factor: float = flax.struct.field(pytree_node=False, default=2)
    min_loss_scale: float = flax.struct.field(pytree_node=False, default=1.0)
    max_loss_scale: float = flax.struct.field(pytree_node=False, default=2.0**32)
    hysteresis: int = flax.struct.field(pytree_node=False, default=1)

    def __post_init__(self) -> None:
        _warn_if_not_floating(self.loss_scale, "loss_scale")
        _warn_if_not_floating(self.min_loss_scale, "min_loss_scale")
        # Float32 arrays from the start: a Python number or a float16 scale would have another type
        # after the first step and cost a second trace. JAX also builds the class from placeholders.
        if isinstance(self.loss_scale, bool | int | float | np.ndarray | np.generic | jax.Array):
            scale = self.loss_scale
            module = jnp if isinstance(scale, jax.Array) else np
            object.__setattr__(self, "loss_scale", module.asarray(scale, np.float32))
        if isinstance(self.counter, int):
            object.__setattr__(self, "counter", np.asarray(self.counter, np.int32))
        for name in ("min_loss_scale", "max_loss_scale"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def scale(self, tree: T) -> T:
        """The tree times the scale, in float32 or wider."""
        return _multiply(tree, self.loss_scale)

    def unscale(self, tree: T) -> T:
        """The tree divided by the scale, in float32 or wider: 16 bits would flush the quotient."""
        return _multiply(tree, 1 / self.loss_scale)

    def adjust(self, grads_finite: jax.Array) -> DynamicLossScale:
        """The scale for the next step, given whether this step's gradients were finite."""
        grads_finite = jnp.asarray(grads_finite)
        good = jnp.maximum(self.counter, 0) + 1
        bad = jnp.minimum(self.counter, 0) - 1
        grow = grads_finite & (good >= self.period)
        shrink = ~grads_finite & (-bad >= self.hysteresis)
        scale = jnp.asarray(self.loss_scale)
        # Bounds bind on the way only: a scale set beyond its cap is left there, not pulled down.
        raised = jnp.where(scale * self.factor <= self.max_loss_scale, scale * self.factor, scale)
        lowered = jnp.maximum(scale / self.factor, self.min_loss_scale)
        counter = jnp.where(grads_finite, good, bad)
        return dataclasses.replace(
            self,
            loss_scale=jnp.where(grow, raised, jnp.where(shrink, lowered, scale)),
            counter=jnp.where(grow | shrink, 0, counter).astype(jnp.int32),
        )


LossScale = NoOpLossScale | StaticLossScale | DynamicLossScale


def _multiply(tree: T, factor: Any) -> T:
    def multiply(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            return leaf
        return jnp.asarray(leaf, jnp.promote_types(dtype, jnp.float32)) * factor

    return jax.tree.map(multiply, tree)


def _warn_if_not_floating(value: Any, name: str) -> None:
    dtype = getattr(value, "dtype", None)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        warnings.warn(
            f"Expected floating type for {name}, got {dtype}: it is used as float32.", stacklevel=4
        )
