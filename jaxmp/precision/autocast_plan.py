"""Decide the precision of every operation and value of a program, before any of it runs.

Two passes over a jaxpr. Backwards, the *demand*: who will eat each value? A product (through data
movement and relu), a float32 operation, the caller? Forwards, the *form* that each float32 value
takes, in the order FREE < OPEN < LOW < FULL:

    FREE  float32 because it was given so (a parameter): cast where it is used
    OPEN  a constant, scalar or broadcast parameter: adapts to what it meets
    LOW   16 bits
    FULL  float32 for a reason (an exponential, a sum)

    form(a op b) = max(form(a), form(b)),  made LOW if a product eats it and the caller does not;
                                           FULL instead of LOW if it is one number.

So a residual stream that starts at a product stays in 16 bits, softmax is computed in float32 up to
what a product eats (its exponentials and probabilities are kept in 16 bits), a norm up to its bias,
and the weights an optimizer hands back stay in float32. Loops take the least precision that is
stable around the loop.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxmp.numerics import jaxpr as programs
from jaxmp.precision import autocast_rules as rules
from jaxmp.precision.autocast_demand import NONE, PRODUCT, REASONS, Demand, Demands, Settings, union
from jaxmp.precision.autocast_rules import Kind


class Form(enum.IntEnum):
    """What a float32 value of the original program becomes. The larger of two forms wins."""

    FREE = 0
    OPEN = 1
    LOW = 2
    FULL = 3


@dataclasses.dataclass
class Step:
    """The decision for one operation."""

    run: Form | None
    """LOW or FULL: what float32 operands are cast to. None: they are taken as they come."""
    results: list[Form | None]
    """What each result becomes; None where it is not a float32 array."""
    reason: str
    scope: str
    call: programs.Call | None = None
    operands: list[Form | None] = dataclasses.field(default_factory=list)
    plans: list[Plan] = dataclasses.field(default_factory=list)
    kind: Kind = Kind.ORIGINAL
    """How the rule in force treats the operation; a call's is in its plans."""
    rounds: list[bool] = dataclasses.field(default_factory=list)
    """Whether each operand, if it adapts, ends up in 16 bits, here or behind what else adapts."""


@dataclasses.dataclass
class Plan:
    """The decisions for one program, given the forms of its inputs and the demand for its outputs."""

    program: programs.Program
    inputs: list[Form | None]
    steps: list[Step]
    outputs: list[Form | None]
    rounds: list[bool] = dataclasses.field(default_factory=list)
    """Whether each output, if it adapts, ends up in 16 bits."""
    cache: dict = dataclasses.field(default_factory=dict)


