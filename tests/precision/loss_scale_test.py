"""Loss scales: the algorithm against a plain Python reference, exactness, bounds, jit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmp import DynamicLossScale, NoOpLossScale, StaticLossScale


class Reference:
    """The pseudo-code of DynamicLossScale's docstring, with two plain counters."""

    def __init__(self, scale, period, factor, low, high, hysteresis):
        self.scale, self.good, self.bad = scale, 0, 0
        self.period, self.factor, self.hysteresis = period, factor, hysteresis
        self.low, self.high = low, high

    def adjust(self, finite):
        if finite:
            self.good, self.bad = self.good + 1, 0
            if self.good == self.period:
                self.good = 0
                if self.scale * self.factor <= self.high:
                    self.scale *= self.factor
        else:
            self.good, self.bad = 0, self.bad + 1
            if self.bad == self.hysteresis:
                self.bad = 0
                self.scale = max(self.scale / self.factor, self.low)


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([2, 4]),
)
def test_the_rule_follows_its_pseudo_code(outcomes, period, hysteresis, factor):
    scale = DynamicLossScale(
        2.0**4, period=period, factor=factor, min_loss_scale=0.5, max_loss_scale=2.0**7,
        hysteresis=hysteresis,
    )  # fmt: skip
    reference = Reference(2.0**4, period, factor, 0.5, 2.0**7, hysteresis)
    for finite in outcomes:
        scale = scale.adjust(jnp.asarray(finite))
        reference.adjust(finite)
        assert float(scale.loss_scale) == reference.scale


@pytest.mark.parametrize("largest", [1.0, 3e-3])
@pytest.mark.parametrize("period", [10, 100])
def test_steady_state_skips_once_in_period_plus_one_steps(period, largest):
    """Gradients of constant size overflow float16 from 65520: the scale alternates below that."""

    def step(scale, _):
        finite = largest * scale.loss_scale < 65520
        return scale.adjust(finite), (finite, scale.loss_scale)

    start = DynamicLossScale(2.0**15, period=period)
    _, (finite, scales) = jax.lax.scan(step, jax.tree.map(jnp.asarray, start), length=30 * period)
    skips = np.flatnonzero(~np.asarray(finite))
    top = 2.0 ** np.ceil(np.log2(65520 / largest))
    settled = skips[2:]
    assert len(settled) > 3 and set(np.diff(settled)) == {period + 1}
    assert set(np.asarray(scales)[skips[1] :].tolist()) == {top, top / 2}


def test_two_leaves_static_bounds_and_one_trace():
    scale = DynamicLossScale(2.0**15, min_loss_scale=0.25, hysteresis=2)
    leaves = jax.tree.leaves(scale)
    assert len(leaves) == 2 and leaves[0] is scale.loss_scale and leaves[1] is scale.counter
    chex.clear_trace_counter()
    adjust = jax.jit(chex.assert_max_traces(lambda s, f: s.adjust(f), n=1))
    for _ in range(40):
        scale = adjust(scale, jnp.array(False))
    assert scale.min_loss_scale == 0.25 and scale.loss_scale == 0.25 and scale.hysteresis == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("make", [StaticLossScale, DynamicLossScale], ids=["static", "dynamic"])
def test_unscaling_never_happens_in_16_bits(make, dtype):
    scale = make(2.0**15)
    grads = {"w": jnp.asarray([1e-4, 3.0], dtype), "count": jnp.int32(7)}
    got = scale.unscale(grads)
    want = np.asarray(grads["w"], np.float64) / 2**15
    assert got["w"].dtype == np.float32 and got["count"] is grads["count"]
    np.testing.assert_array_equal(np.asarray(got["w"], np.float64), want)


@given(st.integers(-20, 30), st.floats(-1e3, 1e3, width=32, allow_subnormal=False))
def test_powers_of_two_are_exact(exponent, x):
    if 0 < abs(x) < 1e-25:
        return  # the product could leave float32's normal range
    scale = StaticLossScale(2.0**exponent)
    assert scale.unscale(scale.scale(jnp.float32(x))) == np.float32(x)


def test_no_scale_does_nothing():
    scale, tree = NoOpLossScale(), {"a": jnp.ones(2, jnp.float16)}
    assert scale.scale(tree) is tree and scale.unscale(tree) is tree
    assert scale.adjust(jnp.array(False)) is scale and jax.tree.leaves(scale) == []
