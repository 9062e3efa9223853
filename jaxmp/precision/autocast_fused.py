"""Operations that autocast runs as one, for a derivative that keeps or reads less than theirs would."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

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


def groups(plan: Plan, demands: Demands) -> dict[int, Group]:
    """The softmaxes and norms of a program that are run as one, by the place of their last operation."""
    finder = _Finder(plan, demands)
    find = {"div": finder.softmax, "mul": finder.scaled_difference}
    found = {}
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

    def scaled_difference(self, place: int) -> Group | None:
        """16-bit activations less a mean, times a scale that is one for all that share the mean."""
        eqn = self.eqns[place]
        for i, scale in enumerate(reversed(eqn.invars)):
            index = self.made_by(eqn.invars[i], frozenset({"sub"}), 1)
            if index is not None and self.is_wide(place) and self.shares(index, scale):
                run = functools.partial(_scaled_difference, self.eqns[index], eqn)
                return Group(run, [(index, 0), (index, 1), (place, 1 - i)], [index])
        return None

    def shares(self, place: int, scale: Any) -> bool:
        """Whether 16-bit activations share what is taken from them, and those that do share a scale."""
        x, mean = self.eqns[place].invars
        if any(map(programs.is_literal, (x, mean, scale))):
            return False
        if self.steps[place].operands[0] != Form.LOW or x.aval.shape == mean.aval.shape:
            return False
        shapes = zip(x.aval.shape, mean.aval.shape, scale.aval.shape)
        return all(m == n or (m == 1 and s == 1) for n, m, s in shapes)


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


def _scaled_difference(
    difference: Any, product: Any, x: jax.Array, mean: jax.Array, scale: jax.Array
) -> jax.Array:
    """(x - mean) scale, whose cotangent g is summed once for the mean and for a bias added to it.

    JAX would sum -g scale for the mean, g for the bias and g (x - mean) for the scale. The scale is
    the same in all terms of the first sum; taken out of it, it leaves two sums for each channel of
    a BatchNorm, which XLA fuses with what makes g.
    """

    @jax.custom_jvp
    def scaled(x: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
        (centered,) = programs.bind(difference, [x, mean])
        return programs.bind(product, [centered, scale])[0]

    @scaled.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        (x, mean, scale), (dx, dmean, dscale) = primals, tangents
        (centered,) = programs.bind(difference, [x, mean])
        (y,) = programs.bind(product, [centered, scale])
        return y, dx * scale + centered * dscale + -(dmean * scale)

    return scaled(x, mean, scale)


def _apart(x: jax.Array) -> jax.Array:
    """x for the backward pass, which a GPU's compiler does not see to be the x of the forward pass.

    Where both passes read one sum, it writes a kernel for that sum, which reads all of x once more;
    by itself each pass takes the sum on its way. A TPU's compiler keeps exponentials, and shares them.
    """
    hidden = lambda: jax.lax.optimization_barrier(np.float32(1))
    return x * jax.lax.platform_dependent(cuda=hidden, default=lambda: np.float32(1))


def _wide(x: jax.Array) -> jax.Array:
    return programs.convert(x, np.dtype("float32"))
