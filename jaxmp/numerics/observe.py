"""Runs a traced program and looks at every operation in it: what went in, what came out, and where.

    program, _ = trace(fn)(*args)                    # of a gradient, to see forward and backward
    places = sites(program)
    outputs, records = jax.jit(lambda *xs: observe(program, xs, probe))(*array_leaves(args, {}))
    for site, record in zip(places, records): ...

jit, remat and custom derivatives are walked through; loops and branches are rebuilt with the records
among what they carry, so the memory is one record an operation however often it runs. `shard_map`,
Pallas kernels and other calls are looked at from outside, as one operation.

Each floating-point result stands behind an optimization barrier: what is seen is what the operation
gives in its own dtype, not what a fusion in a wider one would have made of it. (XLA turns a float16
`x * 2 / 4` into `x * 0.5`, in which nothing overflows.)
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util

from jaxmp.numerics import jaxpr as programs

_WALKED = {"jit", "pjit", "remat2", "checkpoint", "closed_call", "call", "core_call"}
_WALKED |= {"core_closed_call", "custom_jvp_call", "custom_vjp_call", "scan", "while", "cond"}
MOVES = frozenset(
    "reshape transpose broadcast_in_dim squeeze expand_dims slice dynamic_slice gather copy rev tile "
    "concatenate pad select_n convert_element_type stop_gradient optimization_barrier split neg".split()
)
"""Operations that move or pick values, each with the magnitude it has."""
_RECOMPUTED = "rematted_computation"
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_MODELS = os.path.join(_PACKAGE, "nn", "models")
_LIBRARIES = tuple(
    os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(jax.__file__))), name) + os.sep
    for name in ("jax", "jaxlib", "flax", "optax", "equinox")
)


@dataclasses.dataclass(frozen=True)
class Site:
    """One operation of a program, as its author knows it."""

    primitive: str
    scope: str
    """The module path, `GPT/layers/Dense_0`; "" outside of modules and named scopes."""
    phase: str
    """"forward", "backward", or "recomputed" (the forward pass again, under `jax.checkpoint`)."""
    source: str
    """The user's line, `model.py:41 (attention)`; "" if it is unknown."""
    loops: tuple[str, ...]
    """The loops around it, outermost first: "scan" or "while"."""
    inputs: tuple[Any, ...]
    """Abstract values of the operands; with literals, which have a value `val`, as they are."""
    outputs: tuple[Any, ...]
    """Abstract values of the results."""
    reads: frozenset[int] = frozenset()
    """The program's inputs that are operands, as they are or moved, as a layer reads its parameters."""
    narrowed: tuple[Narrowing, ...] = ()
    """Where its results, as they are or moved, are converted to a smaller float."""
    for_gradient: bool = False
    """Whether only the backward pass uses what it gives. A derivative such as that of a power is
    computed in the forward phase, where its argument is at hand."""

    @property
    def direction(self) -> str:
        """ "backward" for all that is done for gradients alone, computed anew or ahead, else "forward"."""
        return "forward" if self.phase == "forward" and not self.for_gradient else "backward"


class Narrowing(NamedTuple):
    """A conversion to a smaller floating-point dtype."""

    dtype: str
    scope: str
    """The module path of the conversion, or of the operation that it was made for."""


class Probe(NamedTuple):
    """What is recorded of an operation. A record is a pytree of arrays of fixed shapes and dtypes."""

    start: Callable[[Site], Any]
    """The record of an operation that has not run."""
    look: Callable[[Site, Sequence, Sequence], Any]
    """The record of one run, from the operands and the results."""
    merge: Callable[[Site, Any, Any, int, jax.Array], Any]
    """Of (site, earlier, newer, level, position): the record of a loop's iterations so far and the
    next one, which is number `position` (an int32 scalar) of the loop `site.loops[level]`. Scans in
    reverse count down, so a position always names the slice of what is scanned."""


def sites(program: programs.Program) -> list[Site]:
    """The operations of a program in the order in which it runs them, those of inner programs too."""
    reads = [frozenset({i}) for i in range(len(program.jaxpr.invars))]
    wanted = [True] * len(program.jaxpr.outvars)
    return list(_sites(program, (), (), reads, wanted=wanted))


