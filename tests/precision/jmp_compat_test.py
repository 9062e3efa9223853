"""`import jaxmp as jmp` in code written for jmp 0.0.4: its tests, its users' ways, not its bugs."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jmp as original
import numpy as np
import pytest

import jaxmp as jmp

ROOT = pathlib.Path(__file__).parents[2]


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "tests"), [("jmp", 97), ("dm-haiku", 13)])
def test_their_own_tests_pass(suite, tests):
    done = run_python("scripts/check_jmp_compat.py", suite, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"(\d+) tests, (\d+) failed, (\d+) skipped", done.stdout)
    assert counts is not None and counts.groups() == (str(tests), "0", "0")


def test_the_script_refuses_what_it_does_not_know():
    done = run_python("scripts/check_jmp_compat.py", "jpm")
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == "There is no suite jpm; there are jmp and dm-haiku.\n"


def test_all_public_names_are_here():
    assert len(original.__all__) == 11
    assert [name for name in original.__all__ if not hasattr(jmp, name)] == []


# The same answers as jmp.


@pytest.mark.parametrize(
    "text",
    [
        *("full", "half", "bfloat16", "c=f16", "p=f16,c=f16", "p=f16,c=bf16", "c=half,o=full"),
        *("p=f64", "params=f32,output=f16", "compute=bfloat16,params=float32,output=full"),
    ],
)
def test_get_policy_reads_what_jmp_reads(text):
    ours, theirs = jmp.get_policy(text), original.get_policy(text)
    for field in ("param_dtype", "compute_dtype", "output_dtype"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert str(ours) == str(theirs)
    assert jmp.get_policy(str(ours)) == ours


@pytest.mark.parametrize("text", ["float17", "q=f32", "p=f32,", "p", ""])
def test_get_policy_refuses_what_jmp_refuses(text):
    for library in (jmp, original):
        with pytest.raises(ValueError):
            library.get_policy(text)


def test_casts_touch_what_jmp_casts():
    tree = {
        "f32": jnp.ones(2),
        "bf16": jnp.ones(2, jnp.bfloat16),
        "numpy": np.ones(2, np.float64),
        "int": jnp.arange(2),
        "bool": jnp.array(True),
        "complex": jnp.ones(2, jnp.complex64),
        "key": jax.random.key(0),
        "scalar": 1.5,
        "text": "label",
        "none": None,
    }
    dtypes = lambda tree: jax.tree.map(lambda x: getattr(x, "dtype", x), tree)
    for policy in ("p=f32,c=bf16,o=f16", "half"):
        for cast in ("cast_to_param", "cast_to_compute", "cast_to_output"):
            ours = getattr(jmp.get_policy(policy), cast)(tree)
            assert dtypes(ours) == dtypes(getattr(original.get_policy(policy), cast)(tree))
    assert dtypes(jmp.cast_to_half(tree)) == dtypes(original.cast_to_half(tree))
    assert dtypes(jmp.cast_to_full(tree)) == dtypes(original.cast_to_full(tree))


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
    st.lists(st.booleans(), max_size=40), st.integers(1, 5), st.sampled_from([2, 3, 4])
)
def test_scale_moves_as_jmps(finite, period, factor):
    settings = {"period": period, "factor": factor, "min_loss_scale": np.float32(0.25)}
    ours = jmp.DynamicLossScale(jnp.float32(8.0), **settings)
    theirs = original.DynamicLossScale(jnp.float32(8.0), **settings)
    for flag in finite[:20]:  # below jaxmp's default cap
        ours, theirs = ours.adjust(jnp.bool_(flag)), theirs.adjust(jnp.bool_(flag))
        hypothesis.assume(float(theirs.loss_scale) <= 2.0**20)
        assert (float(ours.loss_scale), int(ours.counter)) == (
            float(theirs.loss_scale),
            int(theirs.counter),
        )


@pytest.mark.parametrize("scale", [jmp.StaticLossScale(8.0), jmp.DynamicLossScale(8.0)], ids=str)
def test_scaling_there_and_back(scale):
    tree = {"a": jnp.array([1.0, -3.0]), "b": jnp.float32(2.0**-20)}
    scaled = scale.scale(tree)
    np.testing.assert_array_equal(scaled["a"], [8, -24])
    for leaf, back in zip(jax.tree.leaves(tree), jax.tree.leaves(scale.unscale(scaled))):
        np.testing.assert_array_equal(leaf, back)


# Not jmp's bugs.


def jitted_step(scale, grads):
    """Counts traces of a step that unscales and adjusts; returns the step."""
    traces = []

    @jax.jit
    def step(scale, grads):
        traces.append(None)
        grads = scale.unscale(grads)
        finite = jmp.all_finite(grads)
        return scale.adjust(finite), jmp.select_tree(
            finite, grads, jax.tree.map(jnp.zeros_like, grads)
        )

    return step, traces


def test_min_loss_scale_survives_jit_and_tree_map():
    scale = jmp.DynamicLossScale(jnp.float32(64.0), min_loss_scale=jnp.float32(16.0))
    step, _ = jitted_step(scale, None)
    for _ in range(5):
        scale, _ = step(scale, jnp.array([jnp.inf]))
    assert float(scale.loss_scale) == 16.0
    assert float(jax.tree.map(lambda x: x, scale).min_loss_scale) == 16.0


@pytest.mark.parametrize(
    "start", [2.0**15, np.float32(2**15), jnp.float32(2**15), jnp.float16(2**15)]
)
def test_any_start_costs_one_trace(start):
    scale = jmp.DynamicLossScale(start, period=2)
    step, traces = jitted_step(scale, None)
    for grads in (jnp.ones(3), jnp.ones(3), jnp.array([1.0, jnp.nan, 1.0]), jnp.ones(3)):
        scale, _ = step(scale, grads)
    assert len(traces) == 1
    assert float(scale.loss_scale) == 2.0**15


def test_scale_flattens_to_two_leaves():
    scale = jmp.DynamicLossScale(2.0**15, min_loss_scale=4.0)
    assert jax.tree.leaves(scale) == [scale.loss_scale, scale.counter]


@pytest.mark.parametrize(
    "scale",
    [
        jmp.StaticLossScale(2**15),
        jmp.StaticLossScale(jnp.float32(2**15)),
        jmp.DynamicLossScale(2.0**15),
    ],
    ids=["static", "static array", "dynamic"],
)
def test_unscale_does_not_flush_float16_gradients(scale):
    gradient = jnp.float16(1e-4)
    unscaled = scale.unscale({"w": gradient})["w"]
    assert unscaled.dtype == jnp.float32
    assert float(unscaled) == float(gradient) / 2**15 > 0
    flushed = original.StaticLossScale(2**15).unscale(gradient)
    assert float(flushed) == 0


def test_the_example_of_jmps_readme_works_in_float16():
    half = jmp.half_dtype()
    scale = jmp.DynamicLossScale(half(2**15), period=2)
    policy = jmp.get_policy("params=full,compute=half,output=full")

    @jax.jit
    def step(params, scale, x):
        def loss_fn(params):
            params, inputs = policy.cast_to_compute((params, x))
            outputs = policy.cast_to_output(inputs @ params["w"])
            return scale.scale(jnp.mean(outputs**2))

        grads = policy.cast_to_param(scale.unscale(jax.grad(loss_fn)(params)))
        finite = jmp.all_finite(grads)
        new = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return jmp.select_tree(finite, new, params), scale.adjust(finite), grads

    params = {"w": jnp.full((4, 2), 1e-3)}
    start = params
    x = jnp.ones((3, 4))
    for _ in range(4):  # grows beyond the largest float16
        params, scale, grads = step(params, scale, x)
    assert float(scale.loss_scale) == 2.0**17
    assert params["w"].dtype == jnp.float32
    np.testing.assert_allclose(start["w"], 1e-3)
    assert bool(jnp.all(params["w"] < start["w"])) and bool(jnp.all(grads["w"] > 0))
    with pytest.raises(TypeError):  # jmp: its float32 floor against the float16 scale
        original.DynamicLossScale(half(2**15)).adjust(jnp.bool_(True))


@pytest.mark.parametrize(
    "text",
    [" bfloat16 ", "p = f32, c = bf16 ,o=f32", "params=float32, compute=bfloat16, output=full"],
)
def test_policy_strings_may_hold_spaces(text):
    assert jmp.get_policy(text) == jmp.get_policy(text.replace(" ", ""))


def test_import_and_half_dtype_start_no_backend():
    # There is no such platform, so whatever starts a backend fails.
    code = "import jaxmp; print(jaxmp.get_policy('p=f32,c=bf16'))"
    done = run_python("-c", code, JAX_PLATFORMS="no_such_platform")
    assert done.stdout == "p=full,c=bf16,o=bf16\n", done.stderr
    code = "import jaxmp; print(jaxmp.half_dtype().__name__, jaxmp.get_policy('half'))"
    done = run_python("-c", code, JAX_PLATFORMS="tpu")
    assert done.stdout == "bfloat16 p=bf16,c=bf16,o=bf16\n", done.stderr


# As levanter uses it.


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    mp: jmp.Policy = dataclasses.field(default_factory=lambda: jmp.get_policy("f32"))
    steps: int = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: jax.Array
    position: jax.Array
    name: str = dataclasses.field(metadata={"static": True}, default="linear")


def test_a_policy_as_a_field_of_a_config():
    config = TrainerConfig(mp=jmp.get_policy("p=f32,c=bfloat16"))
    model = Linear(jnp.ones((2, 3)), jnp.arange(3))
    compute = config.mp.cast_to_compute(model)
    assert isinstance(compute, Linear) and compute.name == "linear"
    assert (compute.weight.dtype, compute.position.dtype) == (jnp.bfloat16, jnp.int32)
    assert config.mp.cast_to_param(compute).weight.dtype == config.mp.param_dtype == jnp.float32
    assert jnp.zeros(2, config.mp.output_dtype).dtype == jnp.bfloat16
    assert config == dataclasses.replace(config, mp=jmp.get_policy("c=bf16,p=float32"))
    assert config != TrainerConfig()
    assert hash(config) == hash(dataclasses.replace(config))


def test_a_policy_by_keywords_and_with_another_output():
    policy = jmp.Policy(
        param_dtype=jnp.float32, compute_dtype=jnp.bfloat16, output_dtype=jnp.bfloat16
    )
    assert policy == jmp.get_policy("p=f32,c=bfloat16")
    wide = policy.with_output_dtype(jnp.float32)
    assert wide.cast_to_output(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    assert (wide.param_dtype, wide.compute_dtype) == (policy.param_dtype, policy.compute_dtype)
    assert policy.output_dtype == jnp.bfloat16


def test_policies_are_values():
    spelled = [
        jmp.Policy(np.float32, jnp.bfloat16, np.dtype("float32")),
        jmp.Policy(jnp.float32, jnp.dtype("bfloat16"), jnp.float32),
        jmp.get_policy("p=f32,c=bf16,o=f32"),
    ]
    assert len(set(spelled)) == 1
    assert {spelled[0]: "found"}[spelled[2]] == "found"
    assert len({*spelled, jmp.get_policy("bf16")}) == 2


def test_a_policy_as_a_static_argument_costs_one_trace():
    traces = []

    def forward(policy, x):
        traces.append(None)
        return policy.cast_to_output(policy.cast_to_compute(x) * 2)

    forward = jax.jit(forward, static_argnums=0)
    for text in ("p=f32,c=bf16,o=f32", "c=bfloat16,o=full"):
        assert forward(jmp.get_policy(text), jnp.ones(2)).dtype == jnp.float32
    assert len(traces) == 1
