"""Ten plays of Shakespeare, byte by byte, with a small GPT in float32: the reference of the 16-bit runs.

Trains: what text_gpt_bfloat16 trains, forward and backward in float32.
Command: python scripts/train.py configs/text_gpt_float32.py
Hardware and time: two CPU cores, half a minute.
Expected: 2.27 nats a byte on the held-out text, as in the other precisions to within 0.02.
"""

import dataclasses

from configs import text_gpt_bfloat16
from jaxmp.run.config import Config


def get_config() -> Config:
    """The experiment."""
    return dataclasses.replace(text_gpt_bfloat16.get_config(), policy="float32")
