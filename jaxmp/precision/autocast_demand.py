"""Which rule holds for each operation of a program, and who will use each of its values.

The *demand* for a value is found backwards from the outputs: a product (also through data movement
and relu), a float32 operation, the caller? `autocast_plan` decides by it.
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

FULL_PRECISION = "jaxmp.full_precision"


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
    MAGNIFIED = 32
    """A logarithm, a root or a denominator, which may blow a rounding up: the 1 of log(1 - tanh^2)."""


NONE = Demand(0)
PRODUCT = Demand.EATEN | Demand.LATER
REASONS = {
    "region": "in a region kept in float32",
    "native": "in a region run wholly in 16 bits",
    "highest": "a precision above the default was asked for",
    "periodic": "an angle: it feeds a sine or cosine",
    "awaited": "only float32 operations and the caller use it",
    "master": "a float32 value that the caller gets back is updated in float32",
    "number": "a number, or scaled by one: its rounding would be the error of all that it scales",
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


class Demands:
    """The rules and demands in programs under one choice of settings; remembers what it found."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.matched: set[str] = set()
        self.scopes: set[str] = set()
        self._found: dict[tuple, tuple[dict, list[Demand]]] = {}

    # Which rule holds

    def scope(self, eqn: Any, prefix: str) -> str:
        own = programs.scope(eqn)
        return f"{prefix}/{own}".strip("/") if own and prefix else own or prefix

    def override(self, scope: str) -> np.dtype | None:
        if FULL_PRECISION in scope.split("/"):
            return np.dtype("float32")
        self.scopes.add(scope)
        found = [(p, d) for p, d in self.settings.overrides if scope and match_path(p, scope)]
        self.matched.update(pattern for pattern, _ in found)
        return found[-1][1] if found else None

    def rule(self, eqn: Any, scope: str, demand: Demand) -> tuple[Kind, str]:
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
        region = self.override(scope)
        exact = name in rules.EQUALITIES
        narrows = kind in (Kind.LOW, Kind.WIDEST) or name in rules.READS_ROWS
        if region == np.dtype("float32") and narrows and not exact:
            return Kind.FLOAT32, REASONS["region"]
        if region == self.settings.dtype and kind is Kind.FLOAT32:
            return Kind.WIDEST, REASONS["native"]
        if kind is Kind.LOW and _above_default(eqn.params.get("precision")):
            return Kind.FLOAT32, REASONS["highest"]
        if kind is Kind.LOW and demand & Demand.PERIODIC:
            return Kind.FLOAT32, REASONS["periodic"]
        if self.settings.narrow and kind is Kind.WIDEST and _is_power(eqn):
            return Kind.FLOAT32, REASONS["power"]
        return kind, reason

    # Backwards: demand

    def of(
        self, program: programs.Program, demands: Sequence[Demand], prefix: str
    ) -> tuple[dict, list[Demand]]:
        """The demand for every variable, and for the inputs in their order."""
        key = (id(program.jaxpr), tuple(demands), prefix)
        if key in self._found:
            return self._found[key]
        jaxpr = program.jaxpr
        used: dict[Any, Demand] = {}
        scalars = _scalars(jaxpr)

        def use(atom: Any, demand: Demand) -> None:
            if not programs.is_literal(atom) and programs.is_float32(atom):
                used[atom] = used.get(atom, NONE) | demand

        for atom, demand in zip(jaxpr.outvars, demands):
            use(atom, demand)
        for eqn in reversed(jaxpr.eqns):
            results = [used.get(v, NONE) for v in eqn.outvars]
            for atom, demand in zip(eqn.invars, self._passed_back(eqn, results, scalars, prefix)):
                use(atom, demand)
        found = used, [used.get(v, NONE) for v in jaxpr.invars]
        self._found[key] = found
        return found

    def _passed_back(
        self, eqn: Any, results: list[Demand], scalars: set, prefix: str
    ) -> list[Demand]:
        """The demand that an operation, whose results are so used, has for its operands."""
        if not any(map(programs.is_float32, eqn.invars)):
            return [NONE] * len(eqn.invars)
        scope = self.scope(eqn, prefix)
        demand = union(results)
        kind, _ = self.rule(eqn, scope, demand)
        name = eqn.primitive.name
        call = programs.call_of(eqn) if kind is Kind.ENTERED else None
        if call is not None:
            return self.of_call(eqn, call, results, scope)
        if kind is Kind.LOW:
            back = PRODUCT
        elif kind is Kind.WIDEST:
            back = _through_arithmetic(eqn, demand, scalars)
            if self.saturates(name, demand):
                back = (back & ~Demand.FLOAT32) | Demand.LATER
        elif name == "convert_element_type":
            back = _through_cast(eqn, demand)
        elif kind is Kind.EACH and len(results) == len(eqn.invars):
            return results
        elif kind in (Kind.MOVES, Kind.EACH):
            back = demand
        else:
            back = _through_float32(name, demand)
        backs = [back] * len(eqn.invars)
        if name == "div" and kind is Kind.WIDEST and not _is_scalar(eqn.invars[1], scalars):
            backs[1] |= Demand.MAGNIFIED
        return backs

    def saturates(self, name: str, demand: Demand) -> bool:
        """Whether 16 bits hold the result of an activation that no product uses, as a cap of logits."""
        exact = Demand.OUTPUT | Demand.MAGNIFIED | Demand.PERIODIC
        return name in rules.SATURATES and not self.settings.narrow and not demand & exact

    def of_call(
        self, eqn: Any, call: programs.Call, results: list[Demand], scope: str
    ) -> list[Demand]:
        operands = [NONE] * len(eqn.invars)
        while True:
            wanted = list(results)
            for result, operand in call.carries:
                wanted[result] |= operands[operand]
            before = list(operands)
            for body in call.bodies:
                outs = wanted if body.gives_results else [NONE]
                _, inner = self.of(body.program, outs, scope)
                for place, demand in zip(body.operands, inner):
                    operands[place] |= demand
            if operands == before or not call.carries:
                return operands


