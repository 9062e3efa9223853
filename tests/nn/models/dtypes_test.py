"""Every product of every model has 16-bit operands, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

from jaxmp.nn import functional as F
from jaxmp.nn import linen, models

IMAGES = jnp.zeros((2, 16, 16, 3))
TOKENS = jnp.zeros((2, 8), jnp.int32)
MODELS = {
    "mlp": (models.MLP(models.MLPConfig(dropout=0.1)), IMAGES),
    "vit": (models.VisionTransformer(models.ViTConfig(depth=2, dropout=0.1)), IMAGES),
    "vit_class_token": (models.VisionTransformer(models.ViTConfig(pool="class_token")), IMAGES),
    **{
        f"vit_{block}": (models.VisionTransformer(models.ViTConfig(depth=2, block=block)), IMAGES)
        for block in ("post_ln", "weighted", "lipsformer")
    },
    "gpt_qk_norm": (models.GPT(models.GPTConfig(depth=2, qk_norm=True)), TOKENS),
    "resnet": (models.ResNet(models.ResNetConfig()), IMAGES),
    "resnet_bottleneck": (
        models.ResNet(models.ResNetConfig(block="bottleneck", stem="imagenet")),
        IMAGES,
    ),
    "gpt": (models.GPT(models.GPTConfig(depth=2, dropout=0.1)), TOKENS),
    "llama": (models.Llama(models.LlamaConfig(depth=2)), TOKENS),
    "gpt_untied": (models.GPT(models.GPTConfig(depth=2, tied=False)), TOKENS),
}


def equations(jaxpr):
    """Yields all equations of a jaxpr, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("name", MODELS)
def test_products_have_16_bit_operands_and_gradients_the_dtype_of_parameters(name, dtype):
    model, inputs = MODELS[name]
    params, model_state = jax.eval_shape(lambda: linen.init(model, jax.random.key(0), inputs))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    if jnp.issubdtype(inputs.dtype, jnp.floating):
        inputs = inputs.astype(dtype)
    targets = jnp.zeros(inputs.shape if inputs.ndim == 2 else inputs.shape[:1], jnp.int32)
    loss_fn = linen.loss_from(model, F.softmax_cross_entropy)

    def gradients(params, model_state):
        batch = {"inputs": inputs, "targets": targets}
        return jax.grad(loss_fn, has_aux=True)(params, batch, jax.random.key(0), model_state)

    with jax.numpy_dtype_promotion("strict"):
        jaxpr, (grads, _) = jax.make_jaxpr(gradients, return_shape=True)(half, model_state)
    products = [
        eqn
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert len(products) > 8
    for eqn in products:
        assert {str(v.aval.dtype) for v in eqn.invars} == {dtype}, eqn
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(grads)} == {dtype}
