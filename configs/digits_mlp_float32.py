"""Handwritten digits with a small multilayer perceptron in float32: the reference of the two 16-bit variants.

Trains: 64-256-256-10 units on 1500 images of 8x8 pixels; tests on 297 images by other writers.
Command: python scripts/train.py configs/digits_mlp_float32.py
Hardware and time: two CPU cores, under 10 seconds.
Expected: 92% on the test images, within 1 point of bfloat16 and float16 (mean of five seeds).
"""

from jaxmp.nn.models.mlp import MLPConfig
from jaxmp.run.config import Config, OptimizerConfig
from jaxmp.run.data import DigitsConfig


def get_config() -> Config:
    """The experiment."""
    return Config(
        model=MLPConfig(num_classes=10, width=256, depth=2),
        data=DigitsConfig(),
        steps=400,
        batch_size=128,
        policy="float32",
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.05, weight_decay=0.05),
    )
