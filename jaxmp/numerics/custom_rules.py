"""Custom derivatives around other functions: the user's own rules, traced and run again.

What `jaxpr.rebind` is for loops and branches, for the two calls that carry rules: custom_jvp and
custom_vjp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.numerics import jaxpr as programs


def with_jvp(eqn: Any, args: Sequence, function: programs.Function, run_rule: Callable) -> list:
    """A custom_jvp call: `function` forward, and the user's rule run by `run_rule`.

    `run_rule(program, values)` is given the rule traced in the original dtypes. Its inputs are the
    operands, then tangents of the inexact ones; its outputs the results, then tangents of the
    inexact ones, which it returns in the dtypes of `function`'s results.
    """
    inexact = _inexact_places(eqn.invars)
    inexact_out = _inexact_places(eqn.outvars)
    originals = [_like(jax.typeof(a), v) for a, v in zip(args, eqn.invars)]

    def rule(*values: Any) -> list:
        primals, tangents = values[: len(args)], values[len(args) :]
        moving = _of_inexact(eqn, primals, inexact, inexact_out)
        _, moved, outs = jax.jvp(moving, _at(primals, inexact), list(tangents), has_aux=True)
        return [*outs, *moved]

    @jax.custom_jvp
    def call(*xs: Any) -> list:
        return function(*xs)

    @call.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[list, list]:
        traced = programs.trace_flat(rule, [*originals, *_at(originals, inexact)])
        results = run_rule(without_dead(traced), [*primals, *_at(tangents, inexact)])
        outs, moved = results[: len(eqn.outvars)], results[len(eqn.outvars) :]
        still = [
            None if i in inexact_out else jax.custom_derivatives.zero_from_primal(out)
            for i, out in enumerate(outs)
        ]
        return outs, _fill(still, inexact_out, moved)

    setattr(call, "__name__", str(eqn.params.get("name", "custom_jvp")))  # noqa: B010 (undeclared)
    return call(*args)


def with_vjp(eqn: Any, args: Sequence, function: programs.Function, run_rule: Callable) -> list:
    """A custom_vjp call: `function` forward, and the user's forward and backward rules by `run_rule`.

    `run_rule(program, values, outputs)` runs a rule that was traced in the original dtypes on
    values of any dtypes. `outputs` are the dtypes that its first results must have; the others
    (residuals) may come in whatever dtype suits.
    """
    # Captured values come first and have no gradient: as closures they raise JAX's own error. Behind a
    # vmap they are not counted any more; that nothing moves them tells them apart.
    captured = eqn.params.get("num_consts", 0)
    consts, args = list(args[:captured]), list(args[captured:])
    inexact_out = _inexact_places(eqn.outvars)
    originals = [_like(jax.typeof(a), v) for a, v in zip([*consts, *args], eqn.invars)]
    saved: dict[str, Any] = {}

    def forward_rule(*primals: Any) -> list:
        moved = saved["moved"]
        moving = _of_inexact(eqn, primals, moved, inexact_out)
        _, pullback, outs = jax.vjp(moving, *_at(primals, moved), has_aux=True)
        leaves, saved["tree"] = jax.tree.flatten(pullback)
        saved["avals"] = [jax.typeof(leaf) for leaf in leaves]
        return [*outs, *leaves]

    def backward_rule(*values: Any) -> list:
        count = len(saved["avals"])
        pullback = jax.tree.unflatten(saved["tree"], values[:count])
        return list(pullback(list(values[count:])))

    @jax.custom_vjp
    def call(*xs: Any) -> list:
        return function(*consts, *xs)

    def forward(*primals: Any) -> tuple[list, list]:
        xs = [primal.value for primal in primals]
        inexact = _inexact_places(eqn.invars)
        saved["moved"] = [i for i in inexact if i >= captured and primals[i - captured].perturbed]
        dtypes = [out.dtype for out in jax.eval_shape(call, *xs)]
        outs = run_rule(
            without_dead(programs.trace_flat(forward_rule, originals)), [*consts, *xs], dtypes
        )
        return outs[: len(dtypes)], outs[len(dtypes) :]

    def backward(residuals: list, cotangents: list) -> tuple:
        moving = [v.aval for v in _at(eqn.outvars, inexact_out)]
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in [*saved["avals"], *moving]]
        traced = without_dead(programs.trace_flat(backward_rule, shapes))
        places = [i - captured for i in saved["moved"]]
        dtypes = [jax.typeof(x).dtype for x in _at(args, places)]
        given = [_instantiated(c) for c in _at(cotangents, inexact_out)]
        found = run_rule(traced, [*residuals, *given], dtypes)
        return tuple(_fill([None] * len(args), places, found))

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call(*args)


def _instantiated(cotangent: Any) -> Any:
    """A cotangent as an array: one that is known to be zero comes as its shape and dtype alone."""
    symbolic: Any = jax.custom_derivatives.SymbolicZero
    is_zero = isinstance(cotangent, symbolic)
    return jnp.zeros(cotangent.shape, cotangent.dtype) if is_zero else cotangent


def without_dead(program: programs.Program) -> programs.Program:
    """The program without operations whose results nobody uses, but for effects."""
    jaxpr = program.jaxpr
    used = {v for v in jaxpr.outvars if not programs.is_literal(v)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in used for v in eqn.outvars):
            kept.append(eqn)
            used.update(v for v in eqn.invars if not programs.is_literal(v))
    return programs.Program(jaxpr.replace(eqns=kept[::-1]), program.consts)


def _of_inexact(
    eqn: Any, operands: Sequence, inputs: Sequence[int], outputs: Sequence[int]
) -> Callable[..., tuple[list, list]]:
    """The operation as a function of its inexact operands: its inexact results, and all of them."""

    def moving(*floats: Any) -> tuple[list, list]:
        outs = programs.bind(eqn, _fill(operands, inputs, floats))
        return _at(outs, outputs), outs

    return moving


def _inexact_places(atoms: Sequence) -> list[int]:
    return [i for i, atom in enumerate(atoms) if programs.is_inexact(atom.aval)]


def _fill(values: Sequence, places: Sequence[int], news: Sequence) -> list:
    filled = list(values)
    for place, new in zip(places, news):
        filled[place] = new
    return filled


def _at(values: Sequence, places: Sequence[int]) -> list:
    return [values[i] for i in places]


def _like(aval: Any, atom: Any) -> Any:
    """`aval` (its sharding, its mesh axes) in the dtype that the original program had."""
    dtype = getattr(atom.aval, "dtype", None)
    return aval.update(dtype=dtype, weak_type=False) if programs.is_inexact(aval) else aval
