"""Run a program by its plan: cast what each operation reads, and rebuild the control flow around it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxmp.numerics import custom_rules
from jaxmp.numerics import jaxpr as programs
from jaxmp.precision.autocast_demand import NONE
from jaxmp.precision.autocast_fused import Group, groups
from jaxmp.precision.autocast_plan import Form, Plan, Planner, Step
from jaxmp.precision.autocast_rules import COMPUTED_AGAIN, SCALES, TABLE, UNKNOWN, Kind, saturated

_FLOAT32 = np.dtype("float32")
_KEPT = "jaxmp.parameter"
_REMATERIALISES = frozenset({"remat2", "checkpoint"})


class Runner:
    """Runs plans. Values are float32 or of the low dtype, as the forms in the plan say.

    `looping` is for the bodies of loops, which keep little for their backward pass.
    """

    def __init__(self, planner: Planner, looping: bool = False):
        self.planner = planner
        self.looping = looping
        self.dtype = planner.settings.dtype
        self._groups: dict[int, dict[int, Group]] = {}

    def run(self, plan: Plan, args: Sequence) -> list:
        """The outputs of a planned program, in the dtypes of their forms."""
        jaxpr = plan.program.jaxpr
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, plan.program.consts))
        values.update(zip(jaxpr.invars, args))
        widened: dict[Any, Any] = {}

        def read(place: int, i: int) -> Any:
            """An operand of an operation, cast up where it runs in float32, once for all its uses.

            So the cotangents of these uses are summed in float32, and rounded once.
            """
            step, atom = plan.steps[place], jaxpr.eqns[place].invars[i]
            if programs.is_literal(atom):
                return self._constant(atom, step.rounds[i])
            form, value = step.operands[i], values[atom]
            wanted = form if step.call is not None else step.run
            if form is None or wanted != Form.FULL or value.dtype != self.dtype:
                return value
            if atom not in widened:
                widened[atom] = programs.convert(value, _FLOAT32)
            return widened[atom]

        fused = self._fused(plan)
        inside = {place for group in fused.values() for place in group.inner}
        for place, (eqn, step) in enumerate(zip(jaxpr.eqns, plan.steps)):
            if place in inside:
                continue
            with programs.location(eqn):
                if place in fused:
                    group = fused[place]
                    operands = [read(index, i) for index, i in group.reads]
                    results = [self.fit(group.run(*operands), step.results[0])]
                else:
                    operands = [read(place, i) for i in range(len(eqn.invars))]
                    results = self._step(eqn, step, operands)
            values.update(zip(eqn.outvars, results))
        outputs = [
            self._constant(v, rounds) if programs.is_literal(v) else values[v]
            for v, rounds in zip(jaxpr.outvars, plan.rounds, strict=True)
        ]
        return [self.fit(x, form) for x, form in zip(outputs, plan.outputs)]

    def _fused(self, plan: Plan) -> dict[int, Group]:
        if id(plan) not in self._groups:
            self._groups[id(plan)] = groups(plan, self.planner.demands, self._run_part)
        return self._groups[id(plan)]

    def _run_part(self, part: Plan, operands: Sequence) -> list:
        """The results of a part of a program, which has no groups of its own."""
        self._groups[id(part)] = {}
        return self.run(part, operands)

    def fit(self, value: Any, form: Form | None) -> Any:
        """The value in the dtype of a form; other than float32 values have none, and stay."""
        if form is None:
            return value
        dtype = self.dtype if form == Form.LOW else _FLOAT32
        return value if value.dtype == dtype else programs.convert(value, dtype)

    def _constant(self, atom: Any, rounds: bool) -> Any:
        """The value of a literal, within the range of 16 bits if it ends up there."""
        in_float32 = programs.is_float32(atom)
        return saturated(atom.val, self.dtype) if rounds and in_float32 else atom.val

    def _step(self, eqn: Any, step: Step, operands: list) -> list:
        if step.call is not None:
            operands = [self.fit(x, form) for x, form in zip(operands, step.operands)]
            results = self._call(eqn, step, step.call, operands)
        elif eqn.primitive.name == "convert_element_type":
            results = [_cast(eqn, operands[0])]
        else:
            results = self._operation(eqn, step, operands)
        return [self.fit(x, form) for x, form in zip(results, step.results)]

    def _operation(self, eqn: Any, step: Step, operands: list) -> list:
        """An operation in the precision of its step; scaling in float32 if 16 bits do not hold the scale.

        Rounded, the scale's error would be that of all elements. Divisions stay as they were on a TPU:
        in float32 dropout's would cost it a tenth of a step's traffic.
        """
        if step.run != Form.LOW or self._holds_scale(eqn):
            return self._run_as(step, eqn, operands)
        exact = dataclasses.replace(step, run=Form.FULL)
        if eqn.primitive.name == "mul":
            return self._run_as(exact, eqn, operands)
        rounded = lambda step, *xs: [self.fit(y, Form.LOW) for y in self._run_as(step, eqn, xs)]
        return jax.lax.platform_dependent(
            *operands,
            tpu=functools.partial(rounded, step),
            default=functools.partial(rounded, exact),
        )

    def _holds_scale(self, eqn: Any) -> bool:
        """Whether 16 bits hold the number that an operation scales by, if it does."""
        if eqn.primitive.name not in SCALES:
            return True
        numbers = [np.float32(v.val) for v in eqn.invars if programs.is_literal(v)]
        return all(n == np.float32(programs.convert(n, self.dtype)) for n in numbers)

    def _run_as(self, step: Step, eqn: Any, operands: Sequence) -> list:
        """An operation, its operands cast to what the step runs in."""
        if step.run is not None:
            operands = [
                x if form is None else self._operand(x, form, eqn, step)
                for x, form in zip(operands, step.operands)
            ]
        return self._bind(eqn, step, list(operands))

    def _operand(self, x: Any, form: Form, eqn: Any, step: Step) -> Any:
        """A float32 operand, cast. A parameter is repeated before it is cast, not after.

        So the sum over the repeats, in its gradient, is a float32 sum.
        """
        if step.kind is Kind.WIDEST and step.run == Form.LOW and form < Form.LOW:
            shape = eqn.outvars[0].aval.shape
            if 0 < np.ndim(x) == len(shape) and x.shape != shape:
                x = jax.lax.broadcast_in_dim(x, shape, tuple(range(len(shape))))
        rounded = self.fit(x, step.run)
        is_parameter = step.kind is Kind.LOW and form == Form.FREE and rounded is not x
        return checkpoint_name(rounded, _KEPT) if self.looping and is_parameter else rounded

    def _bind(self, eqn: Any, step: Step, operands: list) -> list:
        name = eqn.primitive.name
        if TABLE.get(name, UNKNOWN).kind is not Kind.LOW:
            return programs.bind(eqn, operands)
        wide = eqn.outvars[0].aval.dtype
        if step.run == Form.LOW and step.results[0] == Form.LOW:
            return programs.bind(eqn, operands, preferred_element_type=self.dtype)
        narrow = {x.dtype for x in operands if x.dtype.itemsize == 2}
        if len(narrow) == 1 and wide == _FLOAT32 and all(x.dtype in narrow for x in operands[:2]):
            return [_wide_product(eqn, narrow.pop(), operands)]
        return programs.bind(eqn, operands)

    def _call(self, eqn: Any, step: Step, call: programs.Call, operands: list) -> list:
        kind = call.kind
        runner = Runner(self.planner, looping=True) if kind == "scan" else self
        functions = [
            runner._function(plan, step.results if body.gives_results else plan.outputs)
            for plan, body in zip(step.plans, call.bodies)
        ]
        if kind == "scan" and _may_forget(eqn.params["jaxpr"].jaxpr):
            functions = [jax.checkpoint(f, policy=_keeps, prevent_cse=False) for f in functions]
        if kind == "custom_jvp_call":
            return custom_rules.with_jvp(eqn, operands, functions[0], self._jvp_rule(eqn, step))
        if kind == "custom_vjp_call":
            return custom_rules.with_vjp(eqn, operands, functions[0], self._vjp_rule(step))
        if kind == "jit":
            return self._jit(eqn, step.plans[0], functions[0], operands)
        return programs.rebind(eqn, call, operands, functions)

    def _function(self, plan: Plan, results: list[Form | None]) -> Callable[..., list]:
        """A planned program as a function of values of any dtypes, to the forms agreed on."""

        def function(*args: Any) -> list:
            outs = self.run(plan, [self.fit(x, form) for x, form in zip(args, plan.inputs)])
            return [self.fit(x, form) for x, form in zip(outs, results)]

        return function

    def _jit(self, eqn: Any, plan: Plan, function: Callable, operands: list) -> list:
        """A jit call: traced once for each plan and operands, however often it is called."""
        key = (self.looping, *(jax.typeof(x) for x in operands))
        if key not in plan.cache:
            function.__name__ = eqn.params["name"]
            plan.cache[key] = jax.make_jaxpr(function)(*operands)
        return programs.rebind_jit(eqn, operands, plan.cache[key])

    def _jvp_rule(self, eqn: Any, step: Step) -> Callable:
        moved = [f for f, v in zip(step.results, eqn.outvars) if programs.is_inexact(v.aval)]
        forms = [*step.results, *moved]

        def run_rule(program: programs.Program, values: Sequence) -> list:
            outs = self.rerun(program, values)
            return [self.fit(x, form) for x, form in zip(outs, forms)]

        return run_rule

    def _vjp_rule(self, step: Step) -> Callable:
        def run_rule(program: programs.Program, values: Sequence, outputs: Sequence) -> list:
            outs = self.rerun(program, values)
            cast = [x if x.dtype == d else programs.convert(x, d) for x, d in zip(outs, outputs)]
            return [*cast, *outs[len(cast) :]]

        return run_rule

    def rerun(self, program: programs.Program, args: Sequence) -> list:
        """A program on values that already have the dtypes of their forms."""
        inputs = []
        for value, variable in zip(args, program.jaxpr.invars):
            low = value.dtype == self.dtype
            form = Form.LOW if low else Form.OPEN if value.size == 1 else Form.FREE
            inputs.append(form if programs.is_float32(variable) else None)
        demands = [NONE] * len(program.jaxpr.outvars)
        return self.run(self.planner.plan(program, inputs, demands), args)


def _may_forget(body: Any) -> bool:
    """Whether it is left to autocast what a loop keeps: the user did not say, and nothing would be seen."""
    said = any(eqn.primitive.name in _REMATERIALISES for eqn in programs.operations(body))
    return not said and not body.effects


def _keeps(primitive: Any, *_: Any, **__: Any) -> bool:
    """What a loop keeps for its backward pass, as a policy of `jax.checkpoint`."""
    return primitive.name not in COMPUTED_AGAIN


def _cast(eqn: Any, x: Any) -> Any:
    """An explicit cast of the user's program, which may have become superfluous."""
    dtype = eqn.params["new_dtype"]
    wide = dtype == _FLOAT32 and eqn.invars[0].aval.dtype == _FLOAT32
    return x if x.dtype == dtype or wide else programs.bind(eqn, [x])[0]


def _wide_product(eqn: Any, narrow: np.dtype, operands: list) -> jax.Array:
    """A product of 16-bit operands that yields float32, with 16-bit products in its derivative.

    JAX's own transpose would multiply the float32 cotangent by the 16-bit operand, which compiles
    to a float32 product. Here the tangent is the sum of 16-bit products, cast up.
    """

    @jax.custom_jvp
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return programs.bind(eqn, [a, b, *operands[2:]], preferred_element_type=_FLOAT32)[0]

    @product.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        (a, b), (da, db) = primals, tangents
        left, right = (
            programs.bind(eqn, [x, y, *operands[2:]], preferred_element_type=narrow)[0]
            for x, y in ((da, b), (a, db))
        )
        return product(a, b), left.astype(_FLOAT32) + right.astype(_FLOAT32)

    return product(*operands[:2])