class Planner:
    """Plans programs under one choice of settings; remembers what it has planned."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.demands = Demands(settings)
        self._plans: dict[tuple, Plan] = {}

    def plan(
        self,
        program: programs.Program,
        inputs: Sequence[Form | None],
        demands: Sequence[Demand],
    ) -> Plan:
        """The plan of a program whose inputs have these forms and whose outputs are so used."""
        plan = self._plan(program, inputs, demands, "")
        _mark_rounded(plan, [False] * len(plan.outputs))
        return plan

    def _plan(
        self,
        program: programs.Program,
        inputs: Sequence[Form | None],
        demands: Sequence[Demand],
        prefix: str,
    ) -> Plan:
        key = (id(program.jaxpr), tuple(inputs), tuple(demands), prefix)
        if key not in self._plans:
            self._plans[key] = self._make(program, list(inputs), demands, prefix)
        return self._plans[key]

    def _make(
        self,
        program: programs.Program,
        inputs: list[Form | None],
        demands: Sequence[Demand],
        prefix: str,
    ) -> Plan:
        jaxpr = program.jaxpr
        used, _ = self.demands.of(program, demands, prefix)
        forms: dict[Any, Form | None] = dict(zip(jaxpr.invars, inputs))
        forms.update((v, given(v)) for v in jaxpr.constvars)
        steps = []
        for eqn in jaxpr.eqns:
            step = self._step(eqn, forms, used, prefix)
            forms.update(zip(eqn.outvars, step.results))
            steps.append(step)
        outputs = [self._form(v, forms) for v in jaxpr.outvars]
        return Plan(program, inputs, steps, outputs)

    # Forwards: forms

    def _is_native(self, scope: str) -> bool:
        """Whether the user wants all of a region in 16 bits."""
        return self.demands.override(scope) == self.settings.dtype

    def _form(self, atom: Any, forms: dict) -> Form | None:
        if not programs.is_float32(atom):
            return None
        if not programs.is_literal(atom):
            return forms[atom]
        return Form.OPEN if rules.survives(atom.val, self.settings.dtype) else Form.FULL

    def _step(self, eqn: Any, forms: dict, used: dict[Any, Demand], prefix: str) -> Step:
        scope = self.demands.scope(eqn, prefix)
        demands = [used.get(v, NONE) for v in eqn.outvars]
        demand = union(demands)
        operands = [self._form(v, forms) for v in eqn.invars]
        kind, reason = self.demands.rule(eqn, scope, demand)
        call = programs.call_of(eqn) if kind is Kind.ENTERED else None
        if call is not None:
            return self._call_step(eqn, call, operands, demands, scope)
        present = [f for f in operands if f is not None]
        if eqn.primitive.name == "convert_element_type":
            run, form = None, _cast_form(eqn, operands[0])
        elif kind is Kind.EACH:
            one_each = len(operands) == len(eqn.outvars)
            results = operands if one_each else [max(present, default=None)] * len(eqn.outvars)
            return Step(None, _fit(results, eqn), reason, scope, operands=operands, kind=kind)
        elif kind is Kind.ORIGINAL or kind is Kind.ENTERED:
            is_open = eqn.primitive.name == "iota"
            run, form = Form.FULL, Form.OPEN if is_open else Form.FULL
        elif kind is Kind.LOW:
            used_low = demand & PRODUCT or not self.settings.narrow
            run, form = Form.LOW, Form.LOW if used_low else Form.FULL
        elif kind is Kind.FLOAT32:
            run, form = Form.FULL, _made(Form.FULL, demand)
        else:
            run, form, why = self._widest(eqn, kind, operands, demand, scope)
            if run == Form.FULL and form == Form.LOW and _skips(eqn, operands, used):
                run = Form.LOW
            reason = why or reason
        if form == Form.LOW and _computes_number(eqn, kind) and not self._is_native(scope):
            form = Form.FULL
            if run == Form.LOW and kind is not Kind.LOW:
                run, reason = Form.FULL, REASONS["number"]
        results = _fit([form] * len(eqn.outvars), eqn)
        return Step(run, results, reason, scope, operands=operands, kind=kind)

    def _widest(
        self, eqn: Any, kind: Kind, operands: list[Form | None], demand: Demand, scope: str
    ) -> tuple[Form, Form, str]:
        """How to run, and what results, where operands decide."""
        moves, name, given_as = kind is Kind.MOVES, eqn.primitive.name, operands
        if not moves:
            operands = [_spread(f, v, eqn) for f, v in zip(operands, eqn.invars)]
        present = [f for f in operands if f is not None] or [Form.OPEN]
        form = max(present)
        if name in rules.EQUALITIES and Form.LOW in present:
            # The derivative of a maximum asks which operand the result, perhaps rounded, equals.
            return Form.LOW, Form.LOW, ""
        if form == Form.LOW:
            if Form.FREE in present and (demand & Demand.OUTPUT or name in rules.COMPARES):
                return Form.FULL, Form.FULL, REASONS["master"]
            native = self._is_native(scope)
            eaten = moves or native or demand & PRODUCT or self.demands.saturates(name, demand)
            if not eaten and _is_awaited(eqn, given_as, demand):
                return Form.FULL, Form.FULL, REASONS["awaited"]
            if _scales_activation(eqn, given_as) and not (native or _has_literal(eqn)):
                return Form.FULL, Form.LOW, REASONS["number"]
            return Form.LOW, Form.LOW, ""
        if form == Form.FULL:
            # A norm ends with its bias: what it gives is an activation, also to a norm that is next,
            # and so is its cotangent. An activation that a number scales still is one.
            exact = demand & (Demand.OUTPUT | Demand.PERIODIC)
            is_activation = _adds_bias(eqn, given_as) or _scales_activation(eqn, given_as)
            if is_activation and demand & PRODUCT and not exact:
                return Form.FULL, Form.LOW, ""
            return Form.FULL, _made(Form.FULL, demand), ""
        if moves:
            if name in rules.READS_ROWS and demand & PRODUCT and not demand & Demand.OUTPUT:
                return Form.FULL, Form.LOW, ""
            enlarges = eqn.outvars[0].aval.size != eqn.invars[0].aval.size
            spread = name == "broadcast_in_dim" and enlarges
            return Form.FULL, Form.OPEN if spread else form, REASONS["adapts"]
        # `max` puts OPEN above FREE; of the two, what was given decides.
        mixed = Form.FREE if Form.FREE in present else Form.OPEN
        return Form.FULL, _made(mixed, demand), REASONS["adapts"]

    def _call_step(
        self,
        eqn: Any,
        call: programs.Call,
        operands: list[Form | None],
        demands: list[Demand],
        scope: str,
    ) -> Step:
        forms = list(operands)
        wanted = list(demands)
        if call.carries:
            inner = self.demands.of_call(eqn, call, demands, scope)
            for result, operand in call.carries:
                wanted[result] |= inner[operand]
            forms = self._settled(call, forms, wanted, scope)
        plans = self._bodies(call, forms, wanted, scope)
        results = _joined([p.outputs for b, p in zip(call.bodies, plans) if b.gives_results])
        for result, operand in call.carries:
            results[result] = forms[operand]
        return Step(None, _fit(results, eqn), "", scope, call, forms, plans)

    def _bodies(
        self, call: programs.Call, forms: list[Form | None], wanted: list[Demand], scope: str
    ) -> list[Plan]:
        return [
            self._plan(
                body.program,
                [forms[place] for place in body.operands],
                wanted if body.gives_results else [NONE],
                scope,
            )
            for body in call.bodies
        ]

    def _settled(
        self, call: programs.Call, forms: list[Form | None], wanted: list[Demand], scope: str
    ) -> list[Form | None]:
        """The forms of a loop's operands, the carried ones stable around the loop.

        A carry starts as the caller's value is: float32 if it was given. It becomes 16-bit if the
        body makes it so from a float32 one, and float32 again wherever 16 bits are not stable.
        """
        forms = list(forms)
        carried = [(r, o) for r, o in call.carries if forms[o] is not None]
        main = next(i for i, body in enumerate(call.bodies) if body.gives_results)

        def outputs() -> list[Form | None]:
            return self._bodies(call, forms, wanted, scope)[main].outputs

        for _, operand in carried:
            forms[operand] = Form.LOW if forms[operand] == Form.LOW else Form.FULL
        made = outputs()
        for result, operand in carried:
            if made[result] == Form.LOW:
                forms[operand] = Form.LOW
        while True:
            made = outputs()
            unstable = [o for r, o in carried if forms[o] == Form.LOW and made[r] != Form.LOW]
            if not unstable:
                return forms
            for operand in unstable:
                forms[operand] = Form.FULL


def given(atom: Any) -> Form | None:
    """The form of a value that the caller gives: a parameter, an input, a captured array."""
    if not programs.is_float32(atom):
        return None
    return Form.OPEN if atom.aval.size == 1 else Form.FREE


def caller(atom: Any) -> Demand:
    """The demand for a value that the caller gets."""
    return Demand.OUTPUT if programs.is_float32(atom) else NONE


def _made(form: Form, demand: Demand) -> Form:
    """What a computed value becomes: 16-bit if a product eats it and the caller does not get it."""
    return Form.LOW if demand & Demand.EATEN and not demand & Demand.OUTPUT else form


def _computes_number(eqn: Any, kind: Kind) -> bool:
    """Whether one number is computed. In float32 it costs nothing; all it scales shares its error."""
    computes = kind in (Kind.LOW, Kind.FLOAT32, Kind.WIDEST)
    tests = eqn.primitive.name in rules.EQUALITIES
    return computes and not tests and all(v.aval.size == 1 for v in eqn.outvars)


def _fit(forms: Sequence[Form | None], eqn: Any) -> list[Form | None]:
    return [f if programs.is_float32(v) else None for f, v in zip(forms, eqn.outvars)]


def _joined(branches: list[list[Form | None]]) -> list[Form | None]:
    """The forms that branches agree on."""
    return [
        None if any(f is None for f in forms) else max(forms) if len(set(forms)) > 1 else forms[0]
        for forms in zip(*branches)
    ]


def _cast_form(eqn: Any, operand: Form | None) -> Form:
    """What an explicit cast gives: integers adapt, what the user widened stays wide."""
    if operand is not None:
        return operand
    source = eqn.invars[0].aval.dtype
    return Form.FULL if jnp.issubdtype(source, jnp.floating) else Form.OPEN


def _spread(form: Form | None, atom: Any, eqn: Any) -> Form | None:
    """The form of an operand of arithmetic: one that is repeated to fit adapts to the other."""
    repeated = form is Form.FREE and atom.aval.size != eqn.outvars[0].aval.size
    return Form.OPEN if repeated else form


def _is_awaited(eqn: Any, given_as: list[Form | None], demand: Demand) -> bool:
    """Whether 16-bit arithmetic that no product eats is done in float32: squares, losses.

    A product's bias is always added in 16 bits. Added in float32, the sum for its gradient would
    read a float32 cotangent that is written for it alone. And a mask picks elements, or adds zeros
    and the lowest number there is: in float32 the elements would be no more exact, but wider.
    """
    name = eqn.primitive.name
    masks = not demand & (Demand.OUTPUT | Demand.MAGNIFIED)
    if (name == "select_n" and masks) or _adds_bias(eqn, given_as):
        return False
    arrays = [(v, form) for v, form in zip(eqn.invars, given_as) if not programs.is_literal(v)]
    if name in ("add", "sub") and masks and any(f is Form.OPEN and v.aval.ndim for v, f in arrays):
        return False
    return bool(demand & (Demand.FLOAT32 | Demand.OUTPUT))


def _skips(eqn: Any, operands: list[Form | None], used: dict[Any, Demand]) -> bool:
    """Whether a 16-bit skip connection is added to a float32 branch, and read nowhere in float32.

    Cast up for this sum alone, it might be written once more, in float32.
    """
    pairs = zip(eqn.invars, operands)
    narrow = [v for v, form in pairs if form == Form.LOW and not programs.is_literal(v)]
    awaited = any(used.get(v, NONE) & Demand.FLOAT32 for v in narrow)
    return eqn.primitive.name == "add" and bool(narrow) and not awaited


def _mark_rounded(plan: Plan, outputs: Sequence[bool]) -> list[bool]:
    """Marks which operands end up in 16 bits if they adapt, as these outputs do; tells which inputs."""
    jaxpr = plan.program.jaxpr
    plan.rounds = [a or b for a, b in zip(outputs, plan.rounds or outputs)]
    rounded = {v for v, r in zip(jaxpr.outvars, outputs) if r and not programs.is_literal(v)}
    for eqn, step in zip(reversed(jaxpr.eqns), reversed(plan.steps)):
        results = [v in rounded for v in eqn.outvars]
        adapts = step.kind in (Kind.MOVES, Kind.EACH, Kind.WIDEST) and any(results)
        low = adapts or step.run == Form.LOW
        found = [f is not None and (low or f == Form.LOW) for f in step.operands]
        for body, inner in zip(step.call.bodies if step.call else (), step.plans):
            wanted = [r or f == Form.LOW for r, f in zip(results, step.results)]
            wanted = wanted if body.gives_results else [False]
            for place, rounds in zip(body.operands, _mark_rounded(inner, wanted)):
                found[place] |= rounds
        step.rounds = [a or b for a, b in zip(found, step.rounds or found)]
        rounded |= {v for v, r in zip(eqn.invars, found) if r and not programs.is_literal(v)}
    return [v in rounded for v in jaxpr.invars]


def _adds_bias(eqn: Any, given_as: list[Form | None]) -> bool:
    """Whether a parameter that varies along one axis only is added, repeated along the others."""
    arrays = [(v, form) for v, form in zip(eqn.invars, given_as) if not programs.is_literal(v)]
    return eqn.primitive.name == "add" and any(
        _spread(form, v, eqn) is Form.OPEN and v.aval.ndim > 1 and v.aval.size in v.aval.shape
        for v, form in arrays
    )


def _has_literal(eqn: Any) -> bool:
    """Whether an operand is written in the program: that 16 bits hold it is seen when it runs."""
    return any(map(programs.is_literal, eqn.invars))


def _scales_activation(eqn: Any, given_as: list[Form | None]) -> bool:
    """Whether a 16-bit array is scaled by a number, as Gemma's embeddings are by a computed root."""
    arrays = [form for v, form in zip(eqn.invars, given_as) if v.aval.size != 1]
    return eqn.primitive.name in rules.SCALES and arrays == [Form.LOW]
