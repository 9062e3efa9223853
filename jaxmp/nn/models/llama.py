"""A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, scanned layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax import Array

from jaxmp.nn import functional as F
from jaxmp.nn import layers


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a decoder; the default is small enough for two CPU cores."""

    vocab_size: int = 256
    context: int = 128
    """Longest sequence. Positions are angles, so nothing is learned for each."""
    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 2
    """Keys and values, each shared by heads / kv_heads queries."""
    mlp_width: int = 384
    rotary_base: float = 10000.0
    attention: str = "auto"
    """"auto", "xla" or "cudnn", see `layers.ATTENTION_CHOICES`."""
    remat: str = "full"
    """What the backward pass computes again, see `layers.REMAT`."""

    def __post_init__(self) -> None:
        layers.check_transformer(self.width, self.heads, 0.0, self.attention)
        layers.check_remat(self.remat)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} kv_heads; choose a divisor of heads."
            )


LLAMA_1B = LlamaConfig(32000, 2048, 2048, 24, 16, 8, 5632)
"""1,263,634,432 parameters."""
LLAMA_7B = LlamaConfig(32000, 2048, 4096, 32, 32, 8, 14336)
"""The sizes of Mistral 7B (arXiv 2310.06825): 7,241,732,096 parameters."""


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); no biases. Returns (x, None), as a scan wants it."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> tuple[Array, None]:
        config = self.config
        normal = nn.initializers.normal(0.02)
        output = nn.initializers.normal(0.02 * (2 * config.depth) ** -0.5)
        size = config.width // config.heads

        def dense(name: str, features: int, init: Any = normal) -> layers.Dense:
            return layers.Dense(features, init, use_bias=False, name=name)

        def heads(name: str, count: int) -> Array:
            return dense(name, count * size)(h_BTD).reshape(*h_BTD.shape[:2], count, size)

        h_BTD = layers.RMSNorm(name="attention_norm")(x_BTD)
        q_BTNH = F.rotary(heads("query", config.heads), config.rotary_base)
        k_BTKH = F.rotary(heads("key", config.kv_heads), config.rotary_base)
        v_BTKH = heads("value", config.kv_heads)
        implementation = layers.implementation(self, config.attention)
        y_BTNH = F.attention(q_BTNH, k_BTKH, v_BTKH, causal=True, implementation=implementation)
        x_BTD = x_BTD + dense("out", config.width, output)(y_BTNH.reshape(x_BTD.shape))
        h_BTD = layers.RMSNorm(name="mlp_norm")(x_BTD)
        gate_BTF, up_BTF = (dense(name, config.mlp_width)(h_BTD) for name in ("gate", "up"))
        return x_BTD + dense("down", config.width, output)(F.swiglu(gate_BTF, up_BTF)), None


class Llama(nn.Module):
    """inputs [B, T] of integer tokens -> logits [B, T, vocab_size] in float32.

    One block is compiled and run `depth` times: its parameters, under "layers", have a leading axis of
    that size. `whole` is applied to the parameters of one layer where they are used: a step whose devices
    each hold a part of every parameter gathers there (`training.exchange.layer_gatherer`), so that no
    device ever holds more than one layer, if `remat` is not "none".
    Source: Touvron et al. 2023, arXiv 2302.13971; Ainslie et al. 2023, arXiv 2305.13245.
    """

    config: LlamaConfig
    whole: Callable[[Any], Any] | None = None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        config = self.config
        length = inputs.shape[1]
        if length > config.context:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the context {config.context}; "
                "shorten it or raise `context`."
            )
        normal = nn.initializers.normal(0.02)
        x_BTD = layers.Embed(config.vocab_size, config.width, normal, name="tokens")(inputs)
        block: Any = LlamaBlock
        if self.whole is not None and not self.is_initializing():
            whole = self.whole
            in_loop = lambda variables: {"params": whole(variables["params"])}
            block = nn.map_variables(block, "params", trans_in_fn=in_loop)
        scanned = nn.scan(
            layers.remat(block, config.remat, scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.depth,
        )
        x_BTD, _ = scanned(config, name="layers")(x_BTD)
        x_BTD = layers.RMSNorm(name="final_norm")(x_BTD)
        head = layers.Dense(config.vocab_size, normal, use_bias=False, logits=True, name="head")
        return head(x_BTD)
