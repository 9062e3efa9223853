"""The Llama against plain NumPy in float64, one layer after the other, and what its backward pass keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxmp.nn import functional as F
from jaxmp.nn import linen
from jaxmp.nn.models import LLAMA_1B, LLAMA_7B, Llama, LlamaConfig

SMALL = LlamaConfig(
    vocab_size=17, context=12, width=24, depth=2, heads=6, kv_heads=2, mlp_width=40, remat="none"
)
TOKENS = np.random.default_rng(1).integers(0, 17, (2, 10)).astype(np.int32)


def rms_norm(p, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"]


def turned(x, position, base=10000.0):
    """A head's vector as complex numbers, each turned by its own angle."""
    half = len(x) // 2
    turn = np.exp(1j * position * base ** (-np.arange(half) / half))
    z = (x[:half] + 1j * x[half:]) * turn
    return np.concatenate([z.real, z.imag])


def attention(p, x, config):
    """For each token and head: softmax over the keys so far, of the head's own group."""
    length, size = len(x), config.width // config.heads
    q, k, v = (x @ p[name]["kernel"] for name in ("query", "key", "value"))
    out = np.zeros((length, config.width))
    for head in range(config.heads):
        mine, group = (
            slice(h * size, (h + 1) * size) for h in (head, head * config.kv_heads // config.heads)
        )
        for t in range(length):
            query = turned(q[t, mine], t)
            logits = [query @ turned(k[s, group], s) / np.sqrt(size) for s in range(t + 1)]
            out[t, mine] = scipy.special.softmax(logits) @ v[: t + 1, group]
    return out @ p["out"]["kernel"]


def forward(params, tokens, config):
    """Logits [T, vocabulary] of one sequence."""
    x = params["tokens"]["embedding"][tokens]
    for layer in range(config.depth):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        x = x + attention(p, rms_norm(p["attention_norm"], x), config)
        h = rms_norm(p["mlp_norm"], x)
        gate, up = h @ p["gate"]["kernel"], h @ p["up"]["kernel"]
        x = x + (gate * scipy.special.expit(gate) * up) @ p["down"]["kernel"]
    return rms_norm(params["final_norm"], x) @ params["head"]["kernel"]


def products(jaxpr):
    """How many matrix products stand in a jaxpr, those of its inner ones included."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general"
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                count += products(inner) if hasattr(inner, "eqns") else 0
    return count


def test_logits_are_those_of_float64_layer_by_layer(reference, perturbed, apply):
    params, _ = perturbed(Llama(SMALL), TOKENS)
    logits = apply(Llama(SMALL), {"params": params}, TOKENS)
    wide = reference.float64(params)
    expected = np.stack([forward(wide, row, SMALL) for row in TOKENS])
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=2e-5)


def test_16_bit_logits_are_close(perturbed, agrees_in_16_bits):
    params, state = perturbed(Llama(SMALL), TOKENS)
    agrees_in_16_bits(Llama(SMALL), params, state, TOKENS, "bfloat16", ulps=3)


def test_what_the_backward_pass_computes_again_changes_no_gradient(perturbed):
    params, _ = perturbed(Llama(SMALL), TOKENS)
    batch = {"inputs": TOKENS, "targets": np.roll(TOKENS, -1, 1)}

    def gradients(remat):
        model = Llama(dataclasses.replace(SMALL, remat=remat))
        loss_fn = linen.loss_from(model, F.softmax_cross_entropy)
        return jax.grad(lambda p: loss_fn(p, batch)[0])

    none, dots, full = (
        products(jax.make_jaxpr(gradients(remat))(params).jaxpr)
        for remat in ("none", "dots", "full")
    )
    # Beside seven products with a weight, a block has attention's two; the last is only added.
    assert (dots - none, full - none) == (2, 2 + 6)
    kept, again = (jax.jit(gradients(remat))(params) for remat in ("none", "full"))
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(again)):
        eight_units = 1e-6 * np.abs(np.asarray(one)).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=eight_units)


def test_each_layers_parameters_are_made_whole_in_the_loop(perturbed, apply):
    params, _ = perturbed(Llama(SMALL), TOKENS)
    # They lie in another form than the model's: halved, and in one dimension.
    stored = jax.tree.map(lambda leaf: leaf.reshape(SMALL.depth, -1) / 2, params["layers"])
    shapes = jax.tree.map(lambda leaf: leaf.shape[1:], params["layers"])

    def whole(layer):
        parts = jax.tree.leaves(layer)
        assert all(part.ndim == 1 for part in parts)
        sides = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
        made = [2 * part.reshape(shape) for part, shape in zip(parts, sides, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(layer), made)

    model = Llama(SMALL, whole)
    logits = jax.jit(model.apply)({"params": {**params, "layers": stored}}, TOKENS)
    np.testing.assert_array_equal(logits, apply(Llama(SMALL), {"params": params}, TOKENS))


def test_rotated_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    x, y = (np.tile(rng.normal(size=16).astype(np.float32), (1, 9, 1, 1)) for _ in range(2))
    rotary = jax.jit(F.rotary)
    products = np.einsum("bsnh,btnh->st", rotary(x), rotary(y))
    for offset in range(-8, 9):
        np.testing.assert_allclose(np.ptp(np.diagonal(products, offset)), 0, atol=1e-5)
    far = F.rotary(jnp.ones((1, 4097, 1, 16), jnp.bfloat16))[0, 4096, 0]
    np.testing.assert_allclose(far, turned(np.ones(16), 4096), atol=2**-7)  # bfloat16's rounding


def test_the_large_ones_have_their_published_sizes():
    for config, size in ((LLAMA_1B, 1_263_634_432), (LLAMA_7B, 7_241_732_096)):
        params, _ = jax.eval_shape(lambda c=config: linen.init(Llama(c), jax.random.key(0), TOKENS))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 4}, "6 heads cannot share 4 kv_heads"),
        ({"remat": "some"}, "'some' is unknown; choose one of none, dots, full"),
        ({"attention": "flash"}, "'flash' is unknown; choose one of auto, xla, cudnn"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
