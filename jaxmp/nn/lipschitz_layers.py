"""The functions of `lipschitz` as Linen layers: parameters, randomness and state added, no arithmetic."""

from __future__ import annotations

from flax import linen as nn
from jax import Array
from jax.nn.initializers import Initializer

from jaxmp.nn import functional as F
from jaxmp.nn import lipschitz


class CenterNorm(nn.Module):
    """Subtracts the mean over the last axis, with learned scale and bias: `lipschitz.center_norm`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return lipschitz.center_norm(x, scale, bias)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis, with a learned scale: `lipschitz.rms_norm`."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return lipschitz.rms_norm(x, scale, self.epsilon)


class QKNorm(nn.Module):
    """Normalises query and key [..., H], each with a learned scale: `lipschitz.qk_norm`."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, query: Array, key: Array) -> tuple[Array, Array]:
        query_scale = self.param("query_scale", nn.initializers.ones, query.shape[-1:])
        key_scale = self.param("key_scale", nn.initializers.ones, key.shape[-1:])
        return lipschitz.qk_norm(query, key, query_scale, key_scale, self.epsilon)


class WeightedResidual(nn.Module):
    """Gives x + alpha * branch, alpha learned for each channel from `alpha` (1/depth)."""

    alpha: float

    @nn.compact
    def __call__(self, x: Array, branch: Array) -> Array:
        alpha = self.param("alpha", nn.initializers.constant(self.alpha), x.shape[-1:])
        return lipschitz.weighted_residual(x, branch, alpha)


class DropPath(nn.Module):
    """Drops whole examples of a branch in training, by the key "dropout": `lipschitz.drop_path`."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if not train or self.rate == 0:
            return x
        return lipschitz.drop_path(x, self.rate, self.make_rng("dropout"))


class SigmaDense(nn.Module):
    """x [..., D] times gamma * kernel / sigma(kernel), plus bias: `lipschitz.sigma_reparametrise`.

    The collection "spectral" holds the singular vectors u and v, float32; training moves them by one
    power iteration a step, as running statistics do.
    """

    features: int
    kernel_init: Initializer = nn.initializers.lecun_normal()
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        gamma = self.param("gamma", nn.initializers.ones, ())
        start = lambda: lipschitz.singular_pair(kernel, self.make_rng("params"))
        stored = self.variable("spectral", "pair", start)
        if train and not self.is_initializing():
            stored.value = lipschitz.power_step(kernel, stored.value)
        y = F.dot("...d,df->...f", x, lipschitz.sigma_reparametrise(kernel, gamma, stored.value))
        if not self.use_bias:
            return y
        return F.add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,)))


class SoftCap(nn.Module):
    """Keeps values within +-cap: `lipschitz.soft_cap`."""

    cap: float

    def __call__(self, x: Array) -> Array:
        return lipschitz.soft_cap(x, self.cap)


class ZLoss(nn.Module):
    """The scalar `lipschitz.z_loss` of logits, for models that give their own loss."""

    coefficient: float = 1e-4

    def __call__(self, logits: Array) -> Array:
        return lipschitz.z_loss(logits, self.coefficient)
