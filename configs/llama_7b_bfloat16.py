"""A Llama-style model of 7.24 billion parameters in bfloat16, fully sharded over every device there is.

Trains: what llama_1b_bfloat16 trains, with the sizes of Mistral 7B (arXiv 2310.06825): 32 layers of
    width 4096, 32 heads on 8 keys. A device never holds more than one layer whole.
Command: python scripts/train.py configs/llama_7b_bfloat16.py
    and, beforehand: python scripts/plan.py configs/llama_7b_bfloat16.py --target tpu-v5e:4x4
Hardware and time: planned, never run. Sixteen TPU chips of 16 GB or eight H100; `plan.py` prints the
    least time of a step. Not for a CPU.
Expected: not measured. The loss starts at 10.4 nats, the log of the vocabulary.
"""

import dataclasses

from configs import llama_1b_bfloat16
from jaxmp.nn.models.llama import LLAMA_7B
from jaxmp.run.config import Config


def get_config() -> Config:
    """The experiment."""
    return dataclasses.replace(llama_1b_bfloat16.get_config(), model=LLAMA_7B)
