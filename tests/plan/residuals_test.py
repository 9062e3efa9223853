"""What the backward pass keeps, against what was kept by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxmp.plan import residuals

BF16 = jnp.bfloat16
PARAMS = {
    "a": jax.ShapeDtypeStruct((64, 128), BF16),
    "b": jax.ShapeDtypeStruct((128, 8), BF16),
}
X = jax.ShapeDtypeStruct((32, 64), BF16)


@jax.custom_vjp
def activation(x):
    return jnp.maximum(x, 0)


activation.defvjp(lambda x: (activation(x), x), lambda x, g: (jnp.where(x > 0, g, 0),))


def block(params, x):
    return activation(x @ params["a"]) @ params["b"]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # The activation's input, and its output, which the second product reads; arguments do not count.
        (lambda params, x: jnp.sum(block(params, x)), 2 * 32 * 128 * 2),
        (lambda params, x: jnp.sum(jax.checkpoint(block)(params, x)), 0),
        # A loss with something beside it; three layers of a loop keep three times one's.
        (lambda params, x: (jnp.sum(block(params, x)), {"aux": x}), 2 * 32 * 128 * 2),
        (
            lambda params, x: jax.lax.scan(
                lambda sum, row: (sum + jnp.sum(block(params, row)), None), jnp.zeros((), BF16),
                jnp.stack([x, x, x]),
            )[0],
            3 * (2 * 32 * 128 * 2 + 32 * 64 * 2),
        ),
    ],
    ids=["plain", "remat", "aux", "scan"],
)  # fmt: skip
def test_what_is_kept_is_counted_once_and_arguments_not_at_all(loss, expected):
    assert residuals.residual_bytes(loss, PARAMS, X) == expected
