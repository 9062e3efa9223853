"""What a loss keeps of its forward pass for the backward pass: the activations, before a compiler sees it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxmp.numerics import jaxpr as programs


def residual_bytes(loss: Callable[..., Any], params: Any, *args: Any) -> int:
    """Returns the bytes that the derivative of `loss(params, *args)` by `params` keeps for its backward pass.

    The arguments themselves are left out: they are there anyhow. Nothing runs and nothing is compiled;
    a compiler may keep less, by computing again what is cheap.

    Args:
      loss: gives a scalar, or a pair of one and anything; what `jax.checkpoint` drops is not counted.
      params: arrays or `jax.ShapeDtypeStruct`s, in the dtypes in which the forward pass takes them.
    """

    def kept(params: Any, *args: Any) -> list[Any]:
        scalar = lambda params: jax.tree.leaves(loss(params, *args))[0]
        return jax.tree.leaves(jax.vjp(scalar, params)[1])

    program = jax.make_jaxpr(kept)(params, *args).jaxpr
    given = {id(v) for v in (*program.invars, *program.constvars)}
    held = {id(v): v.aval for v in program.outvars if not programs.is_literal(v)}
    sizes = [math.prod(a.shape) * a.dtype.itemsize for key, a in held.items() if key not in given]
    return sum(sizes)
