"""Runs a traced program one operation at a time, loops in Python, so that each result can be acted on.

    def act(eqn, site, iterations, operands, results):
        print(site.scope, site.primitive, iterations)
        return results                               # or others in their place

    program, _ = trace(fn)(*args)
    outputs = run(program, array_leaves(args, {}), sites(program), act)

What `observe` compiles, this does not: operations are compiled singly, those alike once, which for a
program that runs a few times is far quicker, and each takes place when it is its turn. An operation costs
some tens of microseconds more than its work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.numerics import jaxpr as programs
from jaxmp.numerics import observe

Act = Callable[[Any, observe.Site, tuple[int, ...], list, list], list]
"""Of (equation, site, numbers of the iterations around it, operands, results): what to go on with.

A scan in reverse counts down, so that a number always names the slice of what is scanned.
"""


def run(
    program: programs.Program,
    args: Sequence,
    places: Sequence[observe.Site],
    act: Act,
    may_loop: Callable[[], bool] = lambda: True,
) -> list:
    """The program's outputs on concrete inputs, `act` being called after each operation.

    `places` are the program's `observe.sites`. Conditions of loops are run without `act`; a `while` ends
    where `may_loop()` is false, as numbers that `act` changed may make it endless.
    """
    return _Runner(act, may_loop).run(program, args, list(places), ())


class _Runner:
    """The interpreter: one method for each construct. `places` are the sites of the program at hand."""

    def __init__(self, act: Act, may_loop: Callable[[], bool]):
        self.act, self.may_loop = act, may_loop

    def run(
        self, program: programs.Program, args: Sequence, places: list, at: tuple[int, ...]
    ) -> list:
        jaxpr, remaining = program.jaxpr, iter(places)
        values = dict(zip(jaxpr.constvars, program.consts))
        values.update(zip(jaxpr.invars, args))
        read = lambda atom: atom.val if programs.is_literal(atom) else values[atom]
        for eqn, unused in zip(jaxpr.eqns, _last_uses(jaxpr)):
            operands, call = [read(atom) for atom in eqn.invars], observe.walked(eqn)
            with programs.location(eqn):
                if call is None:
                    results = programs.bind(eqn, operands)
                    results = self.act(eqn, next(remaining), at, operands, results)
                else:
                    counts = [observe.count(body.program) for body in observe.looked_at(call)]
                    inner = [list(itertools.islice(remaining, count)) for count in counts]
                    enter = {"scan": self._scan, "while": self._while, "cond": self._cond}
                    results = enter.get(call.kind, self._plain)(eqn, call, operands, inner, at)
            values.update(zip(eqn.outvars, results))
            for variable in unused:  # memory, as under jit, is that of what is still needed
                values.pop(variable, None)
        return [read(atom) for atom in jaxpr.outvars]

    def _plain(self, eqn, call, operands, inner, at) -> list:
        del eqn
        return self.run(call.bodies[0].program, operands, inner[0], at)

    def _scan(self, eqn, call, operands, inner, at) -> list:
        params, body = eqn.params, call.bodies[0].program
        first, carried = programs.scan_counts(params)
        consts, carry = operands[:first], operands[first : first + carried]
        scanned, length = operands[first + carried :], params["length"]
        order = reversed(range(length)) if params["reverse"] else range(length)
        rows: list[Any] = [None] * length
        for number in order:
            slices = [_slice(x, np.int32(number)) for x in scanned]
            outs = self.run(body, [*consts, *carry, *slices], inner[0], (*at, number))
            carry, rows[number] = outs[:carried], outs[carried:]
        stacks = [_stack(v.aval, column) for v, column in zip(eqn.outvars[carried:], zip(*rows))]
        empty = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars[carried:]]
        return [*carry, *(stacks or empty)]

    def _while(self, eqn, call, operands, inner, at) -> list:
        (condition, body), carry = call.bodies, list(operands)
        first = eqn.params["cond_nconsts"]
        second = first + eqn.params["body_nconsts"]
        consts, fixed, carry = operands[:first], operands[first:second], operands[second:]
        quietly = _Runner(lambda eqn, site, at, operands, results: results, self.may_loop)
        ignored = [None] * observe.count(condition.program)
        for number in itertools.count():
            (goes_on,) = quietly.run(condition.program, [*consts, *carry], ignored, ())
            if not goes_on or not self.may_loop():
                return carry
            carry = self.run(body.program, [*fixed, *carry], inner[0], (*at, number))
        raise AssertionError("unreachable: counting has no end")

    def _cond(self, eqn, call, operands, inner, at) -> list:
        del eqn
        chosen = min(max(int(operands[0]), 0), len(inner) - 1)
        return self.run(call.bodies[chosen].program, operands[1:], inner[chosen], at)


def _last_uses(jaxpr: Any) -> list[list]:
    """For each operation the variables that nothing after it reads."""
    kept = {v for v in jaxpr.outvars if not programs.is_literal(v)}
    uses: list[list] = []
    for eqn in reversed(jaxpr.eqns):
        read = {v for v in eqn.invars if not programs.is_literal(v)} | set(eqn.outvars)
        uses.append(list(read - kept))
        kept |= read
    return uses[::-1]


@jax.jit
def _slice(x: Any, number: Any) -> Any:
    return jax.lax.dynamic_index_in_dim(x, number, keepdims=False)


def _stack(aval: Any, rows: Sequence[Any]) -> Any:
    """The rows in one array; by way of the host, where it need not be compiled for their number."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return jnp.stack(rows)
    return jnp.asarray(np.stack(jax.device_get(list(rows))))
