"""Handwritten digits with a small residual CNN with BatchNorm in float16, by SGD with momentum.

Trains: three stages of one residual block, 16 to 64 channels, on 1500 images of 8x8 pixels moved by
    up to one pixel; tests on 297 images by other writers. Float16 with dynamic loss scaling; running
    statistics stay float32 and are held on skipped steps. After arXiv 1512.03385; the optimizer is
    the recipe for small convolutional nets.
Command: python scripts/train.py configs/digits_resnet_float16.py
Hardware and time: two CPU cores, under a minute.
Expected: 96.9% on the test images, the mean of seeds 0 to 4 (96.0% to 97.6%).
"""

from jaxmp.nn.models.resnet import ResNetConfig
from jaxmp.run.config import Config, OptimizerConfig
from jaxmp.run.data import DigitsConfig


def get_config() -> Config:
    """The experiment."""
    return Config(
        model=ResNetConfig(num_classes=10, stages=(1, 1, 1), width=16),
        data=DigitsConfig(shift=1),
        steps=400,
        batch_size=128,
        policy="mixed_float16",
        optimizer=OptimizerConfig(
            name="sgd", learning_rate=0.1, warmup=0.05, weight_decay=5e-4, momentum=0.9, clip=0
        ),
    )
