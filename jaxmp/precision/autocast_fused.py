"""Finds what autocast runs as one operation, for a derivative that keeps or reads less than theirs.

In a program and its plan: a softmax for a product, a norm's (x - mean) scale + bias, a gelu or silu,
perhaps with the gate that it multiplies. `autocast_derivatives` says how they are run.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxmp.numerics import jaxpr as programs
from jaxmp.precision import autocast_derivatives as derivatives
from jaxmp.precision import autocast_rules as rules
from jaxmp.precision.autocast_demand import Demands
from jaxmp.precision.autocast_plan import Form, Plan, Step

# Rows of 2304 logits a TPU's compiler still fused with the product before them (v5e, v6e; some of 4096
# too). Of longer ones it would write the exponentials, where it computes those of float32 again.
_SHORT = 2048
_ADAPTS = frozenset({"broadcast_in_dim", "convert_element_type"})
_SCALES_AND_MASKS = rules.SCALES | {"select_n", "transpose"}
# What there may be between a maximum and where it is subtracted; `max` is one with -infinity.
_AROUND_A_MAXIMUM = rules.REPEATS | {"stop_gradient", "max"}


@dataclasses.dataclass(frozen=True)
class Group:
    """Operations of a program that are run as one, in the place of the last of them."""

    run: Callable[..., jax.Array]
    """`run(*operands)` gives the result of the last operation."""
    reads: list[tuple[int, int]]
    """What it reads: the place of an operation, and which of its operands."""
    inner: list[int]
    """The places of operations that nothing else needs."""


class Part(NamedTuple):
    """Operations on 16-bit arrays that give one more, as a program of their own."""

    inputs: list
    eqns: list
    steps: list
    reads: list[tuple[int, int]]
    """As in a `Group`, and so is `inner`."""
    inner: list[int]

    def plan(self, debug_info: Any) -> Plan:
        """Its plan; `debug_info` is that of the program that it is of."""
        names = (None,) * len(self.inputs)
        info = debug_info._replace(arg_names=names, result_paths=("",))
        jaxpr = core.Jaxpr((), self.inputs, self.eqns[-1].outvars, self.eqns, set(), info)
        forms: list[Form | None] = [Form.LOW] * len(self.inputs)
        return Plan(programs.Program(jaxpr), forms, self.steps, [Form.LOW], [False])


def groups(plan: Plan, demands: Demands, run: Callable[[Plan, Sequence], list]) -> dict[int, Group]:
    """What of a program is run as one, by the place of its last operation: softmaxes, norms, activations.

    `run(plan, operands)` gives the results of a part of the program.
    """
    finder = _Finder(plan, demands)
    find = {"div": finder.softmax, "mul": finder.normalized, "add": finder.shifted}
    found = {}
    for place, part in finder.activations().items():
        inner = part.plan(plan.program.jaxpr.debug_info)
        again = functools.partial(derivatives.activation, functools.partial(run, inner))
        found[place] = Group(again, part.reads, part.inner)
    for place, eqn in enumerate(plan.program.jaxpr.eqns):
        group = find[eqn.primitive.name](place) if eqn.primitive.name in find else None
        if group is not None:
            found[place] = group
    return found


class _Finder:
    """Looks backwards from an operation for those that make its operands."""

    def __init__(self, plan: Plan, demands: Demands):
        jaxpr = plan.program.jaxpr
        self.eqns, self.steps, self.demands = jaxpr.eqns, plan.steps, demands
        self.maker = {v: place for place, eqn in enumerate(self.eqns) for v in eqn.outvars}
        read = [v for eqn in self.eqns for v in eqn.invars] + list(jaxpr.outvars)
        self.uses = collections.Counter(v for v in read if not programs.is_literal(v))

    def made_by(self, atom: Any, names: frozenset[str], uses: int) -> int | None:
        """The place of the float32 operation of such a name that gives a value used so often."""
        if programs.is_literal(atom) or self.uses[atom] != uses:
            return None
        place = self.maker.get(atom)
        if place is None or self.eqns[place].primitive.name not in names:
            return None
        return place if self.is_wide(place) else None

    def is_wide(self, place: int) -> bool:
        """Whether an operation runs in float32, though not because the user asked for it."""
        step = self.steps[place]
        return step.run == Form.FULL and self.demands.override(step.scope) != np.float32

    def softmax(self, place: int) -> Group | None:
        """A division of exponentials by their sum, rounded for a product; nothing else looks inside."""
        # In float16 small probabilities would lose their digits to the backward pass as well.
        if self.demands.settings.narrow or self.steps[place].results != [Form.LOW]:
            return None
        above, below = self.eqns[place].invars
        parts: list[int] = []
        index = self.made_by(below, rules.REPEATS, 1)
        while index is not None:
            below, parts = self.eqns[index].invars[0], [index, *parts]
            index = self.made_by(below, rules.REPEATS, 1)
        total = self.made_by(below, frozenset({"reduce_sum"}), 1)
        exponential = self.made_by(above, rules.EXPONENTIALS, 2)
        if total is None or exponential is None or not self.is_wide(place):
            return None
        if self.eqns[total].invars[0] is not above:
            return None
        exponent = self.exponent(exponential, total)
        inner = [*exponent, exponential, total, *parts]
        reads = [(exponent[0], 0), (exponent[0], 1)] if exponent else [(exponential, 0)]
        terms = [self.eqns[i] for i in (*exponent, exponential)]
        sums = [self.eqns[i] for i in (total, *parts)]
        dtype = self.demands.settings.dtype
        is_low = bool(exponent) and self.steps[exponent[0]].operands[0] == Form.LOW
        run = functools.partial(derivatives.softmax, terms, sums, self.eqns[place], dtype, is_low)
        return Group(run, reads, inner)

    def exponent(self, exponential: int, total: int) -> list[int]:
        """The place of x - max(x) before an exponential, if a TPU's is written in 16 bits.

        Where x is a 16-bit product and rows are short, so that all this is fused with the product (not
        past a mask that is added), or where x is what a cap gives; either may be masked.
        """
        index = self.made_by(self.eqns[exponential].invars[0], frozenset({"sub"}), 1)
        if index is None:
            return []
        x, taken = self.eqns[index].invars
        highest, axes = self.maximum(taken), self.eqns[total].params["axes"]
        if highest is None or highest.invars[0] is not x or highest.params["axes"] != axes:
            return []
        is_low = self.steps[index].operands[0] == Form.LOW
        length = math.prod(x.aval.shape[i] for i in axes)
        is_short = isinstance(length, int) and length <= _SHORT  # not a symbol of `jax.export`
        source = self.source(index, 0)
        is_fused = source == "dot_general" and is_low and is_short
        return [index] if is_fused or source in rules.SATURATES else []

    def maximum(self, atom: Any) -> Any:
        """The `reduce_max` that an atom is the result of, repeated perhaps; None if it is not."""
        while not programs.is_literal(atom) and atom in self.maker:
            eqn = self.eqns[self.maker[atom]]
            if eqn.primitive.name == "reduce_max":
                return eqn
            arrays = [v for v in eqn.invars if not programs.is_literal(v)]
            if eqn.primitive.name not in _AROUND_A_MAXIMUM or len(arrays) != 1:
                return None
            (atom,) = arrays
        return None

    def source(self, place: int, i: int) -> str:
        """The operation whose 16-bit result an operand of another is, scaled or masked perhaps; or ""."""
        atom = self.eqns[place].invars[i]
        maker = None if programs.is_literal(atom) else self.maker.get(atom)
        if maker is None:
            return ""
        name, step = self.eqns[maker].primitive.name, self.steps[maker]
        picked = _picked(step)
        if name in _SCALES_AND_MASKS:
            picked = list(range(name == "select_n", len(step.operands)))
        if not picked:
            return name if step.results == [Form.LOW] else ""
        arrays = [j for j in picked if step.operands[j] not in (None, Form.OPEN)]
        return self.source(maker, *arrays) if len(arrays) == 1 else ""

    def normalized(self, place: int) -> Group | None:
        """16-bit activations less a mean, times a scale that is one for all that share the mean."""
        eqn = self.eqns[place]
        for i, scale in enumerate(reversed(eqn.invars)):
            index = self.made_by(eqn.invars[i], frozenset({"sub"}), 1)
            if index is None or not self.is_wide(place):
                continue
            is_low = self.steps[index].operands[0] == Form.LOW
            if is_low and self.shares(index, scale):
                run = functools.partial(derivatives.normalized, [self.eqns[index], eqn])
                return Group(run, [(index, 0), (index, 1), (place, 1 - i)], [index])
        return None

    def shifted(self, place: int) -> Group | None:
        """The same, plus a bias that is one for all that share the mean as well."""
        eqn = self.eqns[place]
        for i, bias in enumerate(reversed(eqn.invars)):
            index = self.made_by(eqn.invars[i], frozenset({"mul"}), 1)
            group = None if index is None else self.normalized(index)
            if group is None or not self.is_wide(place) or not self.shares(group.inner[0], bias):
                continue
            inner = [*group.inner, index]
            run = functools.partial(derivatives.normalized, [self.eqns[i] for i in (*inner, place)])
            return Group(run, [*group.reads, (place, 1 - i)], inner)
        return None

    def activations(self) -> dict[int, Part]:
        """Functions of one 16-bit array that multiply it by what is dear to compute of it: gelu, silu."""
        found = {}
        for x, places in self.functions_of_one().items():
            eqns = [self.eqns[place] for place in places]
            reads = collections.Counter(
                v for eqn in eqns for v in eqn.invars if not programs.is_literal(v)
            )
            results = [eqn.outvars[0] for eqn in eqns]
            given = [v for v in results if self.uses[v] > reads[v]]
            is_dear = any(eqn.primitive.name in rules.DEAR for eqn in eqns)
            if is_dear and reads[x] > 1 and given == results[-1:]:
                first = next(place for place in places if x in self.operands(place))
                read = (first, self.operands(first).index(x))
                steps = [self.steps[place] for place in places]
                found[places[-1]] = Part([x], eqns, steps, [read], places[:-1])
        return {**found, **self.gated(found)}

    def gated(self, activations: dict[int, Part]) -> dict[int, Part]:
        """Activations that are multiplied by another 16-bit array, and read by nothing else."""
        found = {}
        for place, (eqn, step) in enumerate(zip(self.eqns, self.steps)):
            if eqn.primitive.name != "mul" or step.operands != [Form.LOW, Form.LOW]:
                continue
            for i, v in enumerate(self.operands(place)):
                index = self.maker.get(v) if self.uses[v] == 1 else None
                gate = eqn.invars[1 - i]
                part = None if index is None else activations.get(index) or self.called(index)
                if part is None or programs.is_literal(gate) or gate.aval.shape != v.aval.shape:
                    continue
                operands = [part.eqns[-1].outvars[0] if u is v else u for u in eqn.invars]
                eqns, steps = [*part.eqns, eqn.replace(invars=operands)], [*part.steps, step]
                reads, inner = [*part.reads, (place, 1 - i)], [*part.inner, index]
                found[place] = Part([*part.inputs, gate], eqns, steps, reads, inner)
        return found

    def called(self, place: int) -> Part | None:
        """An activation that is a program of its own, as part of this one."""
        step = self.steps[place]
        if step.call is None or step.call.kind != "jit":
            return None
        (plan,) = step.plans
        activations = _Finder(plan, self.demands).activations()
        inside = plan.program.jaxpr
        part = activations.get(len(inside.eqns) - 1)
        if part is None or part.inputs != inside.invars or part.eqns != inside.eqns:
            return None
        return part._replace(reads=[(place, 0)], inner=[])

    def functions_of_one(self) -> dict[Any, list[int]]:
        """16-bit arrays, and the places of arithmetic on each of them, numbers and its own results alone."""
        array_of: dict[Any, Any] = {}
        places = collections.defaultdict(list)
        for place, (eqn, step) in enumerate(zip(self.eqns, self.steps)):
            read = {array_of.get(v, v) for v in self.operands(place) if v is not None}
            if eqn.primitive.name not in rules.ARITHMETIC or step.run != Form.LOW or len(read) != 1:
                continue
            (x,) = read
            if step.results == [Form.LOW] and x.aval.shape == eqn.outvars[0].aval.shape:
                array_of[eqn.outvars[0]] = x
                places[x].append(place)
        return places

    def operands(self, place: int) -> list:
        """The variables that an operation reads, None where it reads a number."""
        return [None if programs.is_literal(v) else v for v in self.eqns[place].invars]

    def shares(self, place: int, factor: Any) -> bool:
        """Whether all from which the same is taken in a difference share a factor (or a term) as well."""
        x, mean = self.eqns[place].invars
        if any(map(programs.is_literal, (x, mean, factor))) or x.aval.shape == mean.aval.shape:
            return False
        shapes = zip(x.aval.shape, mean.aval.shape, factor.aval.shape)
        return all(m == n or (m == 1 and f == 1) for n, m, f in shapes)


def _picked(step: Step) -> list[int]:
    """Which operands a call picks its result from, if it is a `where`: a selection and what precedes it."""
    if step.call is None or step.call.kind != "jit":
        return []
    jaxpr = step.plans[0].program.jaxpr
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    result = jaxpr.outvars[0]
    selection = None if programs.is_literal(result) else maker.get(result)
    if selection is None or selection.primitive.name != "select_n":
        return []
    found = []
    for v in selection.invars[1:]:
        while not programs.is_literal(v) and v in maker and maker[v].primitive.name in _ADAPTS:
            v = maker[v].invars[0]
        found += [jaxpr.invars.index(v)] if v in jaxpr.invars else []
    return found
