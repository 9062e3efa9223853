"""A residual convolutional network with BatchNorm, from 8x8 digits to ImageNet."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jaxmp.nn import layers

BLOCKS = ("basic", "bottleneck")
STEMS = ("small", "imagenet")


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Blocks per stage; each stage after the first halves the image and doubles the width.

    ResNet-50 is `ResNetConfig(1000, (3, 4, 6, 3), 64, "bottleneck", "imagenet")`.
    """

    num_classes: int = 10
    stages: tuple[int, ...] = (1, 1, 1)
    width: int = 16
    block: str = "basic"
    """"basic": 3x3, 3x3; "bottleneck": 1x1, 3x3 (with the stride), 1x1 to four times the width."""
    stem: str = "small"
    """"small": one 3x3 convolution; "imagenet": 7x7 with stride 2, then 3x3 max-pooling by 2."""
    momentum: float = 0.9
    """Share of the old running statistics kept at a step."""

    def __post_init__(self) -> None:
        for name, value, choices in (("block", self.block, BLOCKS), ("stem", self.stem, STEMS)):
            if value not in choices:
                raise ValueError(
                    f"{name} {value!r} is unknown; choose one of {', '.join(choices)}."
                )
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"stages {self.stages} must name at least one block for each stage.")


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + branch(x)), the branch's last BatchNorm starting at zero.

    The stride sits on the 3x3 convolution (version 1.5), the zero scale after Goyal et al. 2017
    (arXiv 1706.02677): at the start the block is the identity.
    """

    features: int
    stride: int
    bottleneck: bool
    momentum: float

    @nn.compact
    def __call__(self, x_BHWC: Array, train: bool) -> Array:
        features_out = self.features * (4 if self.bottleneck else 1)
        if self.bottleneck:
            convs = [(self.features, 1, 1), (self.features, 3, self.stride), (features_out, 1, 1)]
        else:
            convs = [(self.features, 3, self.stride), (features_out, 3, 1)]
        y_BHWC = x_BHWC
        for index, (features, size, stride) in enumerate(convs):
            last = index == len(convs) - 1
            scale_init = nn.initializers.zeros if last else nn.initializers.ones
            y_BHWC = layers.Conv(features, size, stride)(y_BHWC)
            y_BHWC = layers.BatchNorm(self.momentum, scale_init=scale_init)(y_BHWC, train)
            y_BHWC = y_BHWC if last else jax.nn.relu(y_BHWC)
        if x_BHWC.shape != y_BHWC.shape:
            x_BHWC = layers.Conv(features_out, 1, self.stride, name="shortcut")(x_BHWC)
            x_BHWC = layers.BatchNorm(self.momentum, name="shortcut_norm")(x_BHWC, train)
        return jax.nn.relu(x_BHWC + y_BHWC)


class ResNet(nn.Module):
    """inputs [B, H, W, C] of floats -> logits [B, num_classes] in float32.

    Collection "batch_stats" holds the running statistics, in float32.
    Source: He et al. 2016, arXiv 1512.03385; initialisation arXiv 1502.01852.
    """

    config: ResNetConfig

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Array:
        config = self.config
        x_BHWC = inputs[..., None] if inputs.ndim == 3 else inputs
        size, stride = (3, 1) if config.stem == "small" else (7, 2)
        x_BHWC = layers.Conv(config.width, size, stride, name="stem")(x_BHWC)
        x_BHWC = layers.BatchNorm(config.momentum, name="stem_norm")(x_BHWC, train)
        x_BHWC = jax.nn.relu(x_BHWC)
        if config.stem == "imagenet":
            x_BHWC = nn.max_pool(x_BHWC, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(config.stages):
            for block in range(blocks):
                x_BHWC = ResidualBlock(
                    features=config.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=config.block == "bottleneck",
                    momentum=config.momentum,
                )(x_BHWC, train)
        x_BC = jnp.mean(x_BHWC, axis=(1, 2))
        return layers.Dense(config.num_classes, logits=True, name="head")(x_BC)
