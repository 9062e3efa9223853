"""The published table of autocast: for each JAX primitive, the precision it runs in, and why."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Kind(enum.Enum):
    """What autocast does with the float32 operands of a primitive."""

    LOW = "low"
    """Operands are cast to 16 bits; the result is 16-bit."""
    FLOAT32 = "float32"
    """Operands are cast up; computed in float32."""
    WIDEST = "widest"
    """Computed in the widest of what the operands arrive in; constants and parameters adapt."""
    MOVES = "pass-through"
    """Moves data: the result is what the operands are."""
    EACH = "each"
    """Each result has the dtype of the operand in the same place."""
    ORIGINAL = "original"
    """Runs in the dtypes that it was written in."""
    ENTERED = "entered"
    """Holds a program, which is autocast in its turn."""


class Rule(NamedTuple):
    """A decision and its reason."""

    kind: Kind
    reason: str


def _family(kind: Kind, reason: str, names: str) -> dict[str, Rule]:
    return {name: Rule(kind, reason) for name in names.split()}


TABLE: dict[str, Rule] = {
    **_family(
        Kind.LOW,
        "a matrix product: tensor cores multiply 16 bits and accumulate in float32",
        "dot_general ragged_dot_general conv_general_dilated",
    ),
    **_family(
        Kind.FLOAT32,
        "a long sum or product: 16 bits would lose its small terms, or overflow",
        "reduce_sum reduce_prod reduce_window_sum cumsum cumprod cumlogsumexp "
        "scatter-add scatter-sub scatter-mul",
    ),
    **_family(
        Kind.FLOAT32,
        "magnifies the rounding of its operand, or leaves the range of 16 bits",
        "exp exp2 expm1 log log1p log2 pow sqrt rsqrt cbrt rem nextafter sin cos tan asin acos atan "
        "atan2 sinh cosh asinh acosh atanh polynomial",
    ),
    **_family(
        Kind.FLOAT32,
        "a special function, written for float32",
        "erf_inv lgamma digamma polygamma igamma igammac igamma_grad_a bessel_i0e bessel_i1e zeta "
        "regularized_incomplete_beta random_gamma random_gamma_grad",
    ),
    **_family(
        Kind.WIDEST,
        "cheap elementwise arithmetic: it is bound by the bytes it reads and writes",
        "add add_any sub mul div max min neg abs sign floor ceil round clamp select_n copysign "
        "tanh logistic erf erfc square integer_pow one_minus_square",
    ),
    **_family(
        Kind.WIDEST,
        "compares what there is: mixed operands are compared in float32, where the cast is exact",
        "lt le gt ge lt_to le_to is_finite",
    ),
    **_family(
        Kind.WIDEST,
        "tests for equality: in 16 bits if one side is, so that what was equal still is",
        "eq ne eq_to",
    ),
    **_family(
        Kind.MOVES,
        "moves or picks values without arithmetic",
        "reshape transpose broadcast_in_dim squeeze expand_dims rev slice dynamic_slice gather "
        "concatenate pad dynamic_update_slice scatter scatter-max scatter-min stop_gradient name "
        "reduce_max reduce_min reduce_window_max reduce_window_min cummax cummin copy tile stack "
        "select_and_gather_add select_and_scatter_add split unstack argmax argmin top_k "
        "sharding_constraint reshard mesh_cast pcast pvary pbroadcast copy_p",
    ),
    **_family(
        Kind.EACH,
        "moves several values at once, each in the dtype it has",
        "sort optimization_barrier psum psum_invariant psum2 pmax pmin ppermute all_gather "
        "all_gather_invariant all_to_all reduce_scatter device_put convert_element_type",
    ),
    **_family(
        Kind.ORIGINAL,
        "linear algebra: decompositions and solvers need float32",
        "cholesky cholesky_update eig eigh lu qr geqrf geqp3 svd schur hessenberg householder_product ormqr "
        "triangular_solve tridiagonal tridiagonal_solve symmetric_product lu_pivots_to_permutation "
        "fft custom_linear_solve",
    ),
    **_family(
        Kind.ORIGINAL,
        "integers, booleans, keys and random bits have no precision to choose",
        "and or xor not shift_left shift_right_arithmetic shift_right_logical population_count clz mulhi "
        "reduce_and reduce_or reduce_xor random_bits random_seed random_split random_fold_in "
        "random_wrap random_unwrap random_clone threefry2x32 rng_bit_generator rng_uniform "
        "axis_index platform_index iota partition_id",
    ),
    **_family(
        Kind.ORIGINAL,
        "the user asked for exactly these bits",
        "bitcast_convert_type reduce_precision complex real imag conj",
    ),
    **_family(
        Kind.ORIGINAL,
        "holds a computation over its own dtypes",
        "reduce reduce_window select_and_scatter approx_top_k pallas_call custom_partitioning "
        "custom_lin ffi_call triton_kernel_call",
    ),
    **_family(
        Kind.ORIGINAL,
        "an effect, a reference or a token: seen as the user wrote it",
        "debug_callback debug_print pure_callback io_callback create_token after_all get swap addupdate "
        "ref_addupdate new_ref empty_ref empty2 ragged_all_to_all dce_sink stage inspect_sharding "
        "debug_inspect_sharding run_state",
    ),
    **_family(
        Kind.ENTERED,
        "holds a program, which is autocast in its turn",
        "jit pjit remat2 checkpoint shard_map closed_call call core_call core_closed_call "
        "custom_jvp_call custom_vjp_call cond scan while",
    ),
    "eval_jaxpr": Rule(Kind.ORIGINAL, "a program evaluated as it is"),
}
UNKNOWN = Rule(Kind.ORIGINAL, "no rule is known for it")

# Results that are no wider in range than their operands, so that a product may reach through them.
REACHES_THROUGH = frozenset("max min neg select_n copy abs clamp".split())
# A value written as one of these plus something small is a running value (a weight, a moment).
ADDITIVE = frozenset("add add_any sub max min neg select_n copy clamp".split())
SCALES = frozenset({"mul", "div"})
# float16 overflows at 65504: powers stay in float32 there, while bfloat16 has float32's range.
POWERS = frozenset({"square", "integer_pow"})
PERIODIC = frozenset({"sin", "cos", "tan"})
# A rounding of their operand can become an error of any size.
MAGNIFIES = frozenset("log log1p log2 sqrt rsqrt cbrt pow atanh acosh erf_inv lgamma".split())
# A rounding of their operand can't grow, and a rounding of the result is as small beside it.
EXPONENTIALS = frozenset({"exp"})
# What gives a sum over rows the shape that divides them.
REPEATS = frozenset("broadcast_in_dim reshape expand_dims".split())
# Bounded and dear to compute twice: their 16-bit results are kept, as a cap of logits is.
SATURATES = frozenset("tanh logistic erf".split())
EQUALITIES = frozenset("eq ne eq_to".split())
COMPARES = frozenset("eq ne lt le gt ge eq_to lt_to le_to is_finite".split())
# Activations that are averaged on their way to a product are kept in 16 bits.
POOLS = frozenset({"reduce_sum", "reduce_window_sum"})
# Reading rows of a table makes an activation out of a parameter.
READS_ROWS = frozenset({"gather", "dynamic_slice"})
# Dear to compute: XLA does it once for all that read the result, and so may write it to memory.
DEAR = SATURATES | {"erfc"}
# Each number of the result is made of one number of each operand.
ARITHMETIC = frozenset(
    "add add_any sub mul div max min neg abs sign floor ceil round clamp select_n copysign tanh "
    "logistic erf erfc square integer_pow one_minus_square exp exp2 expm1 log log1p log2 pow sqrt rsqrt "
    "cbrt sin cos convert_element_type copy".split()
)
# A loop computes these again for its backward pass, from the products, sums and rounded parameters
# that it keeps. XLA does so where there is no loop; what one round leaves to another is fixed by JAX.
COMPUTED_AGAIN = ARITHMETIC | frozenset(
    "broadcast_in_dim reshape squeeze expand_dims transpose stop_gradient".split()
)

_NAMES = {kind.value: kind for kind in (Kind.LOW, Kind.FLOAT32, Kind.WIDEST, Kind.ORIGINAL)}


def read_rules(rules: dict[str, str] | None) -> dict[str, Rule]:
    """The table with a user's changes, a mapping from primitive names to decisions.

    Raises:
      ValueError: a decision is not one of low, float32, widest, original, or would leave a
        primitive that holds programs, or only moves data, without a meaning.
    """
    changed = {}
    for name, decision in (rules or {}).items():
        if decision not in _NAMES:
            raise ValueError(
                f"The rule for {name!r} is {decision!r}; it should be one of {', '.join(_NAMES)}."
            )
        if TABLE.get(name, UNKNOWN).kind is Kind.ENTERED and decision != "original":
            raise ValueError(
                f"{name!r} holds a program, so a precision for it has no meaning: give rules for "
                "the primitives inside, or overrides for a module path."
            )
        changed[name] = Rule(_NAMES[decision], "asked for by `rules`")
    return {**TABLE, **changed}


def survives(value: Any, dtype: np.dtype) -> bool:
    """Whether a float32 constant keeps its meaning in 16 bits: it neither overflows nor underflows."""
    info, magnitude = jnp.finfo(dtype), abs(float(saturated(value, dtype)))
    in_range = float(info.tiny) <= magnitude <= float(info.max)
    return not np.isfinite(magnitude) or magnitude == 0 or in_range


def saturated(value: Any, dtype: np.dtype) -> Any:
    """A constant; if it is finite and bfloat16 would make it infinite, the largest that it holds.

    float32's minimum, with which masks are filled, is beyond bfloat16's by less than a rounding. As
    -infinity it would make NaNs of rows that are masked altogether.
    """
    info = jnp.finfo(dtype)
    as_far = info.maxexp == jnp.finfo("float32").maxexp
    beyond = as_far and float(info.max) < abs(float(value)) < np.inf
    return np.float32(np.copysign(float(info.max), float(value))) if beyond else value


def as_markdown() -> str:
    """The table for people: one row for each family of primitives."""
    families: dict[Rule, list[str]] = {}
    for name, rule in TABLE.items():
        families.setdefault(rule, []).append(name)
    rows = [
        f"| {rule.kind.value} | {rule.reason} | {', '.join(f'`{n}`' for n in names)} |"
        for rule, names in families.items()
    ]
    return "\n".join(["| runs in | because | primitives |", "|---|---|---|", *rows]) + "\n"