def narrowed_inputs(program: programs.Program) -> list[tuple[Narrowing, ...]]:
    """For each input of a program, where it is converted to a smaller float, as it is or moved."""
    found = _narrowings(program, (), {})
    return [found.get(v, ()) for v in program.jaxpr.invars]


def observe(program: programs.Program, args: Sequence, probe: Probe) -> tuple[list, list]:
    """The program's outputs on these inputs, and one record for each of its `sites`."""
    return _Observer(probe).run(program, list(args), sites(program), 0)


def source_of(eqn: Any) -> str:
    """The innermost line, outside of libraries and of jaxmp but for its models, that made an operation."""
    return _user_line(eqn) or source_info_util.summarize(eqn.source_info)


def _user_line(eqn: Any) -> str:
    trace = eqn.source_info.traceback
    if trace is None:
        return ""
    frames = [(f.f_code, line) for f, line in traceback.walk_tb(trace.as_python_traceback())]
    for code, line in reversed(frames):
        ours = code.co_filename.startswith(_PACKAGE) and not code.co_filename.startswith(_MODELS)
        if not ours and not code.co_filename.startswith(_LIBRARIES):
            return f"{_short(code.co_filename)}:{line} ({code.co_name})"
    return ""


def _short(filename: str) -> str:
    """The path from the working directory if it lies below it, else the file's name."""
    relative = os.path.relpath(filename)
    return os.path.basename(filename) if relative.startswith("..") else relative


def _sites(
    program: programs.Program,
    around: tuple,
    loops: tuple[str, ...],
    reads: Sequence[frozenset[int]] = (),
    narrowed: Sequence[tuple[Narrowing, ...]] = (),
    wanted: Sequence[bool] = (),
) -> Iterator[Site]:
    """The sites of a program inside the operations `around` it.

    `reads` says which inputs of the outermost program its inputs are, `narrowed` where its results are
    converted, `wanted` which of its results are there not for gradients alone.
    """
    jaxpr = program.jaxpr
    inputs = dict(zip(jaxpr.invars, reads))
    results = {v: n for v, n in zip(jaxpr.outvars, narrowed) if not programs.is_literal(v)}
    later = _narrowings(program, around, results)
    useful = _useful(program, around, wanted)
    for eqn in jaxpr.eqns:
        found = [inputs.get(a, frozenset()) for a in map(_variable, eqn.invars)]
        call = walked(eqn)
        if call is None:
            site, read = _site((*around, eqn), loops), frozenset().union(*found)
            if eqn.primitive.name in MOVES:
                inputs[eqn.outvars[0]] = read
            narrowings = itertools.chain(*(later.get(v, ()) for v in eqn.outvars))
            yield dataclasses.replace(
                site,
                reads=read,
                narrowed=tuple(narrowings),
                for_gradient=not any(v in useful for v in eqn.outvars),
            )
            continue
        inner = (*loops, call.kind) if call.kind in ("scan", "while") else loops
        for body in looked_at(call):
            operands = [found[i] for i in body.operands]
            to = [later.get(v, ()) for v in eqn.outvars]
            asked = _asked(eqn, call, body, useful)
            yield from _sites(body.program, (*around, eqn), inner, operands, to, asked)


def _narrowings(
    program: programs.Program, around: tuple, found: dict[Any, tuple[Narrowing, ...]]
) -> dict[Any, tuple[Narrowing, ...]]:
    """Where variables are converted to a smaller float, given that of the program's results."""
    found = dict(found)
    for eqn in reversed(program.jaxpr.eqns):
        operands, here = [_variable(a) for a in eqn.invars], ()
        if call := walked(eqn):
            for body in call.bodies:
                inner = _narrowings(body.program, (*around, eqn), {})
                for operand, variable in zip(body.operands, body.program.jaxpr.invars):
                    _add(found, operands[operand], inner.get(variable, ()))
            continue
        if eqn.primitive.name in MOVES:
            here = found.get(eqn.outvars[0], ())
        if eqn.primitive.name == "convert_element_type":
            old, new = eqn.invars[0].aval, eqn.outvars[0].aval
            floats = programs.is_inexact(old) and programs.is_inexact(new)
            if floats and new.dtype.itemsize < old.dtype.itemsize:
                here = (Narrowing(new.dtype.name, _scope((*around, eqn))), *here)
        for variable in operands:
            _add(found, variable, here)
    return found


