"""A vision transformer: patches, learned positions, blocks of a chosen kind, pooled into one vector."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jaxmp.nn import functional as F
from jaxmp.nn import init, layers, lipschitz

POOLINGS = ("mean", "class_token")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer; the default fits 8x8 digits."""

    num_classes: int = 10
    patch: int = 2
    """Height and width of a patch in pixels; must divide the image's."""
    width: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    pool: str = "mean"
    """"mean" over the patches or a learned "class_token"."""
    dropout: float = 0.0
    attention: str = "auto"
    """"auto", "xla" or "cudnn", see `layers.ATTENTION_CHOICES`."""
    remat: str = "none"
    """What the backward pass computes again, see `layers.REMAT`."""
    block: str = "pre_ln"
    """"pre_ln", "post_ln", "weighted" or "lipsformer", see `layers.BLOCKS`."""
    qk_norm: bool = False
    """Whether queries and keys are normalised, which caps attention's logits."""
    drop_path: float = 0.0
    """Share of examples that the last block's branches skip in training; less before, none at first."""
    position_scale: float = 0.02
    """Deviation of the learned positions at the start. A blank patch is no more than its position, and
    LayerNorm stretches a token of deviation s by 1/s: where blanks are common, 0.5 trains better."""
    spectral_init: bool = False
    """Whether the kernels before the head start with the operator norm 1, as LipsFormer's do."""

    def __post_init__(self) -> None:
        layers.check_transformer(self.width, self.heads, self.dropout, self.attention)
        layers.check_block(self.block, self.qk_norm)
        layers.check_remat(self.remat)
        layers.check_dropout(self.drop_path, "drop_path")
        if self.pool not in POOLINGS:
            raise ValueError(f"pool {self.pool!r} is unknown; choose one of {', '.join(POOLINGS)}.")


def patches_of(images: Array, patch: int) -> Array:
    """Gives images [B, H, W, C] (or [B, H, W]) as patches [B, H/patch * W/patch, patch^2 * C]."""
    if images.ndim == 3:
        images = images[..., None]
    batch, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(
            f"images of {height}x{width} pixels cannot be cut into patches of {patch}; "
            "choose a patch that divides both."
        )
    rows, columns = height // patch, width // patch
    x = images.reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


class VisionTransformer(nn.Module):
    """inputs [B, H, W, C] of floats -> logits [B, num_classes] in float32.

    Source: Dosovitskiy et al. 2021, arXiv 2010.11929; Xavier-uniform kernels and normal(0.02)
    positions as there, residual branches unscaled, a zero head.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Array:
        config = self.config
        scaled = init.spectral if config.spectral_init else lambda initializer: initializer
        xavier = scaled(nn.initializers.xavier_uniform())
        patches_BTP = patches_of(inputs, config.patch)
        x_BTD = layers.Dense(config.width, scaled(nn.initializers.lecun_normal()), name="patch")(
            patches_BTP
        )
        positions = nn.initializers.normal(config.position_scale)
        if config.pool == "class_token":
            token_D = self.param("class_token", nn.initializers.zeros, (config.width,))
            first_B1D = F.add_bias(jnp.zeros_like(x_BTD[:, :1]), token_D)
            x_BTD = jnp.concatenate([first_B1D, x_BTD], axis=1)
        x_BTD = F.add_bias(x_BTD, self.param("positions", positions, x_BTD.shape[1:]))
        x_BTD = nn.Dropout(config.dropout, deterministic=not train)(x_BTD)
        block = layers.remat(layers.TransformerBlock, config.remat, static=(2,))
        rates = lipschitz.drop_path_rates(config.depth, config.drop_path)
        for layer, drop_path in enumerate(rates):
            x_BTD = block(
                heads=config.heads,
                mlp_width=config.mlp_ratio * config.width,
                causal=False,
                implementation=config.attention,
                dropout=config.dropout,
                kernel_init=xavier,
                output_init=xavier,
                block=config.block,
                alpha=1 / config.depth,
                qk_norm=config.qk_norm,
                drop_path=drop_path,
                name=f"TransformerBlock_{layer}",
            )(x_BTD, train)
        x_BTD = layers.BLOCKS[config.block].before(name="final_norm")(x_BTD)
        x_BD = x_BTD[:, 0] if config.pool == "class_token" else jnp.mean(x_BTD, axis=1)
        head = layers.Dense(config.num_classes, nn.initializers.zeros, logits=True, name="head")
        return head(x_BD)
