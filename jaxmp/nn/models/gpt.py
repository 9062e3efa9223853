"""A GPT-2 style decoder: tokens in, next-token logits out."""

from __future__ import annotations

import dataclasses

from flax import linen as nn
from jax import Array

from jaxmp.nn import functional as F
from jaxmp.nn import layers

LOGITS = ("float32", "compute")


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of a decoder; the default is small enough for two CPU cores."""

    vocab_size: int = 256
    context: int = 128
    """Longest sequence, the number of learned positions."""
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
    """On the embeddings and both residual branches, not on attention weights."""
    tied: bool = True
    """Whether the output layer is the transpose of the token embedding."""
    attention: str = "auto"
    """"auto", "xla" or "cudnn", see `layers.ATTENTION_CHOICES`."""
    remat: str = "none"
    """What the backward pass computes again, see `layers.REMAT`."""
    block: str = "pre_ln"
    """"pre_ln", "post_ln", "weighted" or "lipsformer", see `layers.BLOCKS`."""
    qk_norm: bool = False
    """Whether queries and keys are normalised, which caps attention's logits."""
    logits: str = "float32"
    """"float32", or "compute" for the activations' dtype: half the size of the step's largest
    array, 3 of 35 GB moved for GPT-2 124M (H100, 8x1024 tokens). The loss is float32 either way."""

    def __post_init__(self) -> None:
        layers.check_transformer(self.width, self.heads, self.dropout, self.attention)
        layers.check_block(self.block, self.qk_norm)
        layers.check_remat(self.remat)
        if self.logits not in LOGITS:
            raise ValueError(
                f"logits {self.logits!r} is unknown; choose one of {', '.join(LOGITS)}."
            )


GPT2_124M = GPTConfig(vocab_size=50257, context=1024, width=768, depth=12, heads=12)
"""The smallest GPT-2: 124,439,808 parameters."""


class GPT(nn.Module):
    """inputs [B, T] of integer tokens -> logits [B, T, vocab_size], float32 by default.

    Activations have the dtype of the token embedding. Source: Radford et al. 2019 (GPT-2);
    normal(0.02) everywhere, times 1/sqrt(2 depth) for what is added to the residual stream.
    """

    config: GPTConfig

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Array:
        config = self.config
        length = inputs.shape[1]
        if length > config.context:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the context {config.context}; "
                "shorten it or raise `context`."
            )
        normal = nn.initializers.normal(0.02)
        embed = layers.Embed(config.vocab_size, config.width, normal, name="tokens")
        positions = self.param("positions", normal, (config.context, config.width))
        x_BTD = F.add_bias(embed(inputs), positions[:length])
        x_BTD = nn.Dropout(config.dropout, deterministic=not train)(x_BTD)
        block = layers.remat(layers.TransformerBlock, config.remat, static=(2,))
        for layer in range(config.depth):
            x_BTD = block(
                heads=config.heads,
                mlp_width=config.mlp_ratio * config.width,
                causal=True,
                implementation=config.attention,
                dropout=config.dropout,
                kernel_init=normal,
                output_init=nn.initializers.normal(0.02 * (2 * config.depth) ** -0.5),
                block=config.block,
                alpha=1 / config.depth,
                qk_norm=config.qk_norm,
                name=f"TransformerBlock_{layer}",
            )(x_BTD, train)
        x_BTD = layers.BLOCKS[config.block].before(name="final_norm")(x_BTD)
        wide = config.logits == "float32"
        if config.tied:
            return embed.logits(x_BTD, wide)
        head = layers.Dense(config.vocab_size, normal, use_bias=False, logits=wide, name="head")
        return head(x_BTD)
