"""The leaves of a state as plain arrays that any checkpoint format can hold, and back.

A typed PRNG key becomes its uint32 words and the name of its generator; a Python number becomes an
array of no dimensions. On the way back each leaf takes the form of the one it replaces: JAX with
its sharding, NumPy, Python number, weakly typed or not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PYTHON_NUMBERS = (bool, int, float, complex)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What must agree between a stored leaf and a wanted one."""

    shape: tuple[int, ...]
    dtype: str
    """NumPy's name of the dtype, or `key<threefry2x32>` for PRNG keys of that generator."""

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def kind_of(leaf: Any) -> Kind:
    """Shape and dtype of a leaf, concrete or abstract; ValueError for a string or other object."""
    if is_key(leaf):
        return Kind(tuple(leaf.shape), f"key<{_generator(leaf)}>")
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return Kind(tuple(leaf.shape), str(leaf.dtype))
    array = np.asarray(leaf)
    if array.dtype.kind in "OUSMm":
        raise ValueError(f"a {type(leaf).__name__}, and a checkpoint holds arrays and numbers only")
    return Kind(array.shape, str(array.dtype))


def is_key(leaf: Any) -> bool:
    """True for typed PRNG keys (`jax.random.key`), concrete or abstract."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def to_array(leaf: Any) -> jax.Array | np.ndarray:
    """The leaf's bits as an array that is no key and no Python number."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def to_request(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """What to ask a reader for, so that its answer fits `leaf`: shape, dtype and sharding."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.empty_like(np.asarray(leaf))
    words = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    # Without a sharding the reader takes the stored one, which may name devices not here.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)


def from_array(leaf: Any, array: Any) -> Any:
    """The array in the form of `leaf`, whose kind it has; None stands for one without elements."""
    if array is None:
        array = to_request(leaf)
        if isinstance(array, jax.ShapeDtypeStruct):
            array = jnp.zeros(array.shape, array.dtype, device=array.sharding)
    if is_key(leaf):
        return jax.random.wrap_key_data(array, impl=_generator(leaf))
    if isinstance(leaf, _PYTHON_NUMBERS) and not isinstance(leaf, np.generic):
        return np.asarray(array).item()
    if isinstance(leaf, np.generic):
        return np.asarray(array)[()]
    return _weakly_typed(array) if getattr(leaf, "weak_type", False) else array


def _generator(keys: Any) -> Any:
    names = []
    jax.eval_shape(lambda k: names.append(jax.random.key_impl(k)), keys)
    return names[0]


def _weakly_typed(array: jax.Array) -> jax.Array:
    """The array with the weak type of a Python number, which decides what later promotions give.

    Nothing public turns it on for data of any shape, but a program compiled for a weakly typed
    argument has a weakly typed result whatever it is fed.
    """
    weak = jax.ShapeDtypeStruct(array.shape, array.dtype, weak_type=True, sharding=array.sharding)
    return jax.jit(lambda x: x).lower(weak).compile()(array)
