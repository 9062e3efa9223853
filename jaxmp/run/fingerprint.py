"""Fingerprints of arrays: 64 bits that tell whether a leaf came back from disk as it left memory.

Every element gives one or more 32-bit words w at row-major positions i, and with wrap-around
arithmetic in uint32, for two seeds s,

    F_s = sum over i of mix(w_i XOR mix(i * 0x9E3779B1 + s))    (mod 2^32)

- `mix` is a bijection, so changing any one word (any one bit) changes F_s with certainty; several
  changes at once, or elements that trade places, escape both sums with a chance of about 2^-64.
- Integer sums do not depend on their order: neither sharding nor compiler changes the value.
- It looks at bits: -0.0 and 0.0 differ, and so do two NaNs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmp.training import mesh as meshes

_SEEDS = (0x243F6A88, 0x85A308D3)  # the first digits of pi, as good as any
_GOLDEN = 0x9E3779B1  # odd, so i * _GOLDEN takes 2^32 different values


def fingerprints(leaves: Iterable[Any]) -> list[str]:
    """One string of 16 hexadecimal digits for each array (JAX, of any sharding, or NumPy).

    Of typed PRNG keys pass the `jax.random.key_data`. An array without elements gives zeros.
    """
    # All are dispatched before the first is waited for.
    sums = [meshes.in_turn(_fingerprint)(_numpy_words(leaf)) for leaf in leaves]
    return [f"{int(high):08x}{int(low):08x}" for high, low in jax.device_get(sums)]


def _numpy_words(leaf: Any) -> Any:
    """NumPy's 64-bit types cut into uint32, since JAX without x64 would round them."""
    if isinstance(leaf, jax.Array):
        return leaf
    leaf = np.asarray(leaf)
    if leaf.dtype.itemsize < 8:
        return leaf
    words = np.ascontiguousarray(leaf).reshape(-1).view(np.uint32)
    return words.reshape(*leaf.shape, leaf.dtype.itemsize // 4)


@jax.jit
def _fingerprint(array: jax.Array) -> jax.Array:
    words = _words(array)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        # Row-major, built without a reshape, which would move a sharded array between devices.
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    position = position * jnp.uint32(_GOLDEN)
    terms = [_mix(words ^ _mix(position + jnp.uint32(seed))) for seed in _SEEDS]
    return jnp.stack([jnp.sum(term, dtype=jnp.uint32) for term in terms])


def _words(array: jax.Array) -> jax.Array:
    """The array's bits as uint32: one word an element, or a last axis of words above 32 bits."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([jnp.real(array), jnp.imag(array)], axis=-1)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    info = jnp.iinfo if jnp.issubdtype(array.dtype, jnp.integer) else jnp.finfo
    bits = info(array.dtype).bits
    if bits == 64:
        return lax.bitcast_convert_type(array, jnp.uint32)
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection in which every bit reaches every other: MurmurHash3's finalizer (A. Appleby)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
