"""Exchanges counted in programs whose exchanges are known: four CPU devices in a process of their own."""

import json
import subprocess
import sys

import pytest

from jaxmp.plan import collectives, hlo

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
    return [[*key, *value, one.group, one.wire_bytes(4)] for one, (key, value) in zip(found, table.items())]

def gathered(x):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P())) * 2

def mapped(fn):
    return jax.shard_map(fn, mesh=mesh, in_specs=P("data"), out_specs=P("data"))

def loop(x):
    step = lambda carry, _: (jax.lax.ppermute(carry, "data", [(0, 1), (1, 2), (2, 3), (3, 0)]), None)
    return jax.lax.scan(step, x, None, length=5)[0]

def pairs(axis):
    square = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    add = lambda x: jax.lax.psum(x, axis)
    return jax.shard_map(add, mesh=square, in_specs=P(axis), out_specs=P())

x = jnp.zeros((8, 16), jnp.float32)
print(json.dumps({
    "gather": count(gathered, x.astype(jnp.int32), specs=[P("data")]),
    "reduce": count(lambda x: jnp.sum(x, axis=0), x, specs=[P("data")]),
    "loop": count(mapped(loop), x, specs=[P("data")]),
    "rows": count(pairs("data"), x, specs=[P()]),
    "columns": count(pairs("tensor"), x, specs=[P()]),
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
    ("program", "expected", "group", "sent"),
    [
        # A device has a quarter and sends it on three times around a ring.
        ("gather", ["all-gather", "int32", 1, 8 * 16 * 4], 4, 3 * 2 * 16 * 4),
        # Three quarters to scatter the sum, three to gather it.
        ("reduce", ["all-reduce", "float32", 1, 16 * 4], 4, 2 * 3 * 4 * 4),
        # Each of five rounds passes a quarter on.
        ("loop", ["collective-permute", "float32", 5, 5 * 2 * 16 * 4], 0, 5 * 2 * 16 * 4),
        # In pairs, half of the rows each: half to the other and half back.
        ("rows", ["all-reduce", "float32", 1, 4 * 16 * 4], 2, 4 * 16 * 4),
        ("columns", ["all-reduce", "float32", 1, 4 * 16 * 4], 2, 4 * 16 * 4),
    ],
)
def test_kind_dtype_times_bytes_and_what_is_sent(counted, program, expected, group, sent):
    assert counted[program] == [[*expected, group, sent]]


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b'}", 8),
        ("mesh['a'=2,'b'=8] {'a','b':(2)4}", 8),
        ("{}", 0),
    ],
)
def test_groups_in_every_way_that_they_are_written(groups, devices):
    text = f"""HloModule m

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %r = f32[4]{{0}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}
}}
"""
    (found,) = collectives.collectives(hlo.parse(text))
    assert found.group == devices


# A TPU's program repeats the gather in the kernel that starts it, those beside it and the one that ends it.
ASYNC = """HloModule m

%begin (p: bf16[4,8]) -> (bf16[64,8], u32[]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %g = bf16[64,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %s = (bf16[64,8]{1,0}, u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%end (q: bf16[4,8]) -> bf16[64,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  %h = bf16[64,8]{1,0} all-gather(%q), channel_id=7, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %d = bf16[64,8]{1,0} custom-call(%q, %h), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[4,8]) -> bf16[64,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %b = (bf16[64,8]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%begin
  %other = bf16[64,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %third = bf16[64,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  ROOT %e = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%end
}
"""


def test_an_exchange_in_several_kernels_is_counted_once():
    found = collectives.collectives(hlo.parse(ASYNC))
    assert collectives.by_kind_and_dtype(found) == {("all-gather", "bfloat16"): (3, 3 * 64 * 8 * 2)}
