"""Traced programs: look into them, and run them again operation by operation, on any supported JAX.

Everything that knows how JAX lays out its jaxprs is here and in `custom_rules`; transforms elsewhere
see equations (`primitive`, `invars`, `outvars`, `params`), and for operations that hold programs, a
`Call`:

    jaxpr, consts, unflatten = trace(fn)(*args)
    for eqn in jaxpr.eqns:
        call = call_of(eqn)                  # None for a plain operation
        with location(eqn):                  # the user's line and module path
            outs = bind(eqn, values) if call is None else rebind(eqn, call, values, functions)

`rebind` builds the same construct (loop, branch, jit, remat) around other functions: names,
shardings, donation, policies and effects stay. Custom derivatives are built by `custom_rules`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util
from jax.extend.core import primitives

Function = Callable[..., list]

_FLOAT32 = np.dtype("float32")
_WRAPPED_NAME = re.compile(r"[A-Za-z_]\w*\(|\)")
# Where each primitive keeps the one program that it calls with its own operands.
_PLAIN_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "shard_map": "jaxpr",
    "closed_call": "call_jaxpr",
    "call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function: an open jaxpr and the values of its constants."""

    jaxpr: Any
    consts: tuple = ()


@dataclasses.dataclass(frozen=True)
class Body:
    """One program inside an operation, and how it is fed."""

    program: Program
    operands: tuple[int, ...]
    """For each input of the program, the operand of the operation that feeds it."""
    gives_results: bool = True
    """Whether its outputs are the results of the operation (a loop's condition: no)."""


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation that holds programs: jit, a loop, a branch, remat, a custom derivative…"""

    kind: str
    bodies: tuple[Body, ...]
    carries: tuple[tuple[int, int], ...] = ()
    """For loops, pairs of (result, operand): that result is fed back in that operand's place."""


def trace(fn: Callable) -> Callable[..., tuple[Program, Callable[[Sequence], Any]]]:
    """A function of `fn`'s arguments that returns its program and what rebuilds its result.

    Arrays (NumPy, JAX, tracers) in the arguments are inputs of the program, in the order of
    `array_leaves`; everything else (flags, strings, Python numbers, functions) is a constant of
    the trace, as it is for `jax.grad`. Results that are no arrays are returned as they are.
    """

    def traced(*args: Any, **kwargs: Any) -> tuple[Program, Callable[[Sequence], Any]]:
        leaves, tree = jax.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
        found: dict[str, Any] = {}

        def flat(*arrays: Any) -> list:
            filled = list(leaves)
            for place, array in zip(places, arrays):
                filled[place] = array
            call_args, call_kwargs = jax.tree.unflatten(tree, filled)
            results, found["tree"] = jax.tree.flatten(fn(*call_args, **call_kwargs))
            found["static"] = {i: r for i, r in enumerate(results) if not is_array(r)}
            return [r for r in results if is_array(r)]

        flat.__name__ = getattr(fn, "__name__", "autocast")
        program = trace_flat(flat, [leaves[place] for place in places])

        def unflatten(values: Sequence) -> Any:
            remaining = iter(values)
            count = found["tree"].num_leaves
            static = found["static"]
            return jax.tree.unflatten(
                found["tree"], [static[i] if i in static else next(remaining) for i in range(count)]
            )

        return program, unflatten

    return traced


def array_leaves(args: tuple, kwargs: dict) -> list:
    """The arrays among the arguments, in the order in which `trace` makes them inputs."""
    return [leaf for leaf in jax.tree.leaves((args, kwargs)) if is_array(leaf)]


def trace_flat(fn: Function, args: Sequence) -> Program:
    """The program of a function from arrays (or `ShapeDtypeStruct`s) to a list of arrays."""
    return program_of(jax.make_jaxpr(fn)(*args))


def program_of(jaxpr: Any) -> Program:
    """The program in a jaxpr, open or closed. (JAX 0.11 made the two one class.)"""
    return Program(getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ())))


def is_array(leaf: Any) -> bool:
    """True for NumPy and JAX arrays, PRNG keys, tracers and abstract arrays."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def is_literal(atom: Any) -> bool:
    """True for a constant written into the program, which has a value `atom.val`."""
    return isinstance(atom, core.Literal)


def is_float32(atom: Any) -> bool:
    """True for float32 arrays; false for other dtypes, references, tokens and keys."""
    return getattr(atom.aval, "dtype", None) == _FLOAT32 and hasattr(atom.aval, "shape")


def scope(eqn: Any) -> str:
    """The module path of an operation, `decoder/Dense_0`, with transformations stripped.

    Flax modules and `jax.named_scope` make it. It is relative to the program the operation is in.
    """
    return _WRAPPED_NAME.sub("", str(eqn.source_info.name_stack))


@contextlib.contextmanager
def location(eqn: Any) -> Iterator[None]:
    """Operations bound inside carry the source line, module path and context of `eqn`."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    trace_back = eqn.source_info.traceback
    with source_info_util.user_context(trace_back, name_stack=stack), eqn.ctx.manager:
        yield


def call_of(eqn: Any) -> Call | None:
    """How an operation uses the programs that it holds; None if it holds none that we can enter."""
    name, params = eqn.primitive.name, eqn.params
    everything = tuple(range(len(eqn.invars)))
    if name in _PLAIN_CALLS:
        return Call(name, (Body(program_of(params[_PLAIN_CALLS[name]]), everything),))
    if name == "cond":
        branches = (Body(program_of(branch), everything[1:]) for branch in params["branches"])
        return Call(name, tuple(branches))
    if name == "scan":
        consts, carry = scan_counts(params)
        carries = tuple((i, consts + i) for i in range(carry))
        return Call(name, (Body(program_of(params["jaxpr"]), everything),), carries)
    if name == "while":
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        carry = everything[second:]
        condition = Body(program_of(params["cond_jaxpr"]), everything[:first] + carry, False)
        body = Body(program_of(params["body_jaxpr"]), everything[first:second] + carry)
        return Call(name, (condition, body), tuple(enumerate(carry)))
    return None


