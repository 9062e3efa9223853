"""Blame: the first operation of a program from which a number that is not finite reached its results.

    print(jaxmp.blame_nonfinite(jax.value_and_grad(loss_fn), params, batch))

The program runs operation by operation, with a clock that ticks at each. An operation gives birth where its
result is not finite though what it was made of is. Programs do so on purpose: a mask is -inf, and exp
makes it 0. So births are judged by what comes of them. A run is given a time, and births after it are
repaired, replaced by 0. The earliest birth with which the results are not finite is the one to blame, and
up to there nothing was changed; bisection over the births finds it in a few runs.

The same is done for turns, where an infinity becomes NaN. They say what came of a birth; and where the
infinity is a constant, or did no harm forward, the turn is what is to blame.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.diagnose import operands as figures
from jaxmp.diagnose.fault import Blame
from jaxmp.numerics import jaxpr as programs
from jaxmp.numerics import observe, stepwise
from jaxmp.numerics import tree as trees

_LINEAR = frozenset(
    "dot_general conv_general_dilated reduce_sum cumsum gather reduce_window_sum scatter-add".split()
)
"""Operations that make of zeros nothing but zeros, unless it is their own fault."""
_MOVES = observe.MOVES - {"gather", "convert_element_type"}  # which may fill in NaN, and overflow
_PATIENCE = 4
"""How many times the operations of the program itself a run with repairs may do before loops end."""


def blame_nonfinite(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Blame | None:
    """The first operation from which a number that is not finite reached the results of `fn(*args)`.

    None if the results are finite, whatever infinities were made and masked on the way, or hold only
    infinities that the program has as constants. If an argument held a NaN or an infinity that reached
    the results, it says which.

    Give it what computes gradients, `jax.value_and_grad(loss_fn)`, to see backward as well as forward: of
    a loss the forward pass alone is looked at. The program is run operation by operation, once if
    the results are finite, else some ten times; loops are run in Python. Each operation gets its
    operands in their own dtypes, with no fusion between, so what only happens inside a fusion is not seen.
    `shard_map` and Pallas kernels are one operation each; conditions of loops are not looked at.

    Args:
      fn: pure and jittable. Arrays in the arguments are inputs; everything else is static.
    """
    program, _ = programs.trace(fn)(*args, **kwargs)
    search = _Search(program, programs.array_leaves(args, kwargs), _names(args, kwargs))
    natural = search.run(math.inf, math.inf)
    if not search.is_bad(natural):
        return None
    search.learn(natural)
    if not search.is_bad(natural):
        return None
    birth = _first(natural.births, lambda time: search.is_bad(search.run(time, math.inf)))
    turns = search.run(birth, math.inf).turns
    turn = _first(turns, lambda time: search.is_bad(search.run(birth, time)))
    return search.verdict(birth, turn)


def _first(times: Sequence[int], bad: Callable[[int], bool]) -> int:
    """The earliest of some times, the last of which is bad, that is; -1 if that is bad already."""
    if not times or bad(-1):
        return -1
    good, found = -1, len(times) - 1
    while found - good > 1:
        middle = (good + found) // 2
        good, found = (good, middle) if bad(times[middle]) else (middle, found)
    return times[found]


class _Search:
    """A program that can be run as it is up to a time and with repairs from there on.

    The inputs are the first to be born, at times 0, 1, ...; the constants of the program at -1.
    """

    def __init__(self, program: programs.Program, inputs: Sequence[Any], names: list[str]):
        self.program, self.names = program, names
        self.inputs = [*inputs, *program.consts]
        self.sites = observe.sites(program)
        self._limit = math.inf
        self._meant: list[Any] = [np.False_] * len(program.jaxpr.outvars)

    def run(self, births: float, turns: float, asked: Sequence[int] = ()) -> _Run:
        """The program with what happens after the times repaired; `blames` of the times `asked` for."""
        this = _Run(births, turns, asked, self._limit, self.names)
        given = [this.see_input(x) for x in self.inputs]
        count = len(self.program.jaxpr.invars)
        program = programs.Program(self.program.jaxpr, tuple(given[count:]))
        this.results = stepwise.run(program, given[:count], self.sites, this.see, this.may_loop)
        return this

    def learn(self, natural: _Run) -> None:
        """Learns from the run without repairs how long is too long, and which infinities are meant.

        Those are in the results though everything is repaired: the program has them as constants.
        """
        self._limit = _PATIENCE * natural.clock
        if self.is_bad(self.run(-1, math.inf)):
            results = self.run(-1, -1).results
            self._meant = [_broken(x) & ~_is_nan(x) for x in results]

    def is_bad(self, run: _Run) -> bool:
        """Whether results are not finite that should be."""
        pairs = zip(run.results, self._meant)
        return any((_broken(x) & ~meant).any() for x, meant in pairs)

    def verdict(self, birth: int, turn: int) -> Blame:
        """What to say, given the times of the birth and of the turn."""
        found = self.run(birth, turn, (birth, turn)).blames
        born, turned = found.get(birth), found.get(turn)
        if born is None:
            if turned is None:
                constant = next(x for x in _constants(self.program) if _is_nan(x).any())
                return _given("constant", "in the program", constant)
            return dataclasses.replace(turned, origin="an infinite constant of the program")
        if turned is None:
            return born
        if born.direction == "forward" and turned.direction == "backward":
            return dataclasses.replace(turned, origin=born.operation)
        return dataclasses.replace(born, became_nan=turned.operation)


class _Run:
    """One run: repairs what happens after its times, and keeps a record of what happened."""

    def __init__(
        self, births: float, turns: float, asked: Sequence[int], limit: float, names: list[str]
    ):
        self._until, self._asked, self._limit, self._names = (births, turns), asked, limit, names
        self.clock = 0
        self.births: list[int] = []
        self.turns: list[int] = []
        self.blames: dict[int, Blame] = {}
        self.results: list = []

    def may_loop(self) -> bool:
        """Whether it has not taken too long."""
        return self.clock <= self._limit

    def see_input(self, x: Any) -> Any:
        """Takes an input, and gives what the program is to have."""
        time, self.clock = self.clock, self.clock + 1
        if _is_finite(x):
            return x
        self.births.append(time)
        if time in self._asked:
            kind = "argument" if time < len(self._names) else "constant"
            self.blames[time] = _given(
                kind, [*self._names, "that fn captured"][min(time, len(self._names))], x
            )
        return _zero_where(_broken(x), x) if time > self._until[0] else x

    def see(self, eqn: Any, site: Any, at: tuple[int, ...], operands: list, results: list) -> list:
        """Takes an operation's results, and gives those that the program is to go on with."""
        time, self.clock = self.clock, self.clock + 1
        if site.primitive in _MOVES or all(map(_is_finite, results)):
            return results
        return [self._judged(time, eqn, site, at, operands, result) for result in results]

    def _judged(
        self, time: int, eqn: Any, site: Any, at: tuple, operands: list, result: Any
    ) -> Any:
        for log, until, faulty in zip(
            (self.births, self.turns), self._until, _faults(eqn, operands, result)
        ):
            if not faulty.any():
                continue
            if not log or log[-1] != time:
                log.append(time)
            if time in self._asked and time == until:
                self.blames[time] = self._blame(
                    site, at, figures.report(eqn, operands, result, faulty)
                )
            if time > until:
                result = _zero_where(faulty, result)
        return result

    def _blame(self, site: observe.Site, at: tuple, measured: dict[str, Any]) -> Blame:
        return Blame(
            kind="operation",
            primitive=site.primitive,
            path=site.scope,
            direction=site.direction,
            source=site.source,
            loops=site.loops,
            iterations=at,
            reads=tuple(self._names[i] for i in sorted(site.reads) if i < len(self._names)),
            **measured,
        )


