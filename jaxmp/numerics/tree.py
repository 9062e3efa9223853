"""Pytrees of numbers: cast them, ask whether they are finite, measure them, name their leaves."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")

# 2^80: float32 values times 2^-80 square to at most 2^96, so up to 2^31 of them sum without overflow.
_FAR = 2.0**80
# Below this sum of squares, squares that float32 flushed to zero could matter.
_NEAR_UNDERFLOW = 1e-20


def is_floating(leaf: Any) -> bool:
    """True for real floating-point arrays: NumPy, JAX, traced or abstract, of any width."""
    is_array = isinstance(leaf, np.ndarray | jax.Array | jax.ShapeDtypeStruct)
    return is_array and jnp.issubdtype(leaf.dtype, jnp.floating)


def cast_leaf(leaf: Any, dtype: Any) -> Any:
    """The leaf in `dtype` if it is a floating-point array, else the leaf itself."""
    if not is_floating(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(dtype=dtype)
    return leaf.astype(dtype)


def cast_floating(tree: T, dtype: Any) -> T:
    """The tree with each floating-point array cast to `dtype`.

    Integers, booleans, PRNG keys, complex numbers, Python scalars and other objects stay as they are.
    """
    return jax.tree.map(functools.partial(cast_leaf, dtype=dtype), tree)


def all_finite(tree: Any) -> jax.Array:
    """One boolean scalar: no leaf holds an infinity or a NaN. True for a tree without leaves."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.array(True)


def select_tree(pred: jax.Array, a: T, b: T) -> T:
    """`a` where the boolean scalar `pred` is true, else `b`, leaf by leaf.

    A select, not a `cond`: it fuses with the arithmetic that made its operands and keeps donated
    buffers reusable, where a conditional copies them.
    """
    pred = jnp.asarray(pred)
    if pred.ndim != 0 or pred.dtype != jnp.bool_:
        # AssertionError is what code written for jmp catches.
        raise AssertionError(
            f"select_tree: expected boolean scalar for `pred`, got shape {pred.shape} of {pred.dtype}."
        )
    return jax.tree.map(lambda x, y: _select(pred, x, y), a, b)


def _select(pred: jax.Array, x: Any, y: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            jax.lax.select(pred, jax.random.key_data(x), jax.random.key_data(y)),
            impl=jax.random.key_impl(x),
        )
    return jax.lax.select(pred, jnp.asarray(x), jnp.asarray(y))


class SumOfSquares(NamedTuple):
    """The sum of the squares of float32 numbers of any magnitude, in three scalings of x.

    Each is a plain sum, so those of several trees, microbatches or devices add up field by field.
    """

    down: jax.Array
    """Of x * 2^-80: finite exactly when every element is, for up to 2^31 of them."""
    plain: jax.Array
    """Of x: overflows from elements of 1.8e19 and loses those below 1e-19."""
    up: jax.Array
    """Of x * 2^80."""


def sum_of_squares(tree: Any) -> SumOfSquares:
    """The sum of squares over all floating leaves, in float32; zeros for a tree without any."""
    squares = [_squares(leaf) for leaf in jax.tree.leaves(tree) if is_floating(leaf)]
    if not squares:
        return SumOfSquares(*(jnp.zeros([], jnp.float32) for _ in SumOfSquares._fields))
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), squares)


def _squares(leaf: jax.Array) -> SumOfSquares:
    x = jnp.asarray(leaf).astype(jnp.float32)
    return SumOfSquares(*(jnp.sum(jnp.square(x * factor)) for factor in (1.0 / _FAR, 1.0, _FAR)))


def root_of(squares: SumOfSquares) -> jax.Array:
    """The square root, elementwise: inf if it exceeds float32's range, NaN or inf after such."""
    in_range = jnp.where(
        squares.plain < _NEAR_UNDERFLOW, jnp.sqrt(squares.up) / _FAR, jnp.sqrt(squares.plain)
    )
    return jnp.where(jnp.isfinite(squares.plain), in_range, jnp.sqrt(squares.down) * _FAR)


def norm_and_finite(tree: Any) -> tuple[jax.Array, jax.Array]:
    """The Euclidean norm over all leaves and whether all are finite, from one pass in float32.

    A plain float32 sum of squares overflows from elements of 1.8e19 and loses those below 1e-19, so
    three sums are kept, of `x`, `x * 2^-80` and `x * 2^80`, and the one in range is used (the idea of
    Blue's algorithm, ACM TOMS 4(1), 1978, without its branches). The sum of the small copies is finite
    exactly when every element is, for up to 2^31 elements, which makes the finite check free.

    Returns:
      The norm, a float32 scalar (inf if it exceeds float32's range, NaN or inf if a leaf is not
      finite), and a boolean scalar. For a tree without floating leaves: 0 and True.
    """
    squares = sum_of_squares(tree)
    return root_of(squares), jnp.isfinite(squares.down)


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm over all floating leaves, a float32 scalar right at any magnitude."""
    return norm_and_finite(tree)[0]


def path_string(key_path: Any) -> str:
    """A leaf's place as text, as in `decoder/layers_0/kernel`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Each leaf with its path as text, in the tree's own order."""
    return [(path_string(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def match_path(pattern: str, path: str) -> bool:
    """Whether a pattern names this path or a module above it.

    Patterns go segment by segment: `*` and `?` stay within a segment, `**` spans any number of them.
    `**/LayerNorm_*` matches `encoder/LayerNorm_0/scale`, since it names the module that holds it.
    """
    parts = path.split("/")
    wanted = pattern.split("/")
    return any(_match(wanted, parts[:end]) for end in range(1, len(parts) + 1))


def _match(wanted: list[str], parts: list[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_match(wanted[1:], rest) for rest in _suffixes(parts))
    return (
        bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and _match(wanted[1:], parts[1:])
    )


def _suffixes(parts: list[str]) -> Iterator[list[str]]:
    return (parts[start:] for start in range(len(parts) + 1))
