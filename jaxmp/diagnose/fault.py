"""What a search for a number that is not finite found, as plain data and in a paragraph."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jaxmp.diagnose.operands import Values


@dataclasses.dataclass(frozen=True)
class Blame:
    """Where numbers stopped being finite; `str` says it in a paragraph."""

    kind: str
    """"operation"; or "argument" or "constant", which was not finite to begin with."""
    primitive: str
    """JAX's name of the operation, such as "exp"; "" for an argument or a constant."""
    path: str
    """The module path, such as "GPT/layers/Dense_0", or the argument's, such as "0/Dense_0/kernel"; ""
    outside of modules and named scopes."""
    direction: str
    """"forward" or "backward"; what is computed for gradients alone is backward wherever it is done.
    "" for an argument or a constant."""
    source: str
    """The user's line, "model.py:41 (attention)"; "" if it is unknown."""
    loops: tuple[str, ...]
    """The loops around it, outermost first: "scan" or "while"."""
    iterations: tuple[int, ...]
    """For each of them the number of the iteration, from 0. A scan in reverse counts down, so that the
    number names the same slice, the same layer, forward and backward."""
    inputs: tuple[Values, ...]
    """The floating-point operands."""
    output: Values
    """The result that is not finite."""
    at: tuple[int, ...]
    """The place of its first element that is not finite and for which this operation is to blame."""
    reads: tuple[str, ...] = ()
    """The arguments that are operands, as they are or moved: a layer's parameters, the batch."""
    exact: float | None = None
    """The largest magnitude that the same operation gives in float32, where the format is narrower."""
    origin: str = ""
    """What first gave an infinity that did no harm until this operation made it NaN."""
    became_nan: str = ""
    """Where the infinity was first turned into NaN."""

    @property
    def cause(self) -> str:
        """A likely cause in a few words, and what helps."""
        return _cause(self)

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `json.dump` takes; numbers that are not finite as strings."""
        return {**_plain(dataclasses.asdict(self)), "cause": self.cause, "paragraph": str(self)}

    def paragraph(self) -> str:
        """What happened, where, with which numbers, and what helps."""
        place = f" at {list(self.at)}" if self.at else ""
        if self.kind != "operation":
            what = f"{self.operation} is not finite to begin with: {self.output}, first{place}."
            return " ".join([what[0].upper() + what[1:], *self._rest(), self.cause])
        here = " and ".join(_number(v.here) for v in self.inputs if v.here is not None)
        made = _number(self.output.here) + (f" of {here}" if here else "")
        operands = "; ".join(map(str, self.inputs)) or "no floating-point numbers"
        reads = f" It reads argument {' and '.join(self.reads)}." if self.reads else ""
        sentences = [
            f"The first operation to give a number that is not finite is {self.operation}.",
            f"It made {made}{place}. Its operands: {operands}; its result: {self.output}.{reads}",
            *self._rest(),
            self.cause,
        ]
        return " ".join(sentences)

    def __str__(self) -> str:
        return self.paragraph()

    @property
    def operation(self) -> str:
        """The operation and its place: "`exp` in GPT/layers at model.py:41 (act), forward, …"."""
        if self.kind != "operation":
            return f"the {self.kind} {self.path}"
        counted = zip(self.iterations, self.loops)
        words = [f"in iteration {number} of the {loop}" for number, loop in counted]
        inside = f" in {self.path}" if self.path else ""
        line = f" at {self.source}" if self.source else ""
        return ", ".join([f"`{self.primitive}`{inside}{line}", self.direction, *words])

    def _rest(self) -> list[str]:
        sentences = []
        if self.origin:
            sentences.append(
                f"Its infinite input comes from {self.origin}, and did no harm before: what `where` "
                "leaves out forward still is a factor backward."
                if self.direction == "backward"
                else f"Its infinite input comes from {self.origin}, and did no harm before."
            )
        if self.became_nan:
            sentences.append(f"It became NaN in {self.became_nan}.")
        return sentences


def _number(x: float | None) -> str:
    return "a number that is not finite" if x is None else "NaN" if x != x else f"{x:.6g}"


_DOMAINS = {
    "asin": "outside of [-1, 1]",
    "acos": "outside of [-1, 1]",
    "acosh": "below 1",
    "atanh": "at or beyond 1",
    "lgamma": "at 0 or a negative integer",
    "digamma": "at 0 or a negative integer",
    "erf_inv": "at or beyond 1",
}


def _cause(blame: Blame) -> str:
    if blame.kind == "argument":
        return (
            "Look at what made it: for a parameter the update before, for a batch the data; nothing "
            "in this program is to blame."
        )
    if blame.kind == "constant":
        return "It is written into the program or captured by it; nothing computed is to blame."
    if blame.primitive == "gather":
        return "An index out of bounds is filled with NaN: compare the indices with the table's length."
    here = [v.here for v in blame.inputs]
    rule = _RULES.get(blame.primitive)
    found = rule(blame, *here) if rule and None not in here else None
    found = found or _outside(blame, here) or _of_infinities(blame, here) or _overflow(blame)
    return found or "Look at the values that went in."


def _outside(blame: Blame, here: list) -> str | None:
    if blame.primitive in _DOMAINS and here and here[0] is not None:
        return (
            f"{blame.primitive} of {here[0]:g} lies {_DOMAINS[blame.primitive]}; clip its argument."
        )
    return None


def _of_infinities(blame: Blame, here: list) -> str | None:
    if not any(v.infs for v in blame.inputs) or not math.isnan(blame.output.here or 0.0):
        return None
    numbers = [x for x in here if x is not None]
    if blame.primitive == "mul" and 0 in numbers:
        return (
            "0 times an infinity is NaN: keep the argument of what is left out inside its domain as well, "
            "f(where(ok, x, safe)), not only its result."
        )
    if blame.primitive in ("sub", "add", "add_any", "reduce_sum"):
        return (
            "The difference of two infinities is NaN: a row of which everything is masked, or an "
            "overflow before; mask with a large finite number, or leave such rows out."
        )
    return "An infinite input made it NaN."


def _overflow(blame: Blame) -> str | None:
    out = blame.output
    if out.infs == 0 and not out.dtype.startswith("float8"):
        return None
    limit = float(jnp.finfo(out.dtype).max)
    sizes = [abs(v.here) for v in blame.inputs if v.here is not None]
    at_conversion = blame.primitive == "convert_element_type" and sizes
    size = sizes[0] if at_conversion else blame.exact
    value = f"a value of {size:.6g}" if size and size > limit else "its result"
    remedy = (
        "lower the loss scale, compute this in float32 (an override of the policy, "
        "`jaxmp.full_precision`), or use bfloat16."
        if blame.direction == "backward"
        else "compute this in float32 (an override of the policy, `jaxmp.full_precision`) or "
        "bfloat16, or make its operands smaller."
    )
    if out.dtype in ("float32", "float64", "bfloat16"):
        remedy = (
            "something upstream grew without bound: normalise it, clip, or lower the learning rate."
        )
    return f"Overflow of {out.dtype}: {value} is above {limit:.6g}; {remedy}"


def _division(blame: Blame, numerator: float, divisor: float) -> str | None:
    if divisor != 0:
        return None
    if blame.direction == "backward" and numerator == 0.5:
        return (
            "Division by zero, as in the derivative of a square root (or norm) at 0: add an epsilon "
            "inside the root, or sqrt(where(x > 0, x, 1)) with a where around it."
        )
    zero = "0 / 0 is NaN" if numerator == 0 else "Division by zero"
    where = ", as in the derivative of log at 0" if blame.direction == "backward" else ""
    return (
        f"{zero}{where}: add an epsilon to the divisor, or x / where(ok, divisor, 1); a where "
        "around the quotient alone does not save the gradient."
    )


def _logarithm(blame: Blame, x: float) -> str | None:
    if x == 0:
        return "log of 0: use log_softmax, log1p, or log(maximum(x, epsilon))."
    return f"log of a negative number ({x:g})." if x < 0 else None


def _logarithm1p(blame: Blame, x: float) -> str | None:
    return f"log1p of {x:g}: its argument must be above -1." if x <= -1 else None


def _root(blame: Blame, x: float) -> str | None:
    if x < 0:
        return (
            f"{blame.primitive} of a negative number ({x:g}): rounding may have made it so; use "
            "maximum(x, 0)."
        )
    return "1 / sqrt(0): add an epsilon inside the root." if x == 0 else None


def _power(blame: Blame, x: float, exponent: float) -> str | None:
    if x == 0 and exponent < 0:
        what = ", as in the derivative of a power at 0" if blame.direction == "backward" else ""
        return f"0 to the power {exponent:g}{what}: add an epsilon to the base."
    if x < 0 and exponent != round(exponent):
        return f"A negative number ({x:g}) to the power {exponent:g} is NaN."
    return None


def _integer_power(blame: Blame, x: float) -> str | None:
    return "0 to a negative power: add an epsilon to the base." if x == 0 else None


def _exponential(blame: Blame, x: float) -> str | None:
    base = 2.0 if blame.primitive == "exp2" else math.e
    limit = math.log(float(jnp.finfo(blame.output.dtype).max), base)
    if not x > limit:
        return None
    return (
        f"{blame.primitive} of {x:g} overflows {blame.output.dtype}, which ends at {blame.primitive} of "
        f"{limit:.4g}: subtract the maximum first (softmax, logsumexp), or clip the argument."
    )


_RULES = {
    "div": _division,
    "log": _logarithm,
    "log1p": _logarithm1p,
    "sqrt": _root,
    "rsqrt": _root,
    "pow": _power,
    "integer_pow": _integer_power,
    "exp": _exponential,
    "exp2": _exponential,
    "expm1": _exponential,
}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