def _given(kind: str, path: str, x: Any) -> Blame:
    at = np.unravel_index(int(np.argmax(_broken(x))), np.shape(x))
    at = tuple(int(i) for i in at)
    found = figures.values_of(x, at)
    return Blame(kind, "", path, "", "", (), (), inputs=(), output=found, at=at)


def _names(args: tuple, kwargs: dict) -> list[str]:
    """The path of each array in the arguments, such as "0/Dense_0/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path((args, kwargs))
    return [trees.path_string(path[1:]) for path, leaf in leaves if programs.is_array(leaf)]


def _constants(program: programs.Program) -> Iterator[Any]:
    """The floating-point constants and literals of a program and of those inside."""
    yield from (x for x in program.consts if _is_inexact(x))
    for eqn in program.jaxpr.eqns:
        yield from (a.val for a in eqn.invars if programs.is_literal(a) and _is_inexact(a.val))
        call = programs.call_of(eqn)
        for body in call.bodies if call else ():
            yield from _constants(body.program)


def _faults(eqn: Any, operands: Sequence[Any], result: Any) -> tuple[np.ndarray, np.ndarray]:
    """(where the result is not finite by this operation's doing, where it turned an infinity into NaN)."""
    broken, nan, name = _broken(result), _is_nan(result), eqn.primitive.name
    inputs = figures.floats_of(eqn, operands)
    if name in figures.ELEMENTWISE:
        born = functools.reduce(operator.and_, [~_broken(x) for x in inputs], broken)
        turned = functools.reduce(operator.and_, [~_is_nan(x) for x in inputs], nan)
        return born, turned & ~born
    if all(map(_is_finite, inputs)):
        return broken, np.zeros_like(broken)
    born = np.zeros_like(broken)
    if name in _LINEAR:
        (again,) = programs.bind(eqn, [_zero_where(_broken(x), x) for x in operands])
        born = broken & _broken(again)
    return born, nan & ~born & (not any(_is_nan(x).any() for x in inputs))


# Masks are NumPy's: nothing is compiled for their shapes, and few results are not finite.


def _is_inexact(x: Any) -> bool:
    return programs.is_inexact(jax.typeof(x))


def _is_finite(x: Any) -> bool:
    if isinstance(x, jax.Array) and _is_inexact(x) and not _is_on_host(x):
        return bool(_all_finite(x))
    return not _broken(x).any()


def _is_on_host(x: jax.Array) -> bool:
    return next(iter(x.devices())).platform == "cpu"


@jax.jit
def _all_finite(x: Any) -> Any:
    return jnp.all(jnp.isfinite(x))


def _broken(x: Any) -> np.ndarray:
    return ~np.isfinite(x) if _is_inexact(x) else np.zeros(np.shape(x), bool)


def _is_nan(x: Any) -> np.ndarray:
    return np.isnan(x) if _is_inexact(x) else np.zeros(np.shape(x), bool)


def _zero_where(mask: np.ndarray, x: Any) -> Any:
    """`x` with zeros for some of its elements, where `x` lies."""
    if not mask.any():
        return x
    repaired = np.array(x)
    repaired[mask] = 0
    if not isinstance(x, jax.Array):
        return repaired
    # Bound to its device only if `x` is, or all that follows would be compiled anew.
    return jax.device_put(repaired, x.sharding if x.committed else None)
