"""Softmax, norm and activation as autocast runs them: each with a derivative that keeps or reads less.

What a GPU's compiler would else write to memory twice is told apart, or told as one, and what a
TPU's fuses in 16 bits alone is written so, for that compiler alone (`jax.lax.platform_dependent`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.numerics import jaxpr as programs


def softmax(
    terms: Sequence,
    sums: Sequence,
    division: Any,
    dtype: np.dtype,
    is_low: bool,
    *operands: jax.Array,
) -> jax.Array:
    """A softmax, summed in float32, that keeps no float32 array as large as x for its derivative.

        y = e / s,    dy = e (dx - sum(e dx) / s) / s,    e = exp(x - max),    s = sum(e)

    `terms` are the exponential and, if the maximum is an operand, the difference before it: y is no
    function of the maximum. `is_low` says that x comes in 16 bits. `sums` are the sum and what repeats
    it. Both e and y are kept, in 16 bits: arithmetic reads e, products read y. Were y read by both, a
    TPU's compiler would copy it from the layout of the one into that of the other in every round of a
    loop. And all of it is made of e as rounded: were e summed or divided before, that compiler would
    keep it in float32.
    """

    *difference, exponential = terms

    def exponentials(*operands: jax.Array, apart: bool) -> jax.Array:
        (x,) = programs.bind(difference[0], operands) if difference else operands
        x = _apart(x) if apart else x
        return programs.convert(programs.bind(exponential, [x])[0], dtype)

    def in_16_bits(*operands: jax.Array) -> jax.Array:
        narrow = programs.convert if is_low else _within
        return exponentials(*(narrow(x, dtype) for x in operands), apart=False)

    def raised(*operands: jax.Array, apart: bool) -> jax.Array:
        # A TPU's compiler fuses all this with the product before it if it is written in 16 bits, and
        # computes it in float32 nevertheless. Written in float32, x or e goes through memory once more.
        wide = functools.partial(exponentials, apart=apart)
        if not difference:
            return wide(*operands)
        return jax.lax.platform_dependent(*operands, tpu=in_16_bits, default=wide)

    def total(terms: jax.Array) -> jax.Array:
        for eqn in sums:
            (terms,) = programs.bind(eqn, [terms])
        return terms

    def parts(*operands: jax.Array, apart: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        above = raised(*operands, apart=apart)
        wide = _wide(above)
        below = total(wide)
        (y,) = programs.bind(division, [wide, below])
        return programs.convert(y, dtype), above, below

    @jax.custom_jvp
    def softmax(*operands: jax.Array) -> jax.Array:
        return parts(*operands, apart=False)[0]

    @softmax.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        y = parts(*primals, apart=False)[0]
        _, above, below = parts(*primals, apart=True)
        dx = programs.convert(tangents[0], dtype)
        mean = total(_wide(above * dx)) / below
        moved = (_wide(dx) - mean) / below
        return y, above * programs.convert(moved, dtype)

    return softmax(*operands)


def normalized(eqns: Sequence, *operands: jax.Array) -> jax.Array:
    """(x - mean) scale + bias, whose cotangent g is summed once for the mean and the bias.

    JAX would sum -g scale for the mean, g for the bias and g (x - mean) for the scale. The scale is
    the same in all terms of the first sum; taken out of it, it leaves two sums for each channel of
    a BatchNorm. `eqns` are the difference, the product and, if there is a bias, the sum.
    """
    difference, product, *shift = eqns

    def parts(x: jax.Array, mean: jax.Array, scale: jax.Array, *bias: jax.Array) -> list:
        (centered,) = programs.bind(difference, [x, mean])
        (y,) = programs.bind(product, [centered, scale])
        for eqn in shift:
            (y,) = programs.bind(eqn, [y, *bias])
        return [y, centered]

    @jax.custom_jvp
    def normalized(*operands: jax.Array) -> jax.Array:
        return parts(*operands)[0]

    @normalized.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        scale = primals[2]
        dx, dmean, dscale, *dbias = tangents
        y, centered = parts(*primals)
        moved = sum(dbias, -(dmean * scale))
        repeated = jax.lax.platform_dependent(
            moved, dscale, centered, cuda=_affine_as_one, default=_affine
        )
        return y, dx * scale + repeated

    return normalized(*operands)


def _affine(term: jax.Array, factor: jax.Array, x: jax.Array) -> jax.Array:
    """term + factor x. The transpose sums a cotangent g, and g x."""
    return term + factor * x


def _affine_as_one(term: jax.Array, factor: jax.Array, x: jax.Array) -> jax.Array:
    """The same, but the transpose sums both as the parts of one complex number.

    A GPU's compiler fuses what makes g (the derivative of a relu) into all that read g, or writes g.
    It joins sums after that: two of them make it write g, one is worth reading again what makes it.
    """
    shape = np.broadcast_shapes(term.shape, factor.shape)
    both = jax.lax.complex(*(jnp.broadcast_to(v, shape) for v in (term, factor)))
    both = jnp.broadcast_to(both, x.shape)
    return jnp.real(both) + jnp.imag(both) * x


def activation(run: Callable[[Sequence], list], *operands: jax.Array) -> jax.Array:
    """x times something of x, perhaps times a gate: they alone are kept for its derivative."""

    @jax.custom_jvp
    def activation(*operands: jax.Array) -> jax.Array:
        return run(operands)[0]

    @activation.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        again = lambda x, *gate: run([_apart(x), *gate])[0]
        return run(primals)[0], jax.jvp(again, primals, tangents)[1]

    return activation(*operands)


def _apart(x: jax.Array) -> jax.Array:
    """x for the backward pass, which a GPU's compiler does not see to be the x of the forward pass.

    Where both passes read one sum, it writes a kernel for that sum, which reads all of x once more,
    and what is dear to compute it writes once for both; by itself each pass computes it on its way. A
    TPU's compiler keeps exponentials, and shares them.
    """
    one = np.ones((), x.dtype)
    hidden = lambda: jax.lax.optimization_barrier(one)
    return x * jax.lax.platform_dependent(cuda=hidden, default=lambda: one)


def _within(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """x in 16 bits, what is finite still finite: masks are filled with float32's minimum."""
    largest = np.float32(jnp.finfo(dtype).max)
    within = jnp.where(jnp.isinf(x), x, jnp.clip(x, -largest, largest))
    return programs.convert(within, dtype)


def _wide(x: jax.Array) -> jax.Array:
    return programs.convert(x, np.dtype("float32"))
