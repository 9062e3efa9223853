"""The functions of `lipschitz` as NNX modules: parameters, randomness and state added, no arithmetic.

Import it by its own name, `import jaxmp.nn.lipschitz_nnx`: NNX costs a second, and only its users pay
it. `lipschitz_layers` has the same in Linen.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxmp.nn import functional as F
from jaxmp.nn import lipschitz

XAVIER, LECUN = nnx.initializers.xavier_uniform(), nnx.initializers.lecun_normal()


class CenterNorm(nnx.Module):
    """Subtracts the mean over the last axis, with learned scale and bias: `lipschitz.center_norm`."""

    def __init__(self, features: int) -> None:
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Array) -> Array:
        return lipschitz.center_norm(x, self.scale[...], self.bias[...])


class RMSNorm(nnx.Module):
    """Divides by the root mean square over the last axis, with a learned scale: `lipschitz.rms_norm`."""

    def __init__(self, features: int, epsilon: float = 1e-6) -> None:
        self.scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        return lipschitz.rms_norm(x, self.scale[...], self.epsilon)


class QKNorm(nnx.Module):
    """Normalises query and key [..., features], each with a learned scale: `lipschitz.qk_norm`."""

    def __init__(self, features: int, epsilon: float = 1e-6) -> None:
        self.query_scale = nnx.Param(jnp.ones(features))
        self.key_scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, query: Array, key: Array) -> tuple[Array, Array]:
        scales = self.query_scale[...], self.key_scale[...]
        return lipschitz.qk_norm(query, key, *scales, self.epsilon)


class CosineSelfAttention(nnx.Module):
    """Self-attention on x [B, T, D] that compares directions: `lipschitz.cosine_attention`."""

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        causal: bool = False,
        tau: float = 10.0,
        epsilon: float = 1e-6,
        kernel_init: Initializer = XAVIER,
        rngs: nnx.Rngs,
    ) -> None:
        if features % heads:
            raise ValueError(f"{features} features cannot be split among {heads} heads.")
        self.qkv = nnx.Linear(features, 3 * features, kernel_init=kernel_init, rngs=rngs)
        self.out = nnx.Linear(features, features, kernel_init=kernel_init, rngs=rngs)
        self.heads, self.causal, self.tau, self.epsilon = heads, causal, tau, epsilon

    def __call__(self, x: Array) -> Array:
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        query, key, value = (part.reshape(*x.shape[:2], self.heads, -1) for part in parts)
        y = lipschitz.cosine_attention(
            query, key, value, causal=self.causal, tau=self.tau, epsilon=self.epsilon
        )
        return self.out(y.reshape(x.shape))


class WeightedResidual(nnx.Module):
    """Gives x + alpha * branch, alpha learned for each channel from `alpha` (1/depth)."""

    def __init__(self, features: int, alpha: float) -> None:
        self.alpha = nnx.Param(jnp.full(features, alpha))

    def __call__(self, x: Array, branch: Array) -> Array:
        return lipschitz.weighted_residual(x, branch, self.alpha[...])


class DropPath(nnx.Module):
    """Drops whole examples of a branch in training, by the stream "dropout": `lipschitz.drop_path`."""

    def __init__(self, rate: float, *, rngs: nnx.Rngs) -> None:
        self.rate, self.deterministic = rate, False
        self.rngs = rngs["dropout"].fork()

    def __call__(self, x: Array) -> Array:
        if self.deterministic or self.rate == 0:
            return x
        return lipschitz.drop_path(x, self.rate, self.rngs())


class Spectral(nnx.Variable):
    """A singular vector that power iterations carry along; not trained."""


class SigmaLinear(nnx.Module):
    """x [..., D] times gamma * kernel / sigma(kernel), plus bias: `lipschitz.sigma_reparametrise`.

    Singular vectors move by one power iteration a call in training and stand still after `eval()`, as
    running statistics do, and by the same flag.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: Initializer = LECUN,
        rngs: nnx.Rngs,
    ) -> None:
        kernel = kernel_init(rngs.params(), (in_features, out_features), jnp.float32)
        self.kernel, self.gamma = nnx.Param(kernel), nnx.Param(jnp.ones(()))
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.u, self.v = map(Spectral, lipschitz.singular_pair(kernel, rngs.params()))
        self.use_running_average = False

    def __call__(self, x: Array) -> Array:
        kernel, pair = self.kernel[...], lipschitz.SingularPair(self.u[...], self.v[...])
        if not self.use_running_average:
            pair = lipschitz.power_step(kernel, pair)
            self.u[...], self.v[...] = pair
        matrix = lipschitz.sigma_reparametrise(kernel, self.gamma[...], pair)
        return F.add_bias(F.dot("...d,df->...f", x, matrix), self.bias[...])


class SoftCap(nnx.Module):
    """Keeps values within +-cap: `lipschitz.soft_cap`."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def __call__(self, x: Array) -> Array:
        return lipschitz.soft_cap(x, self.cap)


class ZLoss(nnx.Module):
    """The scalar `lipschitz.z_loss` of logits, for models that give their own loss."""

    def __init__(self, coefficient: float = 1e-4) -> None:
        self.coefficient = coefficient

    def __call__(self, logits: Array) -> Array:
        return lipschitz.z_loss(logits, self.coefficient)
