"""Handwritten digits with a vision transformer in float32: the reference of the 16-bit runs.

Trains: what digits_vit_bfloat16 trains, forward and backward in float32.
Command: python scripts/train.py configs/digits_vit_float32.py
Hardware and time: two CPU cores, half a minute.
Expected: 95% on the test images, as in the other precisions.
"""

import dataclasses

from configs import digits_vit_bfloat16
from jaxmp.run.config import Config


def get_config() -> Config:
    """The experiment."""
    return dataclasses.replace(digits_vit_bfloat16.get_config(), policy="float32")
