"""Probes change nothing forward or backward and count what a direct look at the gradient counts."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxmp.diagnose import magnitudes
from jaxmp.diagnose.probe import Probe, new_probe, probe
from jaxmp.numerics import formats as number_formats


def direct(g, format) -> list[int]:
    """The five counters, by comparison in float64."""
    fmt = number_formats.format_of(format)
    a = np.abs(np.asarray(g).astype(np.float64))
    finite = np.isfinite(a)
    flush = (a > 0) & (a <= fmt.flush_threshold)
    over = finite & (a >= fmt.overflow_threshold)
    small = finite & (a > fmt.flush_threshold) & (a < fmt.smallest_normal)
    return [int(part.sum()) for part in (a == 0, flush, small, over, ~finite)]


def hard(dtype) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = np.exp2(rng.uniform(-140, 127, 4000)) * rng.choice([-1, 1], 4000)
    edges = [0, 2.0**-25, 2.0**-24, 2.0**-14, 65504, 65519, 65520, np.inf, np.nan, 1e-44]
    with np.errstate(over="ignore"):
        return np.concatenate([x, edges]).astype(dtype)


measured = jax.jit(lambda x: magnitudes.measure(x, ()))


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__
)
@pytest.mark.parametrize("format", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_counters_and_histogram_equal_the_direct_ones_count_for_count(dtype, format):
    cotangent = hard(dtype)
    x = np.ones_like(cotangent)

    def probed(x, cotangent):
        out, pull = jax.vjp(probe, x, new_probe(format, histogram=True))
        return out, *pull(cotangent)

    out, passed, seen = jax.jit(probed)(x, cotangent)
    np.testing.assert_array_equal(out, x)
    bits = f"u{x.dtype.itemsize}"
    np.testing.assert_array_equal(np.asarray(passed).view(bits), cotangent.view(bits))
    assert seen.counters.tolist() == direct(cotangent, format)
    assert float(seen.total) == x.size
    np.testing.assert_array_equal(seen.histogram, measured(cotangent).binades)


def scanned(params, probes, x):
    def block(h, layer):
        weights, one = layer
        return jnp.tanh(probe(h, one) @ weights), None

    return jnp.sum(1e-6 * jax.lax.scan(jax.checkpoint(block), x, (params, probes))[0] ** 2)


def unrolled(params, x):
    """The gradients at each block's input, by zeros that are added there."""

    def loss(zeros):
        h = x
        for weights, zero in zip(params, zeros):
            h = jnp.tanh((h + zero) @ weights)
        return jnp.sum(1e-6 * h**2)

    return jax.grad(loss)([jnp.zeros_like(x) for _ in params])


def random_blocks():
    """Kernels of five blocks, and their input."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    return normal(5, 16, 16) / 8, normal(32, 16)


def test_a_scan_of_blocks_has_counts_for_each():
    params, x = random_blocks()
    seen = jax.jit(jax.grad(scanned, argnums=1))(params, new_probe("float16", 5), x)
    found = [direct(g, "float16") for g in jax.jit(unrolled)(params, x)]
    np.testing.assert_array_equal(seen.counters, found)
    assert found[0][1] > found[-1][1] > 0
    assert seen.shares["flush"][0] == found[0][1] / x.size


def on_a_mesh():
    """What this file does when it is run by itself, on four devices."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    params, x = random_blocks()

    def local(params, probes, x):
        probes, params = jax.lax.pcast((probes, params), "data", to="varying")
        return jax.lax.psum(jax.grad(scanned, argnums=1)(params, probes, x), "data")

    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    seen = jax.block_until_ready(jax.jit(run)(params, new_probe("float16", 5), x))
    expected = jax.jit(jax.grad(scanned, argnums=1))(params, new_probe("float16", 5), x)
    np.testing.assert_array_equal(seen.counters, expected.counters)


def test_on_a_mesh_devices_counts_add_up():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, __file__], env=env, check=True)


def program(fn, *args) -> str:
    """The compiled program without source lines and names."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    text = re.sub(r", metadata={[^}]*}", "", text)
    tables = r"^(HloModule|\d+ |File|Stack|Func)"
    return "\n".join(line for line in text.splitlines() if not re.match(tables, line))


def test_where_nobody_asks_the_compiled_program_is_identical():
    params = list(np.random.default_rng(0).standard_normal((3, 16, 16), np.float32))
    x = np.ones((8, 16), np.float32)

    def loss(params, x, look):
        for weights in params:
            x = jnp.tanh(look(x) @ weights)
        return jnp.mean(x**2)

    probed = lambda params, x: jax.grad(loss)(params, x, lambda h: probe(h, new_probe()))
    bare = lambda params, x: jax.grad(loss)(params, x, lambda h: h)
    assert program(probed, params, x) == program(bare, params, x)
    counted = lambda params, x: jax.grad(lambda c: loss(params, x, lambda h: probe(h, c)))(
        new_probe()
    )
    assert program(counted, params, x) != program(bare, params, x)


def test_a_probe_is_a_pytree_and_unknown_formats_are_refused():
    assert isinstance(jax.tree.map(lambda x: x, new_probe(histogram=True)), Probe)
    with pytest.raises(ValueError, match="not a floating-point format"):
        new_probe("float15")


if __name__ == "__main__":
    on_a_mesh()
