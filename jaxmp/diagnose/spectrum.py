"""Jacobians without forming them: how far a function stretches a small change, at a given point.

Every figure here is local: it holds at the input it was measured at, and a largest singular value
found by Lanczos is a lower bound of the true one. No global Lipschitz constant is offered; those that
can be proved for whole networks are tens to thousands of times too large to act on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmp.diagnose import layer_gains
from jaxmp.numerics import tree as trees


class JacobianSpectrum(NamedTuple):
    """What `jacobian_spectrum` measures of the Jacobian J at one point."""

    singular_values: Array
    """[steps], descending: lower bounds of the largest singular values, the first one the tightest.
    One that occurs several times may be counted once."""
    frobenius_norm: Array
    """The estimate of the root of the sum of all squared entries of J."""
    frobenius_error: Array
    """Its standard error over the probes."""

    def __str__(self) -> str:
        sigma = float(np.max(self.singular_values))
        return (
            f"largest singular value at least {sigma:.4g}, Frobenius norm "
            f"{float(np.max(self.frobenius_norm)):.4g} +- {float(np.max(self.frobenius_error)):.2g} "
            "(local, at this input)"
        )


class StackSpectrum(NamedTuple):
    """What `stack_spectrum` measures of blocks applied one after another."""

    blocks: Array
    """[L], the largest singular value of each block's Jacobian at the input it is given."""
    whole: Array
    """That of all blocks together."""

    @property
    def log10_product(self) -> Array:
        """log10 of the product of the blocks' values, which bounds `whole` and may be out of range."""
        return jnp.sum(jnp.log10(self.blocks), axis=-1)

    @property
    def product(self) -> Array:
        """The product of the blocks' values; inf or 0 where it is beyond the dtype's range."""
        return jnp.prod(self.blocks, axis=-1)

    def __str__(self) -> str:
        blocks = np.asarray(self.blocks).reshape(-1, self.blocks.shape[-1]).max(axis=0)
        return (
            f"whole stack {float(np.max(self.whole)):.4g}, product of its {len(blocks)} blocks "
            f"10^{float(np.max(self.log10_product)):.2f}; blocks: "
            + ", ".join(f"{value:.3g}" for value in blocks)
            + " (local lower bounds)"
        )


class Homogeneity(NamedTuple):
    """How nearly f(t x) = t^degree f(x) holds around one x."""

    degree: Array
    """The degree that fits best; the function's own where the residual is zero."""
    residual: Array
    """|J x - degree f(x)| / |f(x)|: zero exactly where Euler's identity holds."""

    def __str__(self) -> str:
        degree, residual = float(self.degree), float(self.residual)
        if residual < 1e-3:
            return f"homogeneous of degree {degree:.4g} (Euler residual {residual:.1e})"
        return (
            f"not homogeneous: best degree {degree:.4g} leaves an Euler residual of {residual:.2g}"
        )


def lipschitz(
    fn: Callable[[Any], Any],
    x: Any,
    *,
    batched: bool = False,
    steps: int = 12,
    key: Array | None = None,
) -> layer_gains.Gains:
    """Gives the largest singular value of fn's Jacobian at x: its local Lipschitz constant.

        sup over small d of |fn(x + d) - fn(x)| / |d|

    It is found by `steps` steps of Lanczos (Golub-Kahan, fully re-orthogonalised), each one product
    with J and one with its transpose, and is a lower bound: with the default mostly within 1% of a
    random matrix's, seldom 2% below; more steps where several singular values crowd at the top.

    Args:
      fn: any function of one pytree that reverse mode can differentiate, `custom_vjp` included.
        Leaves that are not floating-point, of x and of the result, are held constant or left out.
      x: the point; 16-bit leaves are fine, but J is then that of the 16-bit program, with its
        rounding. Vectors are combined in float32 (float64 for float64 leaves).
      batched: the leaves of x lead with an axis of examples and fn takes one example; the result
        then holds one number for each, and reports their maximum, 99th percentile and median.
      key: where Lanczos starts; a fixed one by default, so that the answer repeats.

    Source: Golub and Kahan 1965, doi 10.1137/0702016.
    """

    def at_point(point: Any) -> Array:
        return _singular_values(_linearize(fn, point), steps, key)[0]

    return layer_gains.Gains(jax.vmap(at_point)(x) if batched else at_point(x))


def jacobian_spectrum(
    fn: Callable[[Any], Any],
    x: Any,
    *,
    steps: int = 12,
    probes: int = 8,
    key: Array | None = None,
) -> JacobianSpectrum:
    """Gives the leading singular values and the Frobenius norm of fn's Jacobian at x.

    Pure, so it can be jitted, and vmapped over points. Costs about 3 + 2 `steps` + `probes` calls of
    fn. Arguments as for `lipschitz`; `probes` as for `frobenius_norm`.
    """
    jacobian = _linearize(fn, x)
    norm, error = _hutchinson(jacobian, probes, key)
    return JacobianSpectrum(_singular_values(jacobian, steps, key), norm, error)


