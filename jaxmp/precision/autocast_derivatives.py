"""Softmax, norm and activation as autocast runs them: each with a derivative that keeps or reads less.

What a GPU's compiler would else write to memory twice is told apart, or told as one, and what a
TPU's fuses in 16 bits alone is written so, for that compiler alone (`jax.lax.platform_dependent`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.numerics import jaxpr as programs

# Compiled for H100 with attention over 17 to 2000 keys: rows up to 64 are taken as one whatever they fill,
# longer ones (in multiples of 8) never below 0.59 of a block, above 0.69 always, and in between by size.
_BRIEF, _FULL_ENOUGH = 64, 0.6


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
    keep it in float32. Where a GPU's computes the rows of x as one, it computes e again for the
    derivative; of other rows it keeps e (`_is_computed_again`).
    """

    *difference, exponential = terms
    shape, axes = exponential.outvars[0].aval.shape, sums[0].params["axes"]
    again = _is_computed_again(math.prod(shape[i] for i in axes))

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

    def divided(above: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = _wide(above)
        below = total(wide)
        (y,) = programs.bind(division, [wide, below])
        return programs.convert(y, dtype), below

    @jax.custom_jvp
    def softmax(*operands: jax.Array) -> jax.Array:
        return divided(raised(*operands, apart=False))[0]

    @softmax.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        above = raised(*primals, apart=False)
        if again:
            y, _ = divided(above)
            above = raised(*primals, apart=True)
            _, below = divided(above)
        else:
            above = _apart(above)
            y, below = divided(above)
        dx = programs.convert(tangents[0], dtype)
        mean = total(_wide(above * dx)) / below
        moved = (_wide(dx) - mean) / below
        return y, above * programs.convert(moved, dtype)

    return softmax(*operands)


def _is_computed_again(length: Any) -> bool:
    """Whether a GPU's compiler takes rows of such a length as one, from logits to probabilities.

    XLA's kernels for rows work on blocks of a power of two. It takes a row that fills little more than
    half of one apart, and writes x - max in float32 if both passes read it. And to a product, rows that
    are no multiple of 8 are copied first: the copy divides e on its way. A length that is a symbol of
    `jax.export` may be any.
    """
    if not isinstance(length, int):
        return False
    filled = length / (1 << (length - 1).bit_length())
    return length <= _BRIEF or (length % 8 == 0 and filled >= _FULL_ENOUGH)


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
    shape = jnp.broadcast_shapes(term.shape, factor.shape)
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
