"""Caps on the weights themselves: by norm and by largest singular value, as the last links of a chain.

A cap stands behind the learning rate. It knows the update u that would be applied to w, and returns
another, such that w + u obeys the cap up to the rounding of that sum:

    u  <-  (w + u) * min(1, cap / size(w + u)) - w

Arrays of fewer than two dimensions, such as biases and scales, pass through. The last axis counts a
matrix's outputs, the axes before it what one output sums over: [in, out], a convolution's
[height, width, in, out]. Where a first axis counts layers, as `nn.scan` makes them, only names can tell:
`stacked` takes patterns of parameter paths, as in `stacked=("blocks",)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmp.numerics import tree as trees
from jaxmp.optim import clipping

_FIRST_STEPS = 20


def clip_weights(
    max_norm: float, *, per: Literal["unit", "matrix"] = "unit", stacked: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Updates after which each unit's or each matrix's weights have a Euclidean norm of at most `max_norm`.

    A unit is what one output sums over, as in `clip_by_unit_norm`. Weights above the cap are scaled
    down as one, which keeps their direction. (Max-norm, Srebro and Shraibman 2005; with dropout,
    Srivastava et al. 2014, JMLR 15, section 5.1.)
    """
    clipping.require_positive("clip_weights", max_norm)
    if per not in ("unit", "matrix"):
        raise ValueError(f"clip_weights caps norms per 'unit' or per 'matrix', got {per!r}.")

    def cap(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        first = _layer_axes(path, stacked)
        if param.ndim - first < 2:
            return update
        moved = (param + update).astype(jnp.float32)
        axes = tuple(range(first, param.ndim - (per == "unit")))
        norm = jnp.sqrt(jnp.sum(jnp.square(moved), axes, keepdims=True))
        return _shrink(update, param, moved, norm, max_norm)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _require_params("clip_weights", params)
        return jax.tree_util.tree_map_with_path(cap, updates, params), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


class SpectralState(NamedTuple):
    """The state of `clip_spectral_norm`: for each matrix a unit vector near its top right singular one."""

    vectors: Any


def clip_spectral_norm(
    max_sigma: float = 1.0, *, stacked: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Updates after which each matrix's largest singular value is at most `max_sigma`, nearly.

    One step of power iteration per update, W the weights after it, v from the update before:

        u = W v / |W v|,   sigma = |W^T u|,   v <- W^T u / sigma,   W <- W min(1, max_sigma / sigma)

    The estimate approaches the true value from below, so a matrix may exceed the cap by what the
    iteration has not caught up with: it starts with 20 steps, and weights move slowly. Every
    matrix is scaled as a whole. A convolution's kernel is taken as the matrix [height * width * in, out];
    the norm of the convolution itself may be larger, for stride 1 by at most sqrt(height * width).
    (Yoshida and Miyato 2017, arXiv 1705.10941; Miyato et al. 2018, arXiv 1802.05957.)
    """
    clipping.require_positive("clip_spectral_norm", max_sigma)

    def start(path: Any, param: jax.Array) -> jax.Array:
        matrices = _matrices(param, _layer_axes(path, stacked))
        shape = matrices.shape[:-2] + matrices.shape[-1:]
        vectors = jax.random.normal(jax.random.key(0), shape, jnp.float32)
        step = lambda _, v: _power_step(matrices, v)[0]
        return jax.lax.fori_loop(0, _FIRST_STEPS, step, _unit(vectors, vectors)[0])

    def cap(
        path: Any, update: jax.Array, param: jax.Array, vector: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        first = _layer_axes(path, stacked)
        moved = (param + update).astype(jnp.float32)
        vector, sigma = _power_step(_matrices(moved, first), vector)
        sigma = sigma.reshape(param.shape[:first] + (1,) * (param.ndim - first))
        return _shrink(update, param, moved, sigma, max_sigma), vector

    def init_fn(params: Any) -> SpectralState:
        return SpectralState(jax.tree_util.tree_map_with_path(start, params))

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _require_params("clip_spectral_norm", params)
        both = jax.tree_util.tree_map_with_path(cap, updates, params, state.vectors)
        updates, vectors = jax.tree.transpose(jax.tree.structure(updates), None, both)
        return updates, SpectralState(vectors)

    return optax.masked(optax.GradientTransformation(init_fn, update_fn), _matrix_mask(stacked))


def _layer_axes(path: Any, stacked: Sequence[str]) -> int:
    """1 if the first axis of the parameter counts layers, else 0."""
    name = trees.path_string(path)
    return int(any(trees.match_path(pattern, name) for pattern in stacked))


def _matrix_mask(stacked: Sequence[str]) -> Callable[[Any], Any]:
    is_matrix = lambda path, leaf: jnp.ndim(leaf) - _layer_axes(path, stacked) >= 2
    return lambda tree: jax.tree_util.tree_map_with_path(is_matrix, tree)


def _matrices(param: jax.Array, first: int) -> jax.Array:
    """The parameter as float32 [in, out], with the axis of layers, if it has one, in front."""
    return param.reshape((*param.shape[:first], -1, param.shape[-1])).astype(jnp.float32)


def _power_step(matrices: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(better right vectors [..., out], estimates of the largest singular values [...])."""
    # Accelerators round float32 operands of products unless told otherwise; these are no large ones.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    left = product("...io,...o->...i", matrices, vectors)
    left, _ = _unit(left, left)
    return _unit(product("...io,...i->...o", matrices, left), vectors)


def _unit(x: jax.Array, fallback: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x over its norm along the last axis, or the fallback where x is zero; the norm)."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True))
    return jnp.where(norm > 0, x / jnp.where(norm > 0, norm, 1.0), fallback), norm[..., 0]


def _shrink(
    update: jax.Array, param: jax.Array, moved: jax.Array, size: jax.Array, cap: float
) -> jax.Array:
    """The update to `moved` brought back to the cap; where it is within, the update itself, bit by bit."""
    shrunk = moved * (cap / jnp.where(size > cap, size, cap)) - param.astype(jnp.float32)
    return jnp.where(size > cap, shrunk, update.astype(jnp.float32)).astype(update.dtype)


def _require_params(name: str, params: Any) -> None:
    if params is None:
        raise ValueError(f"{name} caps parameters: call tx.update(updates, state, params).")
