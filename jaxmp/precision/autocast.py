"""autocast: any JAX function in mixed precision, operation by operation, its source untouched.

    loss = jaxmp.autocast(loss, "bfloat16")        # the one line

Products, convolutions and attention run in 16 bits; softmax, norms' statistics, exponentials and
sums in float32; what lies between stays in the precision it arrives in. What runs how is decided
on the traced program: see `autocast_rules` for the table and `autocast_plan` for the decision.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.numerics import jaxpr as programs
from jaxmp.precision import autocast_demand, autocast_rules
from jaxmp.precision import autocast_plan as planning
from jaxmp.precision.autocast_run import Runner
from jaxmp.precision.policy import Policy, get_policy, parse_dtype

Overrides = Mapping[str, Any] | Iterable[tuple[str, Any]]

_FLOAT32 = np.dtype("float32")


def autocast(
    fn: Callable,
    dtype: Any = "bfloat16",
    *,
    rules: Mapping[str, str] | None = None,
    overrides: Overrides | None = None,
    output_dtype: Any = None,
) -> Callable:
    """`fn` with its matrix products in 16 bits, and the rest where its range and sums are safe.

    It composes: `grad(autocast(f))`, `autocast(grad(f))`, inside and outside `jit`, `vmap`, loops,
    `jax.checkpoint`, custom derivatives, `shard_map` and `jax.export`. Arguments and results keep
    the dtypes that the caller gave and would have got. Only float32 is changed: float64, integers,
    keys and explicit casts are left alone. As under `jit`, the arrays in the arguments are traced,
    so Python code cannot branch on their values; all else (flags, strings, numbers) is static.
    A `scan` keeps products, sums and rounded parameters for its backward pass and computes the
    arithmetic between them again, unless a `jax.checkpoint` inside it, or an effect, says otherwise.

    Args:
      dtype: `"bfloat16"`, `"float16"` (scale the loss then), or a `Policy` or its string, whose
        compute dtype, output dtype and overrides are used.
      rules: changes to the table by primitive, to `"low"`, `"float32"`, `"widest"` or
        `"original"`, as in `{"tanh": "float32"}`.
      overrides: dtypes by place, as in `{"**/head": "float32", "*/attention/*": "float32"}`:
        patterns over module paths (Flax modules and `jax.named_scope`s), `*` within a level, `**`
        over any number. "float32" keeps a place in float32; the low dtype runs all of it in
        16 bits. Where several match, the last one decides.
      output_dtype: what float32 results are cast to; by default they stay float32.

    Raises:
      ValueError: when called, if an override matched no place in the program.
      NotImplementedError: when called, if the program holds an unknown operation with a program
        inside.
    """
    settings, output_dtype = _settings(dtype, rules, overrides, output_dtype)

    @functools.wraps(fn)
    def autocasted(*args: Any, **kwargs: Any) -> Any:
        planner, plan, unflatten = _plan(fn, settings, args, kwargs)
        values = Runner(planner).run(plan, programs.array_leaves(args, kwargs))
        outputs = [
            _as_before(x, v, output_dtype) for x, v in zip(values, plan.program.jaxpr.outvars)
        ]
        return unflatten(outputs)

    autocasted.__dict__["explain"] = lambda *args, **kwargs: _explain(fn, settings, args, kwargs)
    return autocasted


def full_precision(fn: Callable) -> Callable:
    """`fn` as it is, to be left in its own dtypes by any `autocast` around it."""
    return jax.named_scope(autocast_demand.FULL_PRECISION)(fn)


def explain_autocast(fn: Callable, *args: Any, **kwargs: Any) -> str:
    """What runs in which precision in `fn = autocast(f)` on these arguments, by module path.

    Arguments may be `ShapeDtypeStruct`s: nothing is computed. One line for each kind of operation
    in a place, with its count and the reason.

    Raises:
      ValueError: `fn` is not the result of `autocast`.
    """
    if not hasattr(fn, "explain"):
        raise ValueError(f"explain_autocast expects the result of autocast(f), but got {fn!r}.")
    return fn.explain(*args, **kwargs)


def _settings(
    dtype: Any, rules: Mapping[str, str] | None, overrides: Overrides | None, output_dtype: Any
) -> tuple[autocast_demand.Settings, np.dtype]:
    pairs: list[tuple[str, Any]] = []
    if isinstance(dtype, str) and ("=" in dtype or dtype.startswith("mixed_")):
        dtype = get_policy(dtype)
    if isinstance(dtype, Policy):
        output_dtype = output_dtype or dtype.output_dtype
        pairs += dtype.overrides
        dtype = dtype.compute_dtype
    low, out = parse_dtype(dtype), parse_dtype(output_dtype or _FLOAT32)
    if low not in (jnp.dtype("bfloat16"), jnp.dtype("float16")):
        raise ValueError(f"autocast computes in bfloat16 or float16; got {low.name}.")
    pairs += dict(overrides or ()).items()
    chosen = tuple((pattern, parse_dtype(to)) for pattern, to in pairs)
    for pattern, to in chosen:
        if to not in (low, _FLOAT32):
            raise ValueError(f"The override {pattern!r} is {to}; it should be float32 or {low}.")
    return autocast_demand.Settings(low, autocast_rules.read_rules(dict(rules or {})), chosen), out


def _plan(
    fn: Callable, settings: autocast_demand.Settings, args: tuple, kwargs: dict
) -> tuple[planning.Planner, planning.Plan, Callable]:
    program, unflatten = programs.trace(fn)(*args, **kwargs)
    planner = planning.Planner(settings)
    jaxpr = program.jaxpr
    inputs = [planning.given(v) for v in jaxpr.invars]
    plan = planner.plan(program, inputs, [planning.caller(v) for v in jaxpr.outvars])
    for pattern, _ in settings.overrides:
        if pattern not in planner.demands.matched:
            places = sorted(filter(None, planner.demands.scopes))
            shown = ", ".join(places[:6]) + (", …" if len(places) > 6 else "")
            raise ValueError(
                f"The override {pattern!r} matched no place in the program. "
                f"Places are: {shown or '(none is named; use jax.named_scope)'}."
            )
    return planner, plan, unflatten


def _as_before(value: Any, atom: Any, output_dtype: np.dtype) -> Any:
    """A result in the dtype, and as weakly typed, as the original function would give it."""
    if not programs.is_float32(atom):
        return value
    weak = programs.is_weak(atom) and output_dtype == _FLOAT32
    if jax.typeof(value).dtype == output_dtype and programs.is_weak_value(value) == weak:
        return value
    return programs.convert(value, output_dtype, weak)


def _explain(fn: Callable, settings: autocast_demand.Settings, args: tuple, kwargs: dict) -> str:
    _, plan, _ = _plan(fn, settings, args, kwargs)
    counts: collections.Counter = collections.Counter()
    _count(plan, settings, counts)
    order = {settings.dtype.name: 0, "float32": 1, "as it comes": 2}
    lines = []
    places = dict.fromkeys(scope for scope, *_ in counts)
    for place in places:
        lines.append(place or "(top level)")
        rows = [(row, n) for row, n in counts.items() if row[0] == place]
        for (_, name, ran, reason), n in sorted(rows, key=lambda r: (order[r[0][2]], r[0][1])):
            lines.append(f"  {ran:<11} {n:>4} x {name:<24} {reason}")
    totals = collections.Counter()
    for (_, _, ran, _), n in counts.items():
        totals[ran] += n
    lines.append("in all: " + ", ".join(f"{n} {ran}" for ran, n in totals.most_common()))
    return "\n".join(lines)


def _count(
    plan: planning.Plan, settings: autocast_demand.Settings, counts: collections.Counter
) -> None:
    names = {planning.Form.LOW: settings.dtype.name, planning.Form.FULL: "float32"}
    for eqn, step in zip(plan.program.jaxpr.eqns, plan.steps):
        for inner in step.plans:
            _count(inner, settings, counts)
        forms = [f for f in (*step.operands, *step.results) if f is not None]
        if step.call is None and forms:
            ran = names[step.run] if step.run is not None else "as it comes"
            counts[step.scope, eqn.primitive.name, ran, step.reason] += 1
