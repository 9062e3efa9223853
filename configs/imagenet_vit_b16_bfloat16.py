"""ViT-B/16 in bfloat16 at the size of ImageNet.

Trains: 86.6 million parameters on made-up images of 224x224 pixels in 1000 classes (ImageNet does not
    come with the package): a step costs what it costs on ImageNet, the accuracy means nothing.
    After arXiv 2010.11929.
Command: python scripts/train.py configs/imagenet_vit_b16_bfloat16.py
    and, beforehand: python scripts/plan.py configs/imagenet_vit_b16_bfloat16.py --target gpu-h100
Hardware and time: planned, never run. One GPU or TPU chip, or several (data parallel); `plan.py`
    prints the least time of a step. Not for a CPU.
Expected: not measured.
"""

from jaxmp.nn.models.vit import ViTConfig
from jaxmp.run.config import Config, OptimizerConfig
from jaxmp.run.data import PatternsConfig


def get_config() -> Config:
    """The experiment."""
    return Config(
        model=ViTConfig(1000, patch=16, width=768, depth=12, heads=12, pool="class_token"),
        data=PatternsConfig(size=224, classes=1000),
        steps=90_000,
        batch_size=256,
        policy="mixed_bfloat16",
        mesh="data=-1",
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup=10_000, weight_decay=0.1, b2=0.999, clip=1.0
        ),
    )
