"""A multilayer perceptron for flat vectors or small images."""

from __future__ import annotations

import dataclasses

import jax
from flax import linen as nn
from jax import Array

from jaxmp.nn import functional as F
from jaxmp.nn import layers

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": F.gelu, "tanh": jax.numpy.tanh}


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """`depth` hidden layers of `width` units."""

    num_classes: int = 10
    width: int = 256
    depth: int = 2
    activation: str = "relu"
    """"relu", "gelu" or "tanh"."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} is unknown; "
                f"choose one of {', '.join(ACTIVATIONS)}."
            )
        layers.check_dropout(self.dropout)


class MLP(nn.Module):
    """inputs [B, ...] of floats -> logits [B, num_classes] in float32.

    Initialisation after He et al. 2015 (arXiv 1502.01852); the last layer has unit gain.
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Array:
        config = self.config
        x_BD = inputs.reshape(inputs.shape[0], -1)
        for _ in range(config.depth):
            x_BD = layers.Dense(config.width, nn.initializers.he_normal())(x_BD)
            x_BD = ACTIVATIONS[config.activation](x_BD)
            x_BD = nn.Dropout(config.dropout, deterministic=not train)(x_BD)
        return layers.Dense(config.num_classes, logits=True, name="head")(x_BD)
