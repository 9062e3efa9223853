"""Decide the precision of every operation and value of a program, before any of it runs.

Two passes over a jaxpr. Backwards, the *demand*: who will eat each value? A product (through data
movement and relu), a float32 operation, the caller? Forwards, the *form* that each float32 value
takes, in the order FREE < OPEN < LOW < FULL:

    FREE  float32 because it was given so (a parameter): cast where it is used
    OPEN  a constant, scalar or broadcast parameter: adapts to what it meets
    LOW   16 bits
    FULL  float32 for a reason (an exponential, a sum)

    form(a op b) = max(form(a), form(b)),  made LOW if a product eats it and the caller does not.

So a residual stream that starts at a product stays in 16 bits, softmax stays in float32 up to the
probabilities, which a product eats, and the weights an optimizer hands back stay in float32.
Loops take the least precision that is stable around the loop.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp.numerics import jaxpr as programs
from jaxmp.numerics.tree import match_path
from jaxmp.precision import autocast_rules as rules
from jaxmp.precision.autocast_rules import Kind


class Form(enum.IntEnum):
    """What a float32 value of the original program becomes. The larger of two forms wins."""

    FREE = 0
    OPEN = 1
    LOW = 2
    FULL = 3


class Demand(enum.IntFlag):
    """Who uses a value."""

    EATEN = 1
    """A product, directly or through data movement, relu, scaling."""
    LATER = 2
    """A product, somewhere behind elementwise arithmetic."""
    FLOAT32 = 4
    """A float32 operation."""
    OUTPUT = 8
    """The caller gets it, or it plus something: a new weight, a running mean."""
    PERIODIC = 16
    """A sine or cosine: an angle of 16 bits would be wrong beyond 256."""


_NONE = Demand(0)
_PRODUCT = Demand.EATEN | Demand.LATER
_REASONS = {
    "region": "in a region kept in float32",
    "native": "in a region run wholly in 16 bits",
    "highest": "a precision above the default was asked for",
    "periodic": "an angle: it feeds a sine or cosine",
    "awaited": "only float32 operations and the caller use it",
    "master": "a float32 value that the caller gets back is updated in float32",
    "power": "powers leave the range of float16",
    "adapts": "nothing 16-bit takes part",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user of autocast chose."""

    dtype: np.dtype
    table: dict[str, rules.Rule]
    overrides: tuple[tuple[str, np.dtype], ...] = ()

    @property
    def narrow(self) -> bool:
        """True for float16, whose range sums and powers leave."""
        return jnp.finfo(self.dtype).maxexp < 100


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
    elementwise: bool = False


@dataclasses.dataclass
class Plan:
    """The decisions for one program, given the forms of its inputs and the demand for its outputs."""

    program: programs.Program
    inputs: list[Form | None]
    steps: list[Step]
    outputs: list[Form | None]
    cache: dict = dataclasses.field(default_factory=dict)


