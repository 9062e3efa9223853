"""Ten plays of Shakespeare, byte by byte, with a small GPT made bfloat16 operation by operation.

Trains: the model, data and recipe of `text_gpt_bfloat16.py`; parameters and inputs are not cast up
    front, `jaxmp.autocast` decides in the traced program what runs in 16 bits.
Command: python scripts/train.py configs/text_gpt_autocast_bfloat16.py
Hardware and time: two CPU cores, under a minute.
Expected: 2.27 nats a byte on the held-out text (one seed), as `text_gpt_bfloat16.py` gives.
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
        autocast=True,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup=0.1, weight_decay=0.1, b2=0.95, clip=1.0
        ),
    )