def union(demands: Sequence[Demand]) -> Demand:
    """All of these demands together."""
    total = NONE
    for demand in demands:
        total |= demand
    return total


def _scalars(jaxpr: Any) -> set:
    """The variables that hold one number, one number repeated, or a mask of one number and 0."""
    found = {v for v in (*jaxpr.constvars, *jaxpr.invars) if getattr(v.aval, "size", 0) == 1}
    for eqn in jaxpr.eqns:
        name, first = eqn.primitive.name, eqn.invars[:1]
        is_mask = name == "convert_element_type" and first[0].aval.dtype == np.bool_
        same = first if name in ("broadcast_in_dim", "convert_element_type", "copy") else ()
        same = eqn.invars if name in rules.SCALES else same
        keeps = is_mask or (bool(same) and all(_is_scalar(v, found) for v in same))
        found.update(v for v in eqn.outvars if keeps or getattr(v.aval, "size", 0) == 1)
    return found


def _is_scalar(atom: Any, scalars: set) -> bool:
    return programs.is_literal(atom) or atom in scalars


def _through_arithmetic(eqn: Any, demand: Demand, scalars: set) -> Demand:
    """The demand of elementwise arithmetic for its operands."""
    name = eqn.primitive.name
    if name in rules.COMPARES:
        return NONE
    scales = name in rules.SCALES and any(_is_scalar(v, scalars) for v in eqn.invars)
    reaches = scales or name in rules.REACHES_THROUGH
    back = demand if reaches else demand & ~Demand.EATEN
    if demand & Demand.OUTPUT and not (scales or name in rules.ADDITIVE):
        back = (back & ~Demand.OUTPUT) | Demand.FLOAT32
    return back


def _through_float32(name: str, demand: Demand) -> Demand:
    """The demand of a float32 operation for its operands."""
    back = Demand.FLOAT32 | demand & (Demand.PERIODIC | Demand.MAGNIFIED)
    if name in rules.PERIODIC:
        back |= Demand.PERIODIC
    if name in rules.POOLS:
        back |= demand & Demand.LATER
    # An error in an exponent is one of the same size, relative, in the result.
    return back & ~Demand.MAGNIFIED if name in rules.EXPONENTIALS else back | _magnified(name)


def _magnified(name: str) -> Demand:
    return Demand.MAGNIFIED if name in rules.MAGNIFIES else NONE


def _through_cast(eqn: Any, demand: Demand) -> Demand:
    """The demand of an explicit cast for its operand."""
    dtype = eqn.params["new_dtype"]
    if dtype == np.float32:
        return demand
    if not jnp.issubdtype(dtype, jnp.floating):
        return NONE
    return PRODUCT if jnp.finfo(dtype).bits == 16 else Demand.FLOAT32


def _is_power(eqn: Any) -> bool:
    is_square = eqn.primitive.name == "mul" and eqn.invars[0] is eqn.invars[1]
    return is_square or eqn.primitive.name in rules.POWERS


def _above_default(precision: Any) -> bool:
    """Whether a product's `precision` asks for more than one pass of 16 bits."""
    if precision is None:
        return False
    choices = precision if isinstance(precision, tuple) else (precision,)
    return any(not str(choice).endswith(("DEFAULT", "None")) for choice in choices)
