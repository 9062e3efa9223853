"""What jaxmp's GPT step may cost on machines that are absent, held to the one written by hand.

Needs the compilers of the extras `cuda` and `tpu` (4.4 GB, no device) and skips without them;
`python scripts/bench.py gpt-small --target gpu-h100` prints the same comparison as a table.
"""

import dataclasses
import functools
import importlib
import pathlib
import sys

import jax
import pytest

from jaxmp.plan import compile as plan
from jaxmp.plan import targets

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
CASES = [("gpu-h100", "xla"), ("gpu-h100", "cudnn"), ("tpu-v5e", "xla")]
HALF = ("bfloat16", "float16")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]


@functools.cache
def bench():
    sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module("bench")


@functools.cache
def report(target: str, attention: str, row: str, name: str = "gpt-small", batch_size: int = 16):
    missing = targets.missing_wheel(target)
    if missing:
        pytest.skip(missing)
    workload = bench().WORKLOADS[name]
    config = dataclasses.replace(workload.config, attention=attention)
    workload = dataclasses.replace(workload, config=config, batch_size=batch_size)
    init, step = bench().VARIANTS[row].build(workload)
    state = jax.eval_shape(lambda: init(bench().initial_params(workload)))
    return plan.compile_for(step, state, workload.batch(), target)


@pytest.mark.parametrize(("target", "attention"), CASES)
@pytest.mark.parametrize("dtype", HALF)
def test_every_product_has_16_bit_operands(target, attention, dtype):
    program = report(target, attention, f"jaxmp {dtype}")
    assert len(program.products) >= 4 * 3 * 4 + 3 or attention == "cudnn"
    for product in program.products:
        assert set(product.operands) == {dtype}, f"{product.dtypes} at {product.source}"


@pytest.mark.parametrize(("target", "attention"), CASES)
def test_the_state_is_float32_and_stays_in_its_buffers(target, attention):
    program = report(target, attention, "jaxmp bfloat16")
    parameters = jax.eval_shape(lambda: bench().initial_params(bench().WORKLOADS["gpt-small"]))
    masters = sum(leaf.size * 4 for leaf in jax.tree.leaves(parameters))
    assert program.dtype_bytes["float32"] == 3 * masters  # parameters and two moments
    assert not {"bfloat16", "float16"} & set(program.dtype_bytes)
    assert program.alias_bytes >= 3 * masters
    # A key that a step reads and hands on may be copied; it has eight bytes.
    assert set(program.not_aliased) <= {"state.rng"}


@pytest.mark.parametrize(("target", "attention"), CASES)
@pytest.mark.parametrize("dtype", HALF)
def test_it_moves_what_the_step_by_hand_moves(target, attention, dtype):
    if target == "tpu-v5e" and dtype == "float16":
        pytest.skip("its float16 row is compared with bfloat16 below; a compilation takes a minute")
    by_hand = report(target, attention, f"hand {dtype}")
    by_jaxmp = report(target, attention, f"jaxmp {dtype}")
    assert by_jaxmp.bytes_accessed <= 1.01 * by_hand.bytes_accessed
    # The compiler's own count, where it has one, also sees on-chip copies.
    assert (by_jaxmp.compiler_bytes or 0) <= 1.02 * (by_hand.compiler_bytes or 0)
    assert by_jaxmp.temporary_bytes <= 1.02 * by_hand.temporary_bytes


@pytest.mark.parametrize(("target", "attention"), CASES)
def test_scaling_the_loss_moves_nothing_more(target, attention):
    scaled = report(target, attention, "jaxmp float16")
    plain = report(target, attention, "jaxmp bfloat16")
    # Where the compiler counts, its count: a TPU's keeps other arrays on the chip for float16, which ours
    # leaves out, in the step by hand as well.
    moved = lambda program: program.compiler_bytes or program.bytes_accessed
    assert moved(scaled) == pytest.approx(moved(plain), rel=0.001)
    assert scaled.temporary_bytes <= 1.005 * plain.temporary_bytes


def test_16_bits_save_activations_and_no_state():
    half, full = (report("gpu-h100", "xla", row) for row in ("jaxmp bfloat16", "hand float32"))
    assert half.argument_bytes == pytest.approx(full.argument_bytes, rel=1e-3)
    assert half.temporary_bytes < 0.7 * full.temporary_bytes


@pytest.mark.parametrize("attention", ["xla", "cudnn"])
def test_all_of_float16_costs_little_beside_a_bare_bfloat16_step(attention):
    # Scaling, check, clip and skip against none of them. What is left is the pass over the gradients
    # that any clipping needs, 4 bytes a parameter, whatever the batch: at 32 x 1024 tokens 0.18% with
    # XLA's attention and 0.36% with cuDNN's; at 8 x 1024, 0.76% and 1.5%.
    size = ("gpt-124m", 32)
    bare = report("gpu-h100", attention, "hand bfloat16, no clip, no check", *size)
    scaled = report("gpu-h100", attention, "jaxmp float16", *size)
    assert scaled.bytes_accessed == pytest.approx(bare.bytes_accessed, rel=0.005)
    clipped = report("gpu-h100", attention, "hand bfloat16", *size)
    assert scaled.bytes_accessed == pytest.approx(clipped.bytes_accessed, rel=0.002)
