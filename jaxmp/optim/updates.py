"""Limits on the size of an update, for the case that Adam's second moment lags behind its gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmp.optim import clipping


def clip_update_rms(max_rms: float = 1.0) -> optax.GradientTransformation:
    """Updates scaled down, array by array, so that their root mean square is at most `max_rms`.

        u  <-  u / max(1, rms(u) / max_rms)

    What it divides is what the link before it returns: put it behind `scale_by_adam` and before decay
    and the learning rate, where an update is the first moment over the root of the second and 1 is its
    usual size. There it works on what momentum made of the gradient; `scale_by_stable_adam` judges the
    gradient itself. (AdaFactor's update clipping, Shazeer and Stern 2018, arXiv 1804.04235, section 6.)
    """
    clipping.require_positive("clip_update_rms", max_rms)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        limit = lambda u: (u / jnp.maximum(1.0, _rms(u) / max_rms)).astype(u.dtype)
        return jax.tree.map(limit, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def scale_by_stable_adam(
    b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam's direction, divided array by array by how far the gradient outgrew its second moment.

        stale = sqrt(mean(g^2 / max(v, eps^2)))
        u     = m / (sqrt(v) + eps) / max(1, stale)

    with m and v the moments after this gradient, corrected for their start at zero, float32. When a
    signal that was quiet for long comes back, v still remembers the quiet and Adam's step is too
    long by about `stale`; this is what it answers, hence the shorter memory of v. It does not undo a
    single bad batch, whose square stays in v. In StableAdamW the same factor also divides the decay,
    as part of the learning rate; here decay comes behind, whole. (Wortsman et al. 2023, arXiv
    2304.13013, algorithm 2.)
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        directions, state = adam.update(updates, state, params)
        correction = 1 - b2 ** state.count.astype(jnp.float32)

        def limit(direction: jax.Array, gradient: jax.Array, nu: jax.Array) -> jax.Array:
            root = jnp.maximum(jnp.sqrt(nu / correction), eps)
            return direction / jnp.maximum(1.0, _rms(gradient / root))

        return jax.tree.map(limit, directions, updates, state.nu), state

    return optax.GradientTransformation(adam.init, update_fn)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
