"""The kinds of transformer block: how a gradient fares on its way down, and what each is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.nn import layers

DEPTH, WIDTH = 12, 32
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, WIDTH)), "float32")


def make_block(kind, **settings):
    xavier = jax.nn.initializers.xavier_uniform()
    return layers.TransformerBlock(
        heads=4,
        mlp_width=4 * WIDTH,
        causal=False,
        implementation="xla",
        dropout=0.0,
        kernel_init=xavier,
        output_init=xavier,
        block=kind,
        alpha=1 / DEPTH,
        **settings,
    )


def gradient_norms(kind, seed):
    """The norm of a loss's gradient at the input of each of the blocks, by zeros added there."""
    block = make_block(kind)
    keys = jax.random.split(jax.random.key(seed), DEPTH)
    params = jax.vmap(lambda key: block.init(key, X, False))(keys)
    probe = jax.random.normal(jax.random.key(seed + 100), X.shape)

    def loss(taps):
        through = lambda h, layer: (block.apply(layer[0], h + layer[1], False), None)
        h, _ = jax.lax.scan(through, X, (params, taps))
        return jnp.sum(h * probe)

    return jnp.linalg.norm(jax.grad(loss)(jnp.zeros((DEPTH, *X.shape))).reshape(DEPTH, -1), axis=1)


@pytest.mark.slow
def test_gradients_at_the_start_by_depth(monkeypatch):
    monkeypatch.setitem(layers.BLOCKS, "no_norm", layers.Block())
    ratios = {}
    for kind in ("no_norm", *layers.BLOCKS):
        norms = jax.jit(jax.vmap(lambda seed, kind=kind: gradient_norms(kind, seed)))
        ratios[kind] = np.array([first / last for first, *_, last in norms(jnp.arange(3))])
    assert (ratios["no_norm"] > 50).all()  # explodes on its way down
    assert (ratios["pre_ln"] > 1.5).all() and (ratios["pre_ln"] < 15).all()
    assert (ratios["post_ln"] > 0.5).all() and (ratios["post_ln"] < ratios["pre_ln"]).all()
    np.testing.assert_allclose(ratios["weighted"], 1, atol=0.1)
    # Between the two inputs lie 2 * 11 CenterNorms, each of the Lipschitz constant D/(D-1).
    np.testing.assert_allclose(ratios["lipsformer"], (32 / 31) ** 22, rtol=0.05)


def parameter_names(kind, **settings):
    shapes = jax.eval_shape(
        lambda: make_block(kind, **settings).init(jax.random.key(0), X, False)["params"]
    )
    return {"/".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(shapes)}


def test_kinds_differ_in_what_they_are_made_of():
    products = {
        f"{layer}/{leaf}"
        for layer in ("SelfAttention_0/qkv", "SelfAttention_0/out", "Dense_0", "Dense_1")
        for leaf in ("kernel", "bias")
    }
    two = lambda layer, *leaves: {f"{layer}_{i}/{leaf}" for i in (0, 1) for leaf in leaves}
    layer_norms, alphas = two("LayerNorm", "scale", "bias"), two("WeightedResidual", "alpha")
    centres = two("CenterNorm", "scale", "bias")
    assert parameter_names("pre_ln") == parameter_names("post_ln") == products | layer_norms
    assert parameter_names("weighted") == products | layer_norms | alphas
    assert parameter_names("lipsformer") == products | centres | alphas
    scales = {f"SelfAttention_0/qk_norm/{name}_scale" for name in ("query", "key")}
    assert parameter_names("pre_ln", qk_norm=True) == products | layer_norms | scales


def test_the_weighted_residual_starts_at_one_over_the_depth():
    params = make_block("weighted").init(jax.random.key(0), X, False)["params"]
    for i in (0, 1):
        np.testing.assert_array_equal(params[f"WeightedResidual_{i}"]["alpha"], np.float32(1 / 12))


def test_drop_path_skips_both_branches_of_whole_examples():
    block = make_block("pre_ln", drop_path=0.9)
    x = jnp.concatenate([X] * 8)
    params = block.init(jax.random.key(0), x, False)
    apply = jax.jit(lambda key: block.apply(params, x, True, rngs={"dropout": key}))
    moved = np.abs(np.asarray(apply(jax.random.key(1)) - x)).reshape(16, -1).max(1)
    assert 0 < (moved == 0).sum() < 16


def test_settings_that_fit_no_block_are_named():
    with pytest.raises(
        ValueError, match="'ln' is unknown; choose one of pre_ln, post_ln, weighted"
    ):
        layers.check_block("ln", False)
    with pytest.raises(ValueError, match="'lipsformer' normalises queries and keys by itself"):
        layers.check_block("lipsformer", True)
