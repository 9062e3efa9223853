"""Ten plays of Shakespeare, byte by byte, with a small GPT in bfloat16, float32 master parameters.

Trains: 2 blocks of width 128 on windows of 64 bytes, 438 thousand parameters, over 1.14 MB of text;
    tests on the last play and a bit, 99 kB. After GPT-2; warm-up, decay and clipping as the
    transformer recipe advises.
Command: python scripts/train.py configs/text_gpt_bfloat16.py
Hardware and time: two CPU cores, half a minute.
Expected: 2.27 nats a byte on the held-out text (5.55, the log of 256, before), within 0.02 of float32.
"""

from jaxmp.nn.models.gpt import GPTConfig
from jaxmp.run.config import Config, OptimizerConfig
from jaxmp.run.data import TextConfig


def get_config() -> Config:
    """The experiment."""
    return Config(
        model=GPTConfig(vocab_size=256, context=64, width=128, depth=2, heads=4),
        data=TextConfig(sequence_length=64),
        steps=300,
        batch_size=32,
        policy="mixed_bfloat16",
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup=0.1, weight_decay=0.1, b2=0.95, clip=1.0
        ),
    )
