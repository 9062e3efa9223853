"""Fingerprints: against plain Python integers, over every bit, and over shardings."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmp.run.fingerprint import fingerprints

DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint32", "int32", "float16", "bfloat16", "float32"),
    *("float8_e4m3fn", "float8_e5m2", "int4", "complex64"),
]


def python_fingerprint(words: list[int]) -> str:
    """The docstring's formula, in integers without a width."""
    low32 = 2**32 - 1

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low32
        return x ^ (x >> 16)

    def one(seed):
        terms = (mix(w ^ mix((i * 0x9E3779B1 + seed) & low32)) for i, w in enumerate(words))
        return sum(terms) & low32

    return f"{one(0x243F6A88):08x}{one(0x85A308D3):08x}"


def plain_words(array: np.ndarray) -> list[int]:
    """The bits of an array as Python integers of up to 32 bits, row by row."""
    array = np.ascontiguousarray(array)
    size = array.dtype.itemsize
    words = array.reshape(-1).view(np.uint8 if size == 1 else np.uint16 if size == 2 else np.uint32)
    mask = 15 if array.dtype == ml_dtypes.int4 else 2**32 - 1
    return [int(word) & mask for word in words]


def example(dtype: str) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(5, 7)) * 3
    return np.clip(values, -8, 7).astype(np.dtype(jnp.dtype(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_formula_in_plain_integers(dtype):
    array = example(dtype) if dtype != "uint32" else example("int32").view(np.uint32)
    expected = python_fingerprint(plain_words(array))
    assert fingerprints([array, jnp.asarray(array)]) == [expected, expected]


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "complex128"])
def test_numpy_leaves_of_64_bits_keep_all_their_bits(dtype):
    array = example("float32").astype(dtype) + np.array(2).astype(dtype) ** 40
    assert fingerprints([array]) == [python_fingerprint(plain_words(array))]


def test_odd_shapes():
    scalar, empty = np.float32(1.5), np.zeros((0, 3), np.float32)
    long = np.arange(70000, dtype=np.int32)
    transposed = np.arange(12.0, dtype=np.float32).reshape(3, 4).T
    prints = fingerprints([scalar, empty, long, transposed])
    plain = [[0x3FC00000], [], list(range(70000)), plain_words(transposed.copy())]
    assert prints == [python_fingerprint(words) for words in plain]
    assert fingerprints([]) == []


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_every_single_bit_counts(dtype):
    array = example(dtype)[:2]
    bits = array.view(np.uint8)
    prints = set()
    for index in np.ndindex(bits.shape):
        for bit in range(8):
            flipped = bits.copy()
            flipped[index] ^= 1 << bit
            prints.update(fingerprints([flipped.view(array.dtype)]))
    assert fingerprints([array])[0] not in prints
    assert len(prints) == bits.size * 8


def test_order_and_the_sign_of_zero_count():
    array = np.arange(6, dtype=np.float32)
    different = [array, array[::-1], np.roll(array, 1), array.reshape(2, 3).T, -array]
    assert len(set(fingerprints(different))) == 5
    # The shape alone does not: it is stored and compared as such.
    assert len(set(fingerprints([array, array.reshape(2, 3)]))) == 1


def test_subnormals_infinities_and_payloads_of_nan_are_seen_as_bits():
    words = np.array([1, 2, 0x80000000, 0x7F800000, 0x7FC00000, 0x7FC00001, 0x7F800001], np.uint32)
    seen = fingerprints([jnp.asarray(words.view(np.float32))])
    assert seen == [python_fingerprint([int(word) for word in words])]


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxmp.run.fingerprint import fingerprints
array = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
half = array.astype(jax.numpy.bfloat16)
devices = jax.devices()
assert len(devices) == 8
for kind in (AxisType.Auto, AxisType.Explicit):
    for shape, spec in [((1, 1), P()), ((4, 1), P("a")), ((2, 4), P("a", "b")), ((8, 1), P(None, "a"))]:
        count = shape[0] * shape[1]
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(kind, kind), devices=devices[:count])
        place = NamedSharding(mesh, spec)
        print(*fingerprints([jax.device_put(array, place), jax.device_put(half, place)]))
"""


@pytest.mark.slow
def test_sharding_does_not_matter():
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ":".join(sys.path),
    }
    command = [sys.executable, "-c", SHARDED]
    lines = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    array = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    expected = fingerprints([array, array.astype(jnp.bfloat16)])
    assert lines == [" ".join(expected)] * 8


def test_the_value_is_for_ever():
    # Checkpoints on people's disks hold these; a change of the formula needs another name.
    assert fingerprints([np.arange(10, dtype=np.float32)]) == ["dd81a90174d0d3e9"]
    assert jax.config.jax_enable_x64 is False
