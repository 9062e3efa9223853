"""An experiment that float16 fails without loss scaling: digits with the gradients of an enormous batch.

Trains: what digits_mlp_float32 trains, as one of 524,288 identical workers with 128 images each that
    average their losses over the global batch of 2^26 images. The derivative of that loss with
    respect to a logit is at most 2^-26, and float16 rounds what is not above 2^-25 to zero.
    (Micikevicius et al. 2018, arXiv 1710.03740.)
Command: python scripts/train.py configs/digits_mlp_replicas_float16.py
    and, to see it fail: --loss_scale.kind none --workdir runs/without_loss_scale
Hardware and time: two CPU cores, under 10 seconds.
Expected: 92% on the test images, as in float32. Without loss scaling the gradient of every weight is
    exactly zero and none moves by a bit (only the ten biases behind the last product do, summed in
    float32), and the test accuracy stays at chance, about 10%.
"""

import dataclasses

from configs import digits_mlp_float32
from jaxmp.run.config import Config, LossScaleConfig

GLOBAL_BATCH = 2**26


def get_config() -> Config:
    """The experiment."""
    base = digits_mlp_float32.get_config()
    return dataclasses.replace(
        base,
        policy="mixed_float16",
        replicas=GLOBAL_BATCH // base.batch_size,
        # Decay would shrink the parameters that no gradient reaches.
        optimizer=dataclasses.replace(base.optimizer, weight_decay=0.0),
        # 400 steps are few: let the scale find its height soon.
        loss_scale=LossScaleConfig(period=50),
    )
