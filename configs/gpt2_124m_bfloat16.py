"""GPT-2 124M in bfloat16, float32 master parameters, on every device there is.

Trains: the smallest GPT-2 on windows of 1024 bytes, with its vocabulary of 50257 although bytes use 256
    of it: no corpus of that size comes with the package, so the text is the plays, 1.14 MB, which 124
    million parameters learn by heart. Point `--data.path` at a file of your own.
Command: python scripts/train.py configs/gpt2_124m_bfloat16.py
    and, beforehand: python scripts/plan.py configs/gpt2_124m_bfloat16.py --target tpu-v5e:4x4
Hardware and time: planned, never run. One H100, or a TPU slice; `plan.py` prints the least time of a
    step. Not for a CPU.
Expected: not measured. The loss starts at 10.8 nats, the log of the vocabulary.
"""

from jaxmp.nn.models.gpt import GPT2_124M
from jaxmp.run.config import Config, OptimizerConfig
from jaxmp.run.data import TextConfig


def get_config() -> Config:
    """The experiment."""
    return Config(
        model=GPT2_124M,
        data=TextConfig(sequence_length=1024),
        steps=10_000,
        batch_size=32,
        policy="mixed_bfloat16",
        mesh="fsdp=-1",
        optimizer=OptimizerConfig(
            learning_rate=6e-4, warmup=700, weight_decay=0.1, b2=0.95, clip=1.0
        ),
    )