def _useful(program: programs.Program, around: tuple, wanted: Sequence[bool]) -> set:
    """The variables that lead to a wanted result, or to one that nothing uses, but through gradients.

    (A program that gives gradients alone computes the loss as well, and does not use it.)
    """
    jaxpr = program.jaxpr
    used = {v for eqn in jaxpr.eqns for v in map(_variable, eqn.invars) if v is not None}
    used.update(v for v in map(_variable, jaxpr.outvars) if v is not None)
    found = {v for v, asked in zip(jaxpr.outvars, wanted) if asked and not programs.is_literal(v)}
    for eqn in reversed(jaxpr.eqns):
        found.update(v for v in eqn.outvars if v not in used)
        if _phase((*around, eqn)) != "forward" or not any(v in found for v in eqn.outvars):
            continue
        operands, call = [_variable(a) for a in eqn.invars], walked(eqn)
        if call is None:
            found.update(v for v in operands if v is not None)
            continue
        fed = {i for body in call.bodies if body.gives_results for i in body.operands}
        found.update(v for i, v in enumerate(operands) if i not in fed and v is not None)
        for body in looked_at(call):
            inner = _useful(body.program, (*around, eqn), _asked(eqn, call, body, found))
            for operand, variable in zip(body.operands, body.program.jaxpr.invars):
                if variable in inner and operands[operand] is not None:
                    found.add(operands[operand])
    return found


def _asked(eqn: Any, call: programs.Call, body: programs.Body, useful: set) -> list[bool]:
    """Which results of a body are useful, given the useful variables around the call."""
    asked = [v in useful for v in eqn.outvars]
    place = dict(zip(body.operands, body.program.jaxpr.invars))
    before = None
    while before != asked:  # what a loop carries is useful if the next round makes use of it
        before = list(asked)
        if call.carries:
            inner = _useful(body.program, (eqn,), asked)
            for result, operand in call.carries:
                asked[result] |= place[operand] in inner
    return asked


def _add(found: dict, variable: Any, more: tuple[Narrowing, ...]) -> None:
    if more and variable is not None:
        found[variable] = tuple(dict.fromkeys((*found.get(variable, ()), *more)))


def _variable(atom: Any) -> Any:
    """The variable, None for a literal (which need not be hashable)."""
    return None if programs.is_literal(atom) else atom


def _scope(path: tuple) -> str:
    """The module path of the last operation of `path`, the others being the calls around it.

    Inside a call that was differentiated, operations may carry the path of the call as well.
    """
    names: list[str] = []
    for eqn in path:
        own = [name for name in programs.scope(eqn).split("/") if name and name != _RECOMPUTED]
        differentiated = "(" in str(eqn.source_info.name_stack)
        names = own if differentiated and own[: len(names)] == names else names + own
    return "/".join(names)


def _site(path: tuple, loops: tuple[str, ...]) -> Site:
    """The site of the last operation of `path`, the others being the calls around it."""
    eqn = path[-1]
    return Site(
        primitive=eqn.primitive.name,
        scope=_scope(path),
        phase=_phase(path),
        # Operations in a function that is under jit may know lines of the library alone.
        source=next(filter(None, map(_user_line, reversed(path))), "") or source_of(eqn),
        loops=loops,
        inputs=tuple(a if programs.is_literal(a) else a.aval for a in eqn.invars),
        outputs=tuple(a.aval for a in eqn.outvars),
    )


def _phase(path: tuple) -> str:
    """The phase of the last operation of `path`, the others being the calls around it."""
    if any(_RECOMPUTED in programs.scope(e).split("/") for e in path):
        return "recomputed"
    backward = any("transpose(" in str(e.source_info.name_stack) for e in path)
    return "backward" if backward else "forward"


def walked(eqn: Any) -> programs.Call | None:
    """How an operation uses its programs, if it is walked through; None if it is looked at from outside."""
    call = programs.call_of(eqn)
    return call if call is not None and call.kind in _WALKED else None


def looked_at(call: programs.Call) -> list[programs.Body]:
    """The bodies that have sites: not a loop's condition, which decides and computes nothing."""
    return [body for body in call.bodies if body.gives_results]


