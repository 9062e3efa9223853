"""Handwritten digits with a vision transformer in float16 with dynamic loss scaling.

Trains: what digits_vit_bfloat16 trains, forward and backward in float16.
Command: python scripts/train.py configs/digits_vit_float16.py
Hardware and time: two CPU cores, half a minute.
Expected: 95% on the test images, as in the other precisions.
"""

import dataclasses

from configs import digits_vit_bfloat16
from jaxmp.run.config import Config


def get_config() -> Config:
    """The experiment."""
    return dataclasses.replace(digits_vit_bfloat16.get_config(), policy="mixed_float16")
