"""A Llama-style model of 1.26 billion parameters in bfloat16, fully sharded over every device there is.

Trains: 24 layers of width 2048, 16 heads on 8 keys, run by one compiled loop, on windows of 2048 bytes,
    with a vocabulary of 32000 although bytes use 256 of it: no corpus of that size comes with the
    package, so the text is the plays, 1.14 MB. Point `--data.path` at a file of your own.
    After arXiv 2302.13971 and 2305.13245.
Command: python scripts/train.py configs/llama_1b_bfloat16.py
    and, beforehand: python scripts/plan.py configs/llama_1b_bfloat16.py --target tpu-v5e:4x4
Hardware and time: planned, never run. One H100, or a TPU slice of 16 GB chips; `plan.py` prints the
    least time of a step. Not for a CPU.
Expected: not measured. The loss starts at 10.4 nats, the log of the vocabulary.
"""

from jaxmp.nn.models.llama import LLAMA_1B
from jaxmp.run.config import Config, OptimizerConfig
from jaxmp.run.data import TextConfig


def get_config() -> Config:
    """The experiment."""
    return Config(
        model=LLAMA_1B,
        data=TextConfig(sequence_length=2048),
        steps=10_000,
        batch_size=16,
        policy="mixed_bfloat16",
        mesh="fsdp=-1",
        optimizer=OptimizerConfig(
            learning_rate=3e-4, warmup=1000, weight_decay=0.1, b2=0.95, clip=1.0
        ),
    )
