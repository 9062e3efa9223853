"""ResNet-50 in bfloat16 at the size of ImageNet, by SGD with momentum.

Trains: 25.6 million parameters on made-up images of 224x224 pixels in 1000 classes (ImageNet does not
    come with the package): a step costs what it costs on ImageNet, the accuracy means nothing.
    After arXiv 1512.03385 and 1706.02677; running statistics stay float32.
Command: python scripts/train.py configs/imagenet_resnet50_bfloat16.py
    and, beforehand: python scripts/plan.py configs/imagenet_resnet50_bfloat16.py --target gpu-h100
Hardware and time: planned, never run. One GPU or TPU chip, or several (data parallel); `plan.py`
    prints the least time of a step. Not for a CPU.
Expected: not measured.
"""

from jaxmp.nn.models.resnet import ResNetConfig
from jaxmp.run.config import Config, OptimizerConfig
from jaxmp.run.data import PatternsConfig


def get_config() -> Config:
    """The experiment."""
    return Config(
        model=ResNetConfig(1000, (3, 4, 6, 3), 64, "bottleneck", "imagenet"),
        data=PatternsConfig(size=224, classes=1000),
        steps=112_600,
        batch_size=256,
        policy="mixed_bfloat16",
        mesh="data=-1",
        optimizer=OptimizerConfig(
            name="sgd", learning_rate=0.1, warmup=6250, weight_decay=5e-4, momentum=0.9, clip=0
        ),
    )