def scan_counts(params: dict) -> tuple[int, int]:
    """The number of constants and of carried values of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def holds_programs(eqn: Any) -> bool:
    """True if an operation holds a program anywhere in its parameters."""
    return any(True for _ in core.jaxprs_in_params(eqn.params))


def operations(jaxpr: Any) -> Iterator[Any]:
    """The operations of a program and of all programs within."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from operations(getattr(inner, "jaxpr", inner))


def bind(eqn: Any, args: Sequence, **changes: Any) -> list:
    """The results of an operation on other operands, with some of its parameters changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    results = eqn.primitive.bind(*args, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def convert(x: Any, dtype: Any, weak_type: bool = False) -> Any:
    """`x` in another dtype. A NumPy scalar is converted while tracing: it costs no operation."""
    if isinstance(x, np.ndarray | np.generic | float) and np.ndim(x) == 0 and not weak_type:
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(dtype)[()]
    convert_p = primitives.convert_element_type_p
    return convert_p.bind(x, new_dtype=np.dtype(dtype), weak_type=weak_type, sharding=None)


def is_weak(atom: Any) -> bool:
    """True if a value gives way to other dtypes, as Python numbers do."""
    return bool(getattr(atom.aval, "weak_type", False))


def is_weak_value(value: Any) -> bool:
    """`is_weak` for a value that is not in a program."""
    return bool(getattr(jax.typeof(value), "weak_type", False))


def rebind(eqn: Any, call: Call, args: Sequence, functions: Sequence[Function]) -> list:
    """The results of an operation that holds programs, with `functions` in their places.

    Each function takes what its `Body` was fed and returns the outputs as a list. Dtypes may differ
    from the original program's if they agree across branches and around loops. Custom derivatives
    have a file of their own, `custom_rules`.
    """
    if call.kind in _REBUILD:
        return list(_REBUILD[call.kind](eqn.params, args, functions))
    key = _PLAIN_CALLS[call.kind]
    closed = jax.make_jaxpr(functions[0])(*args)
    if hasattr(eqn.params[key], "consts") and call.kind not in ("remat2", "checkpoint"):
        return bind(eqn, args, **{key: closed})
    opened, consts = _without_consts(closed)
    return _bind_open(eqn, key, opened, consts, args)


def rebind_jit(eqn: Any, args: Sequence, closed: Any) -> list:
    """The results of a jit operation around another traced function of as many inputs."""
    return bind(eqn, args, jaxpr=closed)


def _bind_open(eqn: Any, key: str, jaxpr: Any, consts: Sequence, args: Sequence) -> list:
    return bind(eqn, [*consts, *args], **{key: jaxpr})


def _without_consts(closed: Any) -> tuple[Any, tuple]:
    """A jaxpr whose constants are its first inputs, and their values."""
    program = program_of(closed)
    jaxpr = program.jaxpr
    if not program.consts:
        return jaxpr, ()
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    info = jaxpr.debug_info._replace(arg_names=(None,) * len(inputs))
    return core.Jaxpr([], inputs, jaxpr.outvars, jaxpr.eqns, jaxpr.effects, info), program.consts


def _scan(params: dict, args: Sequence, functions: Sequence[Function]) -> list:
    first, carried = scan_counts(params)
    second = first + carried
    consts, init, xs = args[:first], tuple(args[first:second]), tuple(args[second:])

    def body(carry: tuple, x: tuple) -> tuple[tuple, tuple]:
        outs = functions[0](*consts, *carry, *x)
        return tuple(outs[:carried]), tuple(outs[carried:])

    options = {"_split_transpose": True} if params.get("_split_transpose") else {}
    last, ys = jax.lax.scan(
        body,
        init,
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        **options,
    )
    return [*last, *ys]


def _while(params: dict, args: Sequence, functions: Sequence[Function]) -> list:
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    last = jax.lax.while_loop(
        lambda carry: functions[0](*args[:first], *carry)[0],
        lambda carry: tuple(functions[1](*args[first:second], *carry)),
        tuple(args[second:]),
    )
    return list(last)


def _cond(params: dict, args: Sequence, functions: Sequence[Function]) -> list:
    branches = [lambda *xs, f=f: tuple(f(*xs)) for f in functions]
    platforms = params.get("branches_platforms")
    if platforms is None:
        return list(jax.lax.switch(args[0], branches, *args[1:]))
    named = {n: f for names, f in zip(platforms, branches) if names for n in names}
    default = [f for names, f in zip(platforms, branches) if not names]
    options = {"default": default[0]} if default else {}
    return list(jax.lax.platform_dependent(*args[1:], **named, **options))


def _shard_map(params: dict, args: Sequence, functions: Sequence[Function]) -> list:
    mapped = jax.shard_map(
        lambda *xs: tuple(functions[0](*xs)),
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=frozenset(params.get("newly_manual_axes", params.get("manual_axes", ()))),
    )
    return list(mapped(*args))


_REBUILD = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}


def is_inexact(aval: Any) -> bool:
    """True for arrays of floating-point or complex numbers: those that have a derivative."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
