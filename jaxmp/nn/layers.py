"""Linen layers of the reference models: none has a dtype, each answers in the dtype it was given.

A layer's output has its input's dtype whatever its parameters' (an embedding's: its table's), so
a float32 parameter in a 16-bit model makes that one layer more exact and nothing after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxmp.nn import functional as F
from jaxmp.nn import lipschitz, lipschitz_layers

PRODUCT = "product with a weight"
"""The name under which `remat` finds results of `Dense`: inside `functional.dot` no policy sees them."""


class Dense(nn.Module):
    """x [..., D] times kernel [D, features], plus bias [features].

    With `logits` the result is float32 (the product's own sum, not rounded to 16 bits), which is
    what a loss should eat.
    """

    features: int
    kernel_init: Initializer = nn.initializers.lecun_normal()
    use_bias: bool = True
    logits: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        output_dtype = F.wide_dtype(x.dtype) if self.logits else x.dtype
        y = checkpoint_name(F.dot("...d,df->...f", x, kernel, output_dtype), PRODUCT)
        if not self.use_bias:
            return y
        return F.add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,)))


class Embed(nn.Module):
    """Rows of a learned table [vocabulary, features]; the result has the table's dtype."""

    vocabulary: int
    features: int
    embedding_init: Initializer = nn.initializers.normal(0.02)

    def setup(self) -> None:
        shape = (self.vocabulary, self.features)
        self.embedding = self.param("embedding", self.embedding_init, shape)

    def __call__(self, indices: Array) -> Array:
        return F.embed(self.embedding, indices)

    def logits(self, x: Array, wide: bool = True) -> Array:
        """Gives x [..., D] times the table's transpose, `wide` in float32: a tied output layer."""
        output_dtype = F.wide_dtype(x.dtype) if wide else x.dtype
        return F.dot("...d,vd->...v", x, self.embedding, output_dtype)


class LayerNorm(nn.Module):
    """Normalises the last axis with learned scale and bias; statistics in float32."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return F.layer_norm(x, scale, bias, self.epsilon)


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis, with a learned scale; the mean in float32."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return F.rms_norm(x, scale, self.epsilon)


class BatchNorm(nn.Module):
    """Normalises each channel of x [..., C] over all other axes.

    Statistics of the batch and the running ones (collection "batch_stats": mean and var, biased)
    are float32. Training updates running = momentum * running + (1 - momentum) * batch.

    Mean and variance come from one pass over x: a ResNet-50 step moves a tenth less memory than
    with two. E[x^2] - E[x]^2 cancels where |mean| >> deviation; so x is taken about the running
    mean r, var = E[(x - r)^2] - E[x - r]^2: true for any r, and harmless once r is near the mean.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        shape = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if not train:
            mean, variance = running_mean.value, running_var.value
        else:
            axes = tuple(range(x.ndim - 1))
            centred = x.astype(F.wide_dtype(x.dtype)) - running_mean.value
            shift = jnp.mean(centred, axes)
            mean = running_mean.value + shift
            variance = jnp.maximum(jnp.mean(jnp.square(centred), axes) - jnp.square(shift), 0)
            if not self.is_initializing():
                for running, batch in ((running_mean, mean), (running_var, variance)):
                    blend = self.momentum * running.value + (1 - self.momentum) * batch
                    running.value = jax.lax.stop_gradient(blend).astype(jnp.float32)
        return F.batch_norm(x, mean, variance, scale, bias, self.epsilon)


class Conv(nn.Module):
    """Convolves x [B, H, W, C] with a square kernel, "SAME" padding and no bias (BatchNorm's)."""

    features: int
    size: int = 3
    stride: int = 1
    kernel_init: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        dtype = F.common_dtype(x.dtype, kernel.dtype)
        y = jax.lax.conv_general_dilated(
            x.astype(dtype),
            kernel.astype(dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y.astype(x.dtype)


ATTENTION = "attention"
"""The collection in which instruments find {"query", "key", "causal"} of every layer: [B, T, N, H] twice,
such that the logits are query key^T / sqrt(H), and a flag. Sown only where a caller makes it mutable."""


ATTENTION_CHOICES = ("auto", *F.ATTENTION_IMPLEMENTATIONS)
"""Settings of a transformer's attention: an implementation of `functional.attention`, or "auto", which a
launcher replaces by the fused one where its target has it (`resolve_attention`) and is "xla" otherwise."""

REMAT = ("none", "dots", "full")
"""What the backward pass of a block computes again: nothing, all but its matrix products with a weight, or
all but its input."""


class SelfAttention(nn.Module):
    """Multi-head self-attention on x [B, T, D]: one product for query, key and value, one out.

    `cosine` compares directions (`lipschitz.cosine_attention`), `qk_norm` caps the logits of the dot
    product (`lipschitz.qk_norm`).
    """

    heads: int
    causal: bool
    implementation: str
    kernel_init: Initializer
    output_init: Initializer
    cosine: bool = False
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        batch, length, width = x_BTD.shape
        qkv = Dense(3 * width, self.kernel_init, name="qkv")(x_BTD)
        q_BTNH, k_BTNH, v_BTNH = (
            part.reshape(batch, length, self.heads, width // self.heads)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        if self.qk_norm:
            q_BTNH, k_BTNH = lipschitz_layers.QKNorm(name="qk_norm")(q_BTNH, k_BTNH)
        if self.is_mutable_collection(ATTENTION) and not self.is_initializing():
            operands = lipschitz.cosine_operands if self.cosine else lambda q, k: (q, k)
            query, key = operands(q_BTNH, k_BTNH)
            self.sow(
                ATTENTION, "seen", {"query": query, "key": key, "causal": jnp.array(self.causal)}
            )
        kind = implementation(self, self.implementation)
        attend = lipschitz.cosine_attention if self.cosine else F.attention
        y_BTNH = attend(q_BTNH, k_BTNH, v_BTNH, causal=self.causal, implementation=kind)
        return Dense(width, self.output_init, name="out")(y_BTNH.reshape(batch, length, width))


def implementation(module: nn.Module, attention: str) -> str:
    """Gives the implementation of attention that a module runs now, for a setting of `ATTENTION_CHOICES`.

    Parameters are made in float32 and maybe on another machine: cudnn can do neither.
    """
    return "xla" if attention == "auto" or module.is_initializing() else attention


def resolve_attention(attention: str, platform: str, dtype: DTypeLike, head_size: int) -> str:
    """Gives "cudnn" for the setting "auto" where it runs, else "xla"; other settings as they are.

    It runs on GPUs (`platform` is JAX's name, "cuda" or "gpu"), in 16 bits, and for heads of a size of at
    most 128 that 8 divides. The platform is the target's, which need not be the machine at hand.
    """
    if attention != "auto":
        return attention
    fused = platform in ("cuda", "gpu") and jnp.dtype(dtype).itemsize == 2
    return "cudnn" if fused and head_size <= 128 and head_size % 8 == 0 else "xla"


def remat(module: Any, policy: str, *, scanned: bool = False, static: tuple[int, ...] = ()) -> Any:
    """Gives the module class, its backward pass computing again what `policy` of `REMAT` does not keep.

    `scanned`: it is the body of a loop. `static`: numbers of arguments that are no arrays (0 is `self`).
    """
    if policy == "none":
        return module
    kept = jax.checkpoint_policies.save_only_these_names(PRODUCT) if policy == "dots" else None
    return nn.remat(module, policy=kept, prevent_cse=not scanned, static_argnums=static)


def _nothing(name: str | None = None) -> Callable[[Array], Array]:
    """Stands where a block has no norm."""
    del name
    return lambda x: x


@dataclasses.dataclass(frozen=True)
class Block:
    """What sets the kinds of transformer block apart; the rest is the same in all."""

    before: Callable[..., Any] = _nothing
    """The norm through which branches, and the head, read the residual stream."""
    after: Callable[..., Any] = _nothing
    """The norm of the stream after each addition."""
    weighted: bool = False
    """Whether a branch is added as alpha * branch, alpha learned for each channel from 1/depth."""
    cosine: bool = False
    """Whether attention compares directions, values normalised, instead of dot products."""


BLOCKS = {
    "pre_ln": Block(before=LayerNorm),
    "post_ln": Block(after=LayerNorm),
    "weighted": Block(before=LayerNorm, weighted=True),
    "lipsformer": Block(after=lipschitz_layers.CenterNorm, weighted=True, cosine=True),
}
"""GPT-2's (arXiv 2002.04745), the first transformer's (1706.03762), pre-LN with a weighted residual,
and LipsFormer's (2304.09856): the norm's place is that of its released code."""


class TransformerBlock(nn.Module):
    """Attention, then a two-layer MLP, each added to its input: after(x + alpha * branch(before(x))).

    `block` names the kind in `BLOCKS`; dropout, and for whole examples drop-path, on both branches.
    """

    heads: int
    mlp_width: int
    causal: bool
    implementation: str
    dropout: float
    kernel_init: Initializer
    output_init: Initializer
    block: str = "pre_ln"
    alpha: float = 1.0
    """Where a weighted residual's alpha starts, 1/depth."""
    qk_norm: bool = False
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x_BTD: Array, train: bool) -> Array:
        kind = BLOCKS[self.block]
        attend = SelfAttention(
            self.heads,
            self.causal,
            self.implementation,
            self.kernel_init,
            self.output_init,
            kind.cosine,
            self.qk_norm,
        )
        for branch in (attend, self._mlp):
            y_BTD = branch(kind.before()(x_BTD))
            y_BTD = nn.Dropout(self.dropout, deterministic=not train)(y_BTD)
            y_BTD = lipschitz_layers.DropPath(self.drop_path)(y_BTD, train)
            if kind.weighted:
                x_BTD = lipschitz_layers.WeightedResidual(self.alpha)(x_BTD, y_BTD)
            else:
                x_BTD = x_BTD + y_BTD
            x_BTD = kind.after()(x_BTD)
        return x_BTD

    def _mlp(self, x_BTD: Array) -> Array:
        h_BTF = F.gelu(Dense(self.mlp_width, self.kernel_init)(x_BTD))
        return Dense(x_BTD.shape[-1], self.output_init)(h_BTF)


def check_block(block: str, qk_norm: bool) -> None:
    """Raises ValueError, a sentence, unless there is such a block."""
    if block not in BLOCKS:
        raise ValueError(f"block {block!r} is unknown; choose one of {', '.join(BLOCKS)}.")
    if qk_norm and BLOCKS[block].cosine:
        raise ValueError(
            f"block {block!r} normalises queries and keys by itself; leave qk_norm off."
        )


def check_transformer(width: int, heads: int, dropout: float, attention: str) -> None:
    """Raises ValueError, a sentence, if the settings of a transformer cannot be built."""
    if heads < 1 or width % heads:
        raise ValueError(
            f"width {width} cannot be split among {heads} heads; "
            "choose a width that is a multiple of heads."
        )
    if attention not in ATTENTION_CHOICES:
        raise ValueError(
            f"attention {attention!r} is unknown; choose one of {', '.join(ATTENTION_CHOICES)}."
        )
    check_dropout(dropout)


def check_remat(policy: str) -> None:
    """Raises ValueError, a sentence, unless there is such a policy."""
    if policy not in REMAT:
        raise ValueError(f"remat {policy!r} is unknown; choose one of {', '.join(REMAT)}.")


def check_dropout(rate: float, name: str = "dropout") -> None:
    """Raises ValueError, a sentence, unless 0 <= rate < 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} {rate} is not in [0, 1); 0 switches it off.")
