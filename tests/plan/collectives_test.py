"""Exchanges counted in programs whose exchanges are known: four CPU devices in a process of their own."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxmp.plan import collectives, hlo

jax.config.update("jax_num_cpu_devices", 4)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

def count(fn, *args, specs):
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    text = jax.jit(fn, in_shardings=shardings).lower(*args).compile().as_text()
    found = collectives.collectives(hlo.parse(text))
    table = collectives.by_kind_and_dtype(found)
    return [[*key, *value] for key, value in table.items()]

def gathered(x):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P())) * 2

def mapped(fn):
    return jax.shard_map(fn, mesh=mesh, in_specs=P("data"), out_specs=P("data"))

def loop(x):
    step = lambda carry, _: (jax.lax.ppermute(carry, "data", [(0, 1), (1, 2), (2, 3), (3, 0)]), None)
    return jax.lax.scan(step, x, None, length=5)[0]

x = jnp.zeros((8, 16), jnp.float32)
print(json.dumps({
    "gather": count(gathered, x.astype(jnp.int32), specs=[P("data")]),
    "reduce": count(lambda x: jnp.sum(x, axis=0), x, specs=[P("data")]),
    "loop": count(mapped(loop), x, specs=[P("data")]),
}))
"""


@pytest.fixture(scope="module")
def counted():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("gather", ["all-gather", "int32", 1, 8 * 16 * 4]),
        ("reduce", ["all-reduce", "float32", 1, 16 * 4]),
        # Each of five rounds passes a quarter on.
        ("loop", ["collective-permute", "float32", 5, 5 * 2 * 16 * 4]),
    ],
)
def test_kind_dtype_times_and_bytes(counted, program, expected):
    assert counted[program] == [expected]
