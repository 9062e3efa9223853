"""Operations that autocast runs as one, for a derivative that keeps or reads less than theirs would.

Found in a program and its plan: a softmax for a product, a norm's (x - mean) scale + bias, a gelu or
silu, perhaps with the gate that it multiplies. What a GPU's compiler would else write to memory
twice is told apart, or told as one, for that compiler alone (`jax.lax.platform_dependent`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxmp.numerics import jaxpr as programs
from jaxmp.precision import autocast_rules as rules
from jaxmp.precision.autocast_demand import Demands
from jaxmp.precision.autocast_plan import Form, Plan


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
        found[place] = Group(functools.partial(_activation, run, inner), part.reads, part.inner)
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
        inner = [exponential, total, *parts]
        eqns = [self.eqns[i] for i in (*inner, place)]
        run = functools.partial(_softmax, eqns, self.demands.settings.dtype)
        return Group(run, [(exponential, 0)], inner)

    def normalized(self, place: int) -> Group | None:
        """16-bit activations less a mean, times a scale that is one for all that share the mean."""
        eqn = self.eqns[place]
        for i, scale in enumerate(reversed(eqn.invars)):
            index = self.made_by(eqn.invars[i], frozenset({"sub"}), 1)
            if index is None or not self.is_wide(place):
                continue
            is_low = self.steps[index].operands[0] == Form.LOW
            if is_low and self.shares(index, scale):
                run = functools.partial(_normalized, [self.eqns[index], eqn])
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
            run = functools.partial(_normalized, [self.eqns[i] for i in (*inner, place)])
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


def _softmax(eqns: Sequence, dtype: np.dtype, x: jax.Array) -> jax.Array:
    """A softmax, summed in float32, that keeps no float32 array as large as x for its derivative.

        y = e / s,    dy = e (dx - sum(e dx) / s) / s,    e = exp(x),    s = sum(e)

    `eqns` are the exponential, its sum, what repeats that sum, and the division. Both e and y are
    kept, in 16 bits: arithmetic reads e, products read y. Were y read by both, a TPU's compiler would
    copy it from the layout of the one into that of the other in every round of a loop. And all of it
    is made of e as rounded: were e summed or divided before, that compiler would keep it in float32.
    """
    exponential, *sums, division = eqns

    def total(terms: jax.Array) -> jax.Array:
        for eqn in sums:
            (terms,) = programs.bind(eqn, [terms])
        return terms

    def parts(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        above = programs.convert(programs.bind(exponential, [x])[0], dtype)
        wide = _wide(above)
        below = total(wide)
        (y,) = programs.bind(division, [wide, below])
        return programs.convert(y, dtype), above, below

    @jax.custom_jvp
    def softmax(x: jax.Array) -> jax.Array:
        return parts(x)[0]

    @softmax.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        y = parts(*primals)[0]
        _, above, below = parts(_apart(*primals))
        dx = programs.convert(tangents[0], dtype)
        mean = total(_wide(above * dx)) / below
        moved = (_wide(dx) - mean) / below
        return y, above * programs.convert(moved, dtype)

    return softmax(x)


def _normalized(eqns: Sequence, *operands: jax.Array) -> jax.Array:
    """(x - mean) scale + bias, whose cotangent g is summed once for the mean and the bias.

    JAX would sum -g scale for the mean, g for the bias and g (x - mean) for the scale. The scale is
    the same in all terms of the first sum; taken out of it, it leaves two sums for each channel of
    a BatchNorm. `eqns` are the difference, the product and, if there is a bias, the sum.
    """
    difference, product, *shift = eqns

    def parts(x: jax.Array, mean: jax.Array, scale: jax.Array, *bias: jax.Array) -> list:
        (centered,) = programs.bind(difference, [x, mean])
        (y,) = programs.bind(product, [centered, scale])
        for eqn in shift:
            (y,) = programs.bind(eqn, [y, *bias])
        return [y, centered]

    @jax.custom_jvp
    def normalized(*operands: jax.Array) -> jax.Array:
        return parts(*operands)[0]

    @normalized.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        scale = primals[2]
        dx, dmean, dscale, *dbias = tangents
        y, centered = parts(*primals)
        moved = sum(dbias, -(dmean * scale))
        repeated = jax.lax.platform_dependent(
            moved, dscale, centered, cuda=_affine_as_one, default=_affine
        )
        return y, dx * scale + repeated

    return normalized(*operands)


def _affine(term: jax.Array, factor: jax.Array, x: jax.Array) -> jax.Array:
    """term + factor x. The transpose sums a cotangent g, and g x."""
    return term + factor * x


def _affine_as_one(term: jax.Array, factor: jax.Array, x: jax.Array) -> jax.Array:
    """The same, but the transpose sums both as the parts of one complex number.

    A GPU's compiler fuses what makes g (the derivative of a relu) into all that read g, or writes g.
    It joins sums after that: two of them make it write g, one is worth reading again what makes it.
    """
    shape = np.broadcast_shapes(term.shape, factor.shape)
    both = jax.lax.complex(*(jnp.broadcast_to(v, shape) for v in (term, factor)))
    both = jnp.broadcast_to(both, x.shape)
    return jnp.real(both) + jnp.imag(both) * x


def _activation(run: Callable, part: Plan, *operands: jax.Array) -> jax.Array:
    """x times something of x, perhaps times a gate: they alone are kept for its derivative."""

    @jax.custom_jvp
    def activation(*operands: jax.Array) -> jax.Array:
        return run(part, operands)[0]

    @activation.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        again = lambda x, *gate: run(part, [_apart(x), *gate])[0]
        return run(part, primals)[0], jax.jvp(again, primals, tangents)[1]

    return activation(*operands)


def _apart(x: jax.Array) -> jax.Array:
    """x for the backward pass, which a GPU's compiler does not see to be the x of the forward pass.

    Where both passes read one sum, it writes a kernel for that sum, which reads all of x once more,
    and what is dear to compute it writes once for both; by itself each pass computes it on its way. A
    TPU's compiler keeps exponentials, and shares them.
    """
    one = np.ones((), x.dtype)
    hidden = lambda: jax.lax.optimization_barrier(one)
    return x * jax.lax.platform_dependent(cuda=hidden, default=lambda: one)


def _wide(x: jax.Array) -> jax.Array:
    return programs.convert(x, np.dtype("float32"))
