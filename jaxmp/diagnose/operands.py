"""One operation's operands and results in figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp.numerics import jaxpr as programs

ELEMENTWISE = frozenset(
    "add add_any sub mul div rem pow integer_pow square sqrt rsqrt cbrt exp exp2 log log1p expm1 tanh sin "
    "cos tan sinh cosh asin acos atan asinh acosh atanh atan2 logistic erf erfc erf_inv lgamma digamma "
    "max min clamp nextafter convert_element_type reduce_precision".split()
)
"""Operations of which each element is made of the operands' elements at the same place, or of scalars."""
_WIDENED = (ELEMENTWISE | {"dot_general", "conv_general_dilated", "reduce_sum", "cumsum"}) - {
    "reduce_precision"
}


@dataclasses.dataclass(frozen=True)
class Values:
    """An array in figures; the smallest and largest of its finite numbers, None if it has none."""

    shape: tuple[int, ...]
    dtype: str
    min: float | None
    max: float | None
    absmax: float | None
    nans: int
    infs: int
    beyond: float = 0.0
    """The share of its elements that are finite and larger than the largest number of the result's
    dtype, as the float32 operand of a conversion to float16 may have."""
    here: float | None = None
    """Its element at the place of the fault, if the operation works element by element."""

    def __str__(self) -> str:
        words = [f"{self.dtype}[{', '.join(map(str, self.shape))}]"]
        if self.min is not None:
            same = self.min == self.max
            words.append(f"of {self.min:.5g}" if same else f"from {self.min:.5g} to {self.max:.5g}")
        missing = [f"{n:,} {name}" for n, name in ((self.nans, "NaN"), (self.infs, "inf")) if n]
        text = " ".join(words) + (f" with {' and '.join(missing)}" if missing else "")
        return text + (f", {self.beyond:.2g} of it out of range" if self.beyond else "")


def floats_of(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The operands with a floating-point dtype, literals as arrays of the dtype that they stand for."""
    kept = [(x, a.aval) for x, a in zip(operands, eqn.invars) if programs.is_inexact(a.aval)]
    return [jnp.asarray(x, aval.dtype) for x, aval in kept]


def values_of(x: Any, at: tuple[int, ...] | None = None, limit: float = np.inf) -> Values:
    """An array in figures, `here` being its element `at` a place, `beyond` the share above `limit`."""
    array = np.asarray(x)
    wide = np.abs(array) if np.iscomplexobj(array) else array.astype(np.float64)
    finite, nans = wide[np.isfinite(wide)], int(np.isnan(wide).sum())
    size = np.abs(finite)
    return Values(
        shape=array.shape,
        dtype=array.dtype.name,
        min=float(finite.min()) if finite.size else None,
        max=float(finite.max()) if finite.size else None,
        absmax=float(size.max()) if finite.size else None,
        nans=nans,
        infs=wide.size - finite.size - nans,
        beyond=float(np.sum(size > limit)) / max(wide.size, 1),
        here=None if at is None else float(wide[at]),
    )


def report(eqn: Any, operands: Sequence[Any], result: Any, faulty: Any) -> dict[str, Any]:
    """`inputs`, `output`, `at` and `exact` of a `Blame` for the result's elements that are `faulty`."""
    inputs, bad = [np.asarray(x) for x in floats_of(eqn, operands)], np.asarray(faulty)
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
    limit, each = float(jnp.finfo(result.dtype).max), eqn.primitive.name in ELEMENTWISE
    place = lambda x: (at if x.ndim else ()) if each else None
    return {
        "inputs": tuple(values_of(x, place(x), limit) for x in inputs),
        "output": values_of(result, at),
        "at": at,
        "exact": _in_float32(eqn, operands, bad),
    }


def _in_float32(eqn: Any, operands: Sequence[Any], faulty: np.ndarray) -> float | None:
    """The largest magnitude that a 16-bit operation has on float32 operands where its result is faulty."""
    if eqn.primitive.name not in _WIDENED or eqn.outvars[0].aval.dtype.itemsize >= 4:
        return None
    wide = jnp.dtype("float32")
    dtypes = ("new_dtype", "preferred_element_type")
    changes = {key: wide for key in dtypes if eqn.params.get(key) is not None}
    floats = [programs.is_inexact(a.aval) for a in eqn.invars]
    widened = [jnp.asarray(x, wide) if is_float else x for x, is_float in zip(operands, floats)]
    exact = np.asarray(programs.bind(eqn, widened, **changes)[0])
    largest = float(np.max(np.abs(exact), where=faulty, initial=0))
    return largest if 0 < largest < np.inf else None