def frobenius_norm(
    fn: Callable[[Any], Any], x: Any, *, probes: int = 8, key: Array | None = None
) -> tuple[Array, Array]:
    """Gives an estimate of the Frobenius norm of fn's Jacobian at x, and its standard error.

        |J|_F^2 = E |J v|^2   for v of independent random signs

    The variance of one probe is 2 (|J^T J|_F^2 - sum of the squared diagonal of J^T J): little where
    J is well conditioned, much where one singular value dominates. `probes` is at least 2.

    Source: Hutchinson 1990, doi 10.1080/03610919008812866.
    """
    return _hutchinson(_linearize(fn, x), probes, key)


def stack_spectrum(
    blocks: Sequence[Callable[[Any], Any]] | Callable[[Any, Any], Any],
    x: Any,
    params: Any = None,
    *,
    steps: int = 12,
    key: Array | None = None,
) -> StackSpectrum:
    """Gives the largest singular value of each block in turn and of the whole stack, from x on.

    The chain rule makes the whole's Jacobian the product of the blocks', so the product of their
    values bounds the whole's; how far apart the two are says whether the blocks stretch the same
    directions.

    Args:
      blocks: functions applied one after another; or one function `block(params, x)`, with
      params: stacked parameters whose leaves lead with the axis of blocks, as `nn.scan` keeps them.
        The blocks are then measured together by one vmap, and x keeps its shapes and dtypes.
    """
    if callable(blocks):
        if params is None:
            raise ValueError(
                "stack_spectrum: one block function needs stacked parameters, and params is None; "
                "pass params=..., or a list of functions of x alone."
            )
        return _scanned_stack(blocks, params, x, steps, key)
    if params is not None or not blocks:
        raise ValueError(
            f"stack_spectrum: expected a list of at least one function of x alone, without params; "
            f"came {len(blocks)} with params {'given' if params is not None else 'None'}."
        )

    def whole(h: Any) -> Any:
        for block in blocks:
            h = block(h)
        return h

    values, h = [], x
    for block in blocks:
        values.append(_singular_values(_linearize(block, h), steps, key)[0])
        h = block(h)
    return StackSpectrum(jnp.stack(values), _singular_values(_linearize(whole, x), steps, key)[0])


def _scanned_stack(
    block: Callable[[Any, Any], Any], params: Any, x: Any, steps: int, key: Array | None
) -> StackSpectrum:
    def value_of_block(block_params: Any, h: Any) -> Array:
        return _singular_values(_linearize(lambda h: block(block_params, h), h), steps, key)[0]

    def whole(h: Any) -> Any:
        return lax.scan(lambda h, p: (block(p, h), None), h, params)[0]

    _, inputs = lax.scan(lambda h, p: (block(p, h), h), x, params)
    return StackSpectrum(
        jax.vmap(value_of_block)(params, inputs),
        _singular_values(_linearize(whole, x), steps, key)[0],
    )


def homogeneity_degree(fn: Callable[[Any], Any], x: Any) -> Homogeneity:
    """Gives the degree k for which fn(t x) = t^k fn(x) fits best around x, and what is left over.

        k = <J x, fn(x)> / |fn(x)|^2,   residual = |J x - k fn(x)| / |fn(x)|

    By Euler's identity J x = k fn(x), for every homogeneous function and no other; no step size is
    involved, so piecewise homogeneous networks (ReLU, max pooling) come out exactly. In float32 a
    homogeneous network leaves less than 1e-5, one with GELU, softmax or biases more than 0.05.
    Degree 1 passes scale on, degree 0 (normalisation) forgets it, a higher one amplifies it.

    Pass `lambda params: apply(params, inputs)` and the parameters to get the degree in those. NaN
    where fn(x) is zero.
    """
    jacobian = _linearize(fn, x)
    norm = _norm(jacobian.value)
    direction = jacobian.value / norm
    stretched = jacobian.times(jacobian.point) / norm
    degree = _dot(direction, stretched)
    return Homogeneity(degree, _norm(stretched - degree * direction))


class _Jacobian(NamedTuple):
    """A function at a point as a matrix that is never formed, on flat vectors of float32 or wider."""

    point: Array
    """[n], the floating-point leaves of the input."""
    value: Array
    """[m], those of the output."""
    times: Callable[[Array], Array]
    """v [n] -> J v [m]"""
    transpose_times: Callable[[Array], Array]
    """u [m] -> J^T u [n]"""


def _linearize(fn: Callable[[Any], Any], x: Any) -> _Jacobian:
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, x))
    places = [i for i, leaf in enumerate(leaves) if trees.is_floating(leaf)]
    inputs = [leaves[i] for i in places]

    def floating(inputs: list[Array]) -> list[Array]:
        replaced = list(leaves)
        for i, leaf in zip(places, inputs):
            replaced[i] = leaf
        outputs = jax.tree.leaves(fn(jax.tree.unflatten(treedef, replaced)))
        return [out for out in map(jnp.asarray, outputs) if trees.is_floating(out)]

    # J is the transpose of the backward pass, not a forward derivative, so that functions with a
    # `custom_vjp` (fused attention) have one too.
    outputs, vjp = jax.vjp(floating, inputs)
    if sum(leaf.size for leaf in inputs) == 0 or sum(leaf.size for leaf in outputs) == 0:
        raise ValueError(
            f"A Jacobian needs floating-point numbers on both sides; {len(inputs)} of {len(leaves)} "
            f"input leaves and {len(outputs)} output leaves are floating-point and not empty. "
            "Cast the input or return the float result."
        )
    pull = lambda cotangents: vjp(cotangents)[0]
    push = jax.linear_transpose(pull, outputs)
    wide = jnp.float64 if any(a.dtype == jnp.float64 for a in inputs + outputs) else jnp.float32
    return _Jacobian(
        _pack(inputs, wide),
        _pack(outputs, wide),
        lambda v: _pack(push(_unpack(v, inputs))[0], wide),
        lambda u: _pack(pull(_unpack(u, outputs)), wide),
    )