class Planner:
    """Plans programs under one choice of settings; remembers what it has planned."""

    def __init__(self, settings: Settings):
        self.settings = settings
        info = jnp.finfo(settings.dtype)
        self._largest, self._smallest = float(info.max), float(info.tiny)
        self._plans: dict[tuple, Plan] = {}
        self._demands: dict[tuple, tuple[dict, list[Demand]]] = {}
        self.matched: set[str] = set()
        self.scopes: set[str] = set()

    def plan(
        self,
        program: programs.Program,
        inputs: Sequence[Form | None],
        demands: Sequence[Demand],
        prefix: str = "",
    ) -> Plan:
        """The plan of a program whose inputs have these forms and whose outputs are so used."""
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
        used, _ = self._demand(program, demands, prefix)
        forms: dict[Any, Form | None] = dict(zip(jaxpr.invars, inputs))
        forms.update((v, given(v)) for v in jaxpr.constvars)
        steps = []
        for eqn in jaxpr.eqns:
            step = self._step(eqn, forms, [used.get(v, _NONE) for v in eqn.outvars], prefix)
            forms.update(zip(eqn.outvars, step.results))
            steps.append(step)
        outputs = [self._form(v, forms) for v in jaxpr.outvars]
        return Plan(program, inputs, steps, outputs)

    # Which rule holds

    def _scope(self, eqn: Any, prefix: str) -> str:
        own = programs.scope(eqn)
        return f"{prefix}/{own}".strip("/") if own and prefix else own or prefix

    def _override(self, scope: str) -> np.dtype | None:
        if FULL_PRECISION in scope.split("/"):
            return np.dtype("float32")
        self.scopes.add(scope)
        found = [(p, d) for p, d in self.settings.overrides if scope and match_path(p, scope)]
        self.matched.update(pattern for pattern, _ in found)
        return found[-1][1] if found else None

    def _rule(self, eqn: Any, scope: str, demand: Demand) -> tuple[Kind, str]:
        """How to treat an operation: the table, after regions, overrides and special cases."""
        name = eqn.primitive.name
        rule = self.settings.table.get(name)
        if rule is None:
            if programs.holds_programs(eqn):
                raise NotImplementedError(
                    f"autocast does not know the operation {name!r} (at {scope or 'the top level'}), "
                    "which holds a program. Wrap it in `full_precision`, or pass "
                    f'rules={{"{name}": "original"}} to run it in its own dtypes.'
                )
            rule = rules.UNKNOWN
        kind, reason = rule
        region = self._override(scope)
        if region == np.dtype("float32") and kind in (Kind.LOW, Kind.WIDEST):
            return Kind.FLOAT32, _REASONS["region"]
        if region == self.settings.dtype and kind is Kind.FLOAT32:
            return Kind.WIDEST, _REASONS["native"]
        if kind is Kind.LOW and _above_default(eqn.params.get("precision")):
            return Kind.FLOAT32, _REASONS["highest"]
        if kind is Kind.LOW and demand & Demand.PERIODIC:
            return Kind.FLOAT32, _REASONS["periodic"]
        if self.settings.narrow and kind is Kind.WIDEST and _is_power(eqn):
            return Kind.FLOAT32, _REASONS["power"]
        return kind, reason

    # Backwards: demand

    def _demand(
        self, program: programs.Program, demands: Sequence[Demand], prefix: str
    ) -> tuple[dict, list[Demand]]:
        """The demand for every variable, and for the inputs in their order."""
        key = (id(program.jaxpr), tuple(demands), prefix)
        if key in self._demands:
            return self._demands[key]
        jaxpr = program.jaxpr
        used: dict[Any, Demand] = {}
        scalars = _scalars(jaxpr)

        def use(atom: Any, demand: Demand) -> None:
            if not programs.is_literal(atom) and programs.is_float32(atom):
                used[atom] = used.get(atom, _NONE) | demand

        for atom, demand in zip(jaxpr.outvars, demands):
            use(atom, demand)
        for eqn in reversed(jaxpr.eqns):
            results = [used.get(v, _NONE) for v in eqn.outvars]
            for atom, demand in zip(eqn.invars, self._passed_back(eqn, results, scalars, prefix)):
                use(atom, demand)
        found = used, [used.get(v, _NONE) for v in jaxpr.invars]
        self._demands[key] = found
        return found

    def _passed_back(
        self, eqn: Any, results: list[Demand], scalars: set, prefix: str
    ) -> list[Demand]:
        """The demand that an operation, whose results are so used, has for its operands."""
        if not any(map(programs.is_float32, eqn.invars)):
            return [_NONE] * len(eqn.invars)
        scope = self._scope(eqn, prefix)
        demand = _union(results)
        kind, _ = self._rule(eqn, scope, demand)
        name = eqn.primitive.name
        call = programs.call_of(eqn) if kind is Kind.ENTERED else None
        if call is not None:
            return self._call_demand(eqn, call, results, scope)
        if kind is Kind.LOW:
            back = _PRODUCT
        elif kind is Kind.WIDEST:
            back = _through_arithmetic(eqn, demand, scalars)
        elif name == "convert_element_type":
            back = _through_cast(eqn, demand)
        elif kind is Kind.EACH and len(results) == len(eqn.invars):
            return results
        elif kind in (Kind.MOVES, Kind.EACH):
            back = demand
        else:
            angle = Demand.PERIODIC if name in rules.PERIODIC else demand & Demand.PERIODIC
            back = Demand.FLOAT32 | angle
        return [back] * len(eqn.invars)

    def _call_demand(
        self, eqn: Any, call: programs.Call, results: list[Demand], scope: str
    ) -> list[Demand]:
        operands = [_NONE] * len(eqn.invars)
        while True:
            wanted = list(results)
            for result, operand in call.carries:
                wanted[result] |= operands[operand]
            before = list(operands)
            for body in call.bodies:
                outs = wanted if body.gives_results else [_NONE]
                _, inner = self._demand(body.program, outs, scope)
                for place, demand in zip(body.operands, inner):
                    operands[place] |= demand
            if operands == before or not call.carries:
                return operands

    # Forwards: forms

    def _form(self, atom: Any, forms: dict) -> Form | None:
        if not programs.is_float32(atom):
            return None
        if not programs.is_literal(atom):
            return forms[atom]
        keeps = rules.survives(atom.val, self.settings.dtype, self._largest, self._smallest)
        return Form.OPEN if keeps else Form.FULL

    def _step(self, eqn: Any, forms: dict, demands: list[Demand], prefix: str) -> Step:
        scope = self._scope(eqn, prefix)
        demand = _union(demands)
        operands = [self._form(v, forms) for v in eqn.invars]
        kind, reason = self._rule(eqn, scope, demand)
        call = programs.call_of(eqn) if kind is Kind.ENTERED else None
        if call is not None:
            return self._call_step(eqn, call, operands, demands, scope)
        present = [f for f in operands if f is not None]
        if eqn.primitive.name == "convert_element_type":
            run, form = None, _cast_form(eqn, operands[0])
        elif kind is Kind.EACH:
            one_each = len(operands) == len(eqn.outvars)
            results = operands if one_each else [max(present, default=None)] * len(eqn.outvars)
            return Step(None, _fit(results, eqn), reason, scope, operands=operands)
        elif kind is Kind.ORIGINAL or kind is Kind.ENTERED:
            is_open = eqn.primitive.name == "iota"
            run, form = Form.FULL, Form.OPEN if is_open else Form.FULL
        elif kind is Kind.LOW:
            used_low = demand & _PRODUCT or not self.settings.narrow
            run, form = Form.LOW, Form.LOW if used_low else Form.FULL
        elif kind is Kind.FLOAT32:
            run, form = Form.FULL, _made(Form.FULL, demand)
        else:
            run, form, why = self._widest(eqn, kind, operands, demand, scope)
            reason = why or reason
        results = _fit([form] * len(eqn.outvars), eqn)
        step = Step(run, results, reason, scope, operands=operands)
        step.elementwise = kind is Kind.WIDEST
        return step

    def _widest(
        self, eqn: Any, kind: Kind, operands: list[Form | None], demand: Demand, scope: str
    ) -> tuple[Form, Form, str]:
        """How to run, and what results, where operands decide."""
        present = [f for f in operands if f is not None] or [Form.OPEN]
        form = max(present)
        moves, name = kind is Kind.MOVES, eqn.primitive.name
        if form == Form.LOW:
            if Form.FREE in present and (
                demand & Demand.OUTPUT or name in rules.COMPARES
            ):
                return Form.FULL, Form.FULL, _REASONS["master"]
            awaited = demand & (Demand.FLOAT32 | Demand.OUTPUT) and not demand & _PRODUCT
            if awaited and not moves and self._override(scope) != self.settings.dtype:
                return Form.FULL, Form.FULL, _REASONS["awaited"]
            return Form.LOW, Form.LOW, ""
        if form == Form.FULL:
            return Form.FULL, _made(Form.FULL, demand), ""
        if moves:
            if name in rules.READS_ROWS and demand & _PRODUCT and not demand & Demand.OUTPUT:
                return Form.FULL, Form.LOW, ""
            enlarges = eqn.outvars[0].aval.size > eqn.invars[0].aval.size
            spread = name == "broadcast_in_dim" and enlarges
            return Form.FULL, Form.OPEN if spread else form, _REASONS["adapts"]
        # `max` puts OPEN above FREE; of the two, what was given decides.
        mixed = Form.FREE if Form.FREE in present else Form.OPEN
        return Form.FULL, _made(mixed, demand), _REASONS["adapts"]

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
            inner = self._call_demand(eqn, call, demands, scope)
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
            self.plan(
                body.program,
                [forms[place] for place in body.operands],
                wanted if body.gives_results else [_NONE],
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


FULL_PRECISION = "jaxmp.full_precision"


def given(atom: Any) -> Form | None:
    """The form of a value that the caller gives: a parameter, an input, a captured array."""
    if not programs.is_float32(atom):
        return None
    return Form.OPEN if atom.aval.size == 1 else Form.FREE


def caller(atom: Any) -> Demand:
    """The demand for a value that the caller gets."""
    return Demand.OUTPUT if programs.is_float32(atom) else _NONE


def _made(form: Form, demand: Demand) -> Form:
    """What a computed value becomes: 16-bit if a product eats it and the caller does not get it."""
    return Form.LOW if demand & Demand.EATEN and not demand & Demand.OUTPUT else form


def _union(demands: Sequence[Demand]) -> Demand:
    total = _NONE
    for demand in demands:
        total |= demand
    return total


def _fit(forms: Sequence[Form | None], eqn: Any) -> list[Form | None]:
    return [f if programs.is_float32(v) else None for f, v in zip(forms, eqn.outvars)]


def _joined(branches: list[list[Form | None]]) -> list[Form | None]:
    """The forms that branches agree on."""
    return [
        None if any(f is None for f in forms) else max(forms) if len(set(forms)) > 1 else forms[0]
        for forms in zip(*branches)
    ]


def _scalars(jaxpr: Any) -> set:
    """The variables that hold one number, or one number repeated."""
    found = {v for v in (*jaxpr.constvars, *jaxpr.invars) if getattr(v.aval, "size", 0) == 1}
    for eqn in jaxpr.eqns:
        repeats = eqn.primitive.name in ("broadcast_in_dim", "convert_element_type", "copy")
        for out in eqn.outvars:
            if getattr(out.aval, "size", 0) == 1 or (repeats and _is_scalar(eqn.invars[0], found)):
                found.add(out)
    return found


def _is_scalar(atom: Any, scalars: set) -> bool:
    return programs.is_literal(atom) or atom in scalars


def _through_arithmetic(eqn: Any, demand: Demand, scalars: set) -> Demand:
    """The demand of elementwise arithmetic for its operands."""
    name = eqn.primitive.name
    if name in rules.COMPARES:
        return _NONE
    scales = name in rules.SCALES and any(_is_scalar(v, scalars) for v in eqn.invars)
    reaches = scales or name in rules.REACHES_THROUGH
    back = demand if reaches else demand & ~Demand.EATEN
    if demand & Demand.OUTPUT and not (scales or name in rules.ADDITIVE):
        back = (back & ~Demand.OUTPUT) | Demand.FLOAT32
    return back


def _through_cast(eqn: Any, demand: Demand) -> Demand:
    """The demand of an explicit cast for its operand."""
    dtype = eqn.params["new_dtype"]
    if dtype == np.float32:
        return demand
    if not jnp.issubdtype(dtype, jnp.floating):
        return _NONE
    return _PRODUCT if jnp.finfo(dtype).bits == 16 else Demand.FLOAT32


def _cast_form(eqn: Any, operand: Form | None) -> Form:
    """What an explicit cast gives: integers adapt, what the user widened stays wide."""
    if operand is not None:
        return operand
    source = eqn.invars[0].aval.dtype
    return Form.FULL if jnp.issubdtype(source, jnp.floating) else Form.OPEN


def _is_power(eqn: Any) -> bool:
    is_square = eqn.primitive.name == "mul" and eqn.invars[0] is eqn.invars[1]
    return is_square or eqn.primitive.name in rules.POWERS


def _above_default(precision: Any) -> bool:
    """Whether a product's `precision` asks for more than one pass of 16 bits."""
    if precision is None:
        return False
    choices = precision if isinstance(precision, tuple) else (precision,)
    return any(not str(choice).endswith(("DEFAULT", "None")) for choice in choices)