def count(program: programs.Program) -> int:
    """The number of sites in a program."""
    calls = (walked(eqn) for eqn in program.jaxpr.eqns)
    return sum(1 if c is None else sum(count(b.program) for b in looked_at(c)) for c in calls)


class _Observer:
    """The interpreter: one method for each construct. `places` are the sites of the program at hand."""

    def __init__(self, probe: Probe):
        self.probe = probe

    def run(
        self, program: programs.Program, args: list, places: list[Site], level: int
    ) -> tuple[list, list]:
        values = dict(zip(program.jaxpr.constvars, program.consts))
        values.update(zip(program.jaxpr.invars, args))
        read = lambda atom: atom.val if programs.is_literal(atom) else values[atom]
        remaining, records = iter(places), []
        for eqn in program.jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            call = walked(eqn)
            with programs.location(eqn):
                if call is None:
                    results = [_held(x) for x in programs.bind(eqn, operands)]
                    records.append(self.probe.look(next(remaining), operands, results))
                else:
                    counts = [count(body.program) for body in looked_at(call)]
                    inner = [list(itertools.islice(remaining, count)) for count in counts]
                    enter = {"scan": self._scan, "while": self._while, "cond": self._cond}
                    results, found = enter.get(call.kind, self._plain)(
                        eqn, call, operands, inner, level
                    )
                    records += found
            values.update(zip(eqn.outvars, results))
        return [read(atom) for atom in program.jaxpr.outvars], records

    def _plain(self, eqn, call, operands, inner, level) -> tuple[list, list]:
        del eqn
        return self.run(call.bodies[0].program, operands, inner[0], level)

    def _scan(self, eqn, call, operands, inner, level) -> tuple[list, list]:
        params, body, places = eqn.params, call.bodies[0].program, inner[0]
        first, carried = programs.scan_counts(params)
        consts, rest = operands[:first], operands[first:]

        def step(state: tuple, x: tuple) -> tuple[tuple, list]:
            (carry, records), (position, slices) = state, x
            outs, found = self.run(body, [*consts, *carry, *slices], places, level + 1)
            records = self._merge(places, records, found, level, position)
            return (outs[:carried], records), outs[carried:]

        (last, records), ys = jax.lax.scan(
            step,
            (rest[:carried], self._start(places)),
            (jnp.arange(params["length"], dtype=jnp.int32), rest[carried:]),
            reverse=params["reverse"],
        )
        return [*last, *ys], records

    def _while(self, eqn, call, operands, inner, level) -> tuple[list, list]:
        params, (condition, body), places = eqn.params, call.bodies, inner[0]
        first = params["cond_nconsts"]
        second = first + params["body_nconsts"]
        ignored = list(_sites(condition.program, (), ()))

        def goes_on(state: tuple) -> jax.Array:
            return self.run(condition.program, [*operands[:first], *state[1]], ignored, 0)[0][0]

        def step(state: tuple) -> tuple:
            position, carry, records = state
            args = [*operands[first:second], *carry]
            outs, found = self.run(body.program, args, places, level + 1)
            return position + 1, outs, self._merge(places, records, found, level, position)

        start = (jnp.int32(0), operands[second:], self._start(places))
        _, last, records = jax.lax.while_loop(goes_on, step, start)
        return last, records

    def _cond(self, eqn, call, operands, inner, level) -> tuple[list, list]:
        del eqn

        def branch(chosen: int) -> Callable[..., tuple[list, list]]:
            def run(*args: Any) -> tuple[list, list]:
                program = call.bodies[chosen].program
                found = [self._start(places) for places in inner]
                outs, found[chosen] = self.run(program, list(args), inner[chosen], level)
                return outs, list(itertools.chain(*found))

            return run

        return jax.lax.switch(operands[0], [branch(i) for i in range(len(inner))], *operands[1:])

    def _start(self, places: list[Site]) -> list:
        return [self.probe.start(place) for place in places]

    def _merge(self, places, records, found, level, position) -> list:
        pairs = zip(places, records, found)
        return [self.probe.merge(p, old, new, level, position) for p, old, new in pairs]


def _held(x: Any) -> Any:
    """A result behind a barrier that no fusion reaches across."""
    return jax.lax.optimization_barrier(x) if programs.is_inexact(jax.typeof(x)) else x
