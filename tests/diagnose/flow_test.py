"""Gradients by depth: against closed forms of random nets and float64, and what the verdicts say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.diagnose import flow

DEPTH, WIDTH = 50, 256


def random_net(gain, seed=0):
    """Float32 kernels whose entries have a deviation of gain / sqrt(width), an input, and a gradient."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    kernels = np.float32(gain / np.sqrt(WIDTH)) * normal(DEPTH, WIDTH, WIDTH)
    return kernels, normal(64, WIDTH), normal(64, WIDTH)


@functools.partial(jax.jit, static_argnames="relu")
def at_taps(kernels, x, g, relu):
    """What taps before each layer of a deep net see, of which g is the gradient at the top."""

    def loss(taps):
        def layer(x, layer):
            kernel, tap = layer
            x = flow.tap(x, tap) @ kernel
            return (jax.nn.relu(x) if relu else x), None

        return jnp.sum(jax.lax.scan(layer, x, (kernels, taps))[0] * g)

    return jax.grad(loss)(flow.new_tap(DEPTH))


@pytest.mark.parametrize(
    ("gain", "relu", "per_layer"),
    [(0.81, False, 0.81), (1.0, True, 0.5**0.5), (2.0**0.5, True, 1.0)],
    ids=["linear", "relu that vanishes", "relu by He"],
)
def test_a_deep_random_net_shrinks_gradients_by_its_gain_each_layer(gain, relu, per_layer):
    """Squares shrink by gain^2, halved by a ReLU: log10 of first to last is (depth - 1) log10(that)."""
    found = flow.flow_at_taps(at_taps(*random_net(gain), relu))
    assert found.names == tuple(f"block_{i}" for i in range(DEPTH))
    theory = (DEPTH - 1) * np.log10(per_layer)
    assert abs(np.log10(found.norm[0] / found.norm[-1]) - theory) < 0.15
    verdicts = [finding.verdict for finding in found.findings()]
    assert verdicts == (["vanishing with depth"] if per_layer < 0.9 else [])


def test_taps_measure_what_float64_backpropagates_beyond_the_range_of_squares():
    """Every block's norm, where its square is far below float32: sqrt(sum g^2) alone would give 0."""
    kernels, x, g = random_net(0.5)
    found = flow.flow_at_taps(at_taps(kernels, x * np.float32(1e-15), g, False)).norm
    g, expected = np.asarray(g, np.float64), []
    for kernel in np.asarray(kernels, np.float64)[::-1]:
        g = g @ kernel.T
        expected.append(np.linalg.norm(g))
    np.testing.assert_allclose(found, expected[::-1], rtol=2e-5)
    tiny = jax.grad(lambda tap: jnp.sum(flow.tap(jnp.ones(100), tap) * 1e-30))
    norm = flow.flow_at_taps(jax.jit(tiny)(flow.new_tap())).norm
    np.testing.assert_allclose(norm, [1e-29], rtol=1e-6)
    assert np.sqrt(np.sum(np.square(np.full(100, 1e-30, np.float32)))) == 0  # the naive norm


def test_a_tap_changes_neither_value_nor_gradient():
    x = np.random.default_rng(0).standard_normal(5, np.float32)
    plain = lambda x: jnp.sum(jnp.sin(x) ** 2)
    tapped = lambda x: jnp.sum(flow.tap(jnp.sin(x), flow.new_tap()) ** 2)
    np.testing.assert_array_equal(plain(x), tapped(x))
    np.testing.assert_array_equal(jax.grad(plain)(x), jax.grad(tapped)(x))


def test_norms_updates_and_weights_by_module_follow_numpy():
    rng = np.random.default_rng(0)
    tree = lambda factor: {
        f"block_{i}": {
            "kernel": np.float32(factor * rng.normal(size=(3, 4))),
            "bias": np.ones(4, "f4"),
        }
        for i in (10, 2)
    }
    grads, params, updates = tree(1.0), tree(2.0), tree(1e-3)
    found = jax.jit(flow.gradient_flow)(grads, params, updates)
    assert found.names == ("block_2", "block_10") and found.sizes == (16, 16)
    norm = lambda tree, name: np.sqrt(
        sum(np.sum(np.float64(leaf) ** 2) for leaf in tree[name].values())
    )
    for i, name in enumerate(found.names):
        np.testing.assert_allclose(found.norm[i], norm(grads, name), rtol=1e-6)
        np.testing.assert_allclose(found.rms[i], norm(grads, name) / 4, rtol=1e-6)
        np.testing.assert_allclose(found.weight_norm[i], norm(params, name), rtol=1e-6)
        ratio = norm(updates, name) / norm(params, name)
        np.testing.assert_allclose(found.update_ratio[i], ratio, rtol=1e-6)


def test_stacked_blocks_are_told_apart():
    grads = {
        "blocks": {"dense": np.arange(24, dtype=np.float32).reshape(3, 2, 4)},
        "head": np.ones(2),
    }
    found = flow.gradient_flow(grads, stacked=("blocks",))
    assert found.names == ("blocks/0", "blocks/1", "blocks/2", "head")
    slices = [np.linalg.norm(block) for block in grads["blocks"]["dense"]]
    np.testing.assert_allclose(found.norm[:3], slices, rtol=1e-6)


def planted(**norms):
    """Ten modules of a usual gradient, and the planted ones."""
    usual = {f"layer_{i}": np.full(4, 0.01, np.float32) for i in range(10)}
    weights = {name: np.ones(4, np.float32) for name in usual | norms}
    grads = usual | {name: np.full(4, value, np.float32) for name, value in norms.items()}
    return {k: {"w": v} for k, v in grads.items()}, {k: {"w": v} for k, v in weights.items()}


@pytest.mark.parametrize(
    ("verdict", "value"),
    [("dead", 0.0), ("vanishing", 1e-9), ("exploding", 1e3), ("not finite", np.nan)],
)
def test_a_planted_module_is_named_with_a_remedy(verdict, value):
    grads, params = planted(odd=value)
    (finding,) = flow.gradient_flow(grads, params).findings()
    assert (finding.verdict, finding.names) == (verdict, ("odd",)) and finding.remedy
    assert "odd" in str(flow.gradient_flow(grads, params))


@pytest.mark.parametrize(("verdict", "size"), [("rushed", 0.5), ("stalled", 2.0**-25)])
def test_updates_are_judged_next_to_their_weights(verdict, size):
    grads, params = planted(odd=0.01)
    updates = jax.tree.map(lambda p: np.full_like(p, 1e-3), params)
    updates["odd"]["w"][:] = size
    (finding,) = flow.gradient_flow(grads, params, updates).findings()
    assert (finding.verdict, finding.names) == (verdict, ("odd",))


def test_a_healthy_net_has_no_findings_and_mistakes_are_sentences():
    grads, params = planted()
    found = flow.gradient_flow(grads, params)
    assert found.findings() == [] and "similar size" in str(found)
    with pytest.raises(ValueError, match="updates came without params"):
        flow.gradient_flow(grads, updates=grads)
    with pytest.raises(ValueError, match="params and grads differ"):
        flow.gradient_flow(grads, params | {"more": {"w": np.ones(2)}})
    with pytest.raises(ValueError, match="no floating-point array"):
        flow.gradient_flow({"step": np.int32(3)})