def _pack(leaves: Sequence[Array], dtype: Any) -> Array:
    return jnp.concatenate([leaf.astype(dtype).ravel() for leaf in leaves])


def _unpack(vector: Array, like: Sequence[Array]) -> list[Array]:
    ends = np.cumsum([leaf.size for leaf in like])
    parts = jnp.split(vector, ends[:-1])
    return [part.reshape(a.shape).astype(a.dtype) for part, a in zip(parts, like)]


def _norm(x: Array) -> Array:
    """The Euclidean norm, scaled by the largest entry: squares would leave the range long before."""
    largest = jnp.max(jnp.abs(x))
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale)))


def _dot(a: Array, b: Array) -> Array:
    # The default on accelerators multiplies in fewer bits, which loses orthogonality.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _singular_values(jacobian: _Jacobian, steps: int, key: Array | None) -> Array:
    """[k] descending, from the k x (k+1) bidiagonal U^T J V for orthonormal U and V.

    Whatever U and V, the singular values of U^T J V interlace with J's from below. k is `steps`, or
    less where J has fewer rows or columns.
    """
    n, m = jacobian.point.size, jacobian.value.size
    k = min(steps, n, m)
    if k < 1:
        raise ValueError(f"Lanczos needs at least one step; came steps={steps}.")
    dtype = jacobian.point.dtype
    start = jax.random.normal(jax.random.key(0) if key is None else key, (n,), dtype)

    def step(i: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, ...]:
        lefts, rights, diagonal, above = carry
        left, alpha = _new_direction(jacobian.times(rights[i]), lefts)
        right, beta = _new_direction(jacobian.transpose_times(left), rights)
        return (
            lefts.at[i].set(left),
            rights.at[i + 1].set(right),
            diagonal.at[i].set(alpha),
            above.at[i].set(beta),
        )

    rights = jnp.zeros((k + 1, n), dtype).at[0].set(start / _norm(start))
    carry = (jnp.zeros((k, m), dtype), rights, jnp.zeros(k, dtype), jnp.zeros(k, dtype))
    _, _, diagonal, above = lax.fori_loop(0, k, step, carry)
    largest = jnp.maximum(jnp.max(diagonal), jnp.max(above))
    scale = jnp.where(largest > 0, largest, 1)
    rows = jnp.arange(k)
    bidiagonal = jnp.zeros((k, k + 1), dtype).at[rows, rows].set(diagonal / scale)
    bidiagonal = bidiagonal.at[rows, rows + 1].set(above / scale)
    return scale * jnp.linalg.svd(bidiagonal, compute_uv=False)


def _new_direction(x: Array, basis: Array) -> tuple[Array, Array]:
    """What of x [n] is orthogonal to the rows of basis [k, n]: its direction and its length."""
    size = _norm(x)
    x = x / jnp.where(size > 0, size, 1)
    # Twice is enough (Parlett): the second pass removes what rounding left of the first.
    for _ in range(2):
        x = x - _dot(_dot(basis, x), basis)
    rest = _norm(x)
    # Only rounding is left: the space is exhausted, and a zero ends the recurrence. NaN goes on.
    exhausted = rest <= 8 * jnp.finfo(x.dtype).eps
    direction = jnp.where(exhausted, 0, x / jnp.where(exhausted, 1, rest))
    return direction, jnp.where(exhausted, 0, size * rest)


def _hutchinson(jacobian: _Jacobian, probes: int, key: Array | None) -> tuple[Array, Array]:
    if probes < 2:
        raise ValueError(f"A standard error needs at least 2 probes; came probes={probes}.")
    n, dtype = jacobian.point.size, jacobian.point.dtype
    keys = jax.random.split(jax.random.key(0) if key is None else key, probes)
    norms = lax.map(lambda k: _norm(jacobian.times(jax.random.rademacher(k, (n,), dtype))), keys)
    largest = jnp.max(norms)
    scale = jnp.where(largest > 0, largest, 1)
    squares = jnp.square(norms / scale)
    root = jnp.sqrt(jnp.mean(squares))
    # d sqrt(s) = d s / (2 sqrt(s)); the scale keeps 1/probes <= s <= 1 unless J is zero.
    error = jnp.std(squares, ddof=1) / math.sqrt(probes) / (2 * jnp.where(root > 0, root, 1))
    return scale * root, scale * error
