"""Clipping as optax transformations: by global norm, by value, per unit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmp.numerics import tree as trees


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Gradients scaled down together so that their Euclidean norm is at most `max_norm`.

    The norm is a float32 one, right at any magnitude (see `numerics.tree.norm_and_finite`), also for
    16-bit gradients, whose own squares would overflow or vanish. Gradients that are not finite stay so:
    the guard of `with_loss_scale` comes before. (Pascanu et al. 2013, arXiv 1211.5063.)
    """
    require_positive("clip_by_global_norm", max_norm)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = trees.global_norm(updates)
        return scale_to(updates, norm, jnp.minimum(norm, max_norm)), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def clip_by_value(max_value: float) -> optax.GradientTransformation:
    """Each element of the gradients limited to [-max_value, max_value]. It changes their direction."""
    require_positive("clip_by_value", max_value)
    return optax.clip(max_value)


def clip_by_unit_norm(ratio: float = 0.01, eps: float = 1e-3) -> optax.GradientTransformation:
    """Adaptive gradient clipping: no unit's gradient exceeds `ratio` times the norm of its weights.

        g_i  <-  g_i * min(1, ratio * max(|w_i|, eps) / |g_i|)

    A unit is what one output feels: all axes of an array but the last, or the whole of a vector or
    scalar; norms are float32. `eps` lets units that start at zero move. Its authors leave the output
    layer out: use `optax.masked`. (Brock et al. 2021, arXiv 2102.06171, equation 3.)
    """
    require_positive("clip_by_unit_norm", ratio)

    def clip(update: jax.Array, param: jax.Array) -> jax.Array:
        limit = ratio * jnp.maximum(_unit_norm(param), eps)
        norm = _unit_norm(update)
        # Where the gradient is zero the quotient is not taken: 0 stays 0, not NaN.
        factor = jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1.0), 1.0)
        return (update * factor).astype(update.dtype)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "clip_by_unit_norm compares gradients with parameters: call "
                "tx.update(grads, state, params)."
            )
        return jax.tree.map(clip, updates, params), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _unit_norm(x: jax.Array) -> jax.Array:
    axes = tuple(range(x.ndim - 1)) if x.ndim > 1 else None
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))


def scale_to(updates: Any, norm: jax.Array, limit: jax.Array) -> Any:
    """The updates, whose global norm is `norm`, scaled down to `limit`, or themselves if that is no less."""
    factor = jnp.where(norm > limit, limit / norm, 1.0)
    return jax.tree.map(lambda u: (u * factor).astype(u.dtype), updates)


def require_positive(name: str, value: float) -> None:
    """Raises a ValueError that names the transformation unless its limit is above 0."""
    if not value > 0:
        raise ValueError(
            f"{name} expects a limit above 0, got {value!r}. Leave it out to not clip."
        )
