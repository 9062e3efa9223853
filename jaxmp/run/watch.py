"""Looks at each step's record and gives a hopeless run up, in a sentence that says what to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxmp.run import config as configs
from jaxmp.run.config import Config


class RunFailed(RuntimeError):
    """The run cannot go on usefully; the message says since which step, why, and what to look at."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step = step


class Watch:
    """Counts steps in a row that were skipped, or ran with the loss scale at its floor.

    It depends on records alone, so a run that resumes can show it the past ones again.
    """

    def __init__(self, config: Config) -> None:
        scale = config.loss_scale
        self._patience = scale.patience
        # A run that starts at its floor means to be there.
        dynamic = configs.loss_scale_kind(config) == "dynamic"
        self._floor = scale.floor if dynamic and scale.floor < scale.initial else -math.inf
        self._dynamic = dynamic
        self._skipped = self._at_floor = 0

    def see(self, record: Mapping[str, Any]) -> None:
        """Takes the next record. Raises RunFailed when patience is at its end."""
        self._skipped = self._skipped + 1 if record["skipped"] else 0
        self._at_floor = self._at_floor + 1 if record["loss_scale"] <= self._floor else 0
        if self._skipped >= self._patience:
            raise RunFailed(record["step"], self._skipping(record["loss"], record["loss_scale"]))
        if self._at_floor >= self._patience:
            raise RunFailed(
                record["step"],
                f"the loss scale has been at its floor of {self._floor:g} for "
                f"{self._at_floor} steps, so small float16 gradients are lost. Something made it fall: "
                "look at grad_norm and skipped in metrics.jsonl where loss_scale drops; clip, lower the "
                "learning rate, or compute in bfloat16.",
            )

    def _skipping(self, loss: float | None, scale: float) -> str:
        head = f"the last {self._skipped} steps were all skipped, "
        if loss is None or not math.isfinite(loss):
            return head + (
                "and the loss itself is not finite, which no loss scale can mend. Look at the inputs and at "
                "activations beyond the range of the compute dtype; lower the learning rate or write "
                "--policy mixed_bfloat16."
            )
        if self._dynamic:
            return head + (
                f"though the loss scale went down to {scale:g}: look at grad_norm in metrics.jsonl, "
                "lower the learning rate or write --policy mixed_bfloat16."
            )
        return head + (
            "since gradients were not finite and the loss scale does not adapt: write "
            "--loss_scale.kind dynamic, a lower learning rate, or --policy mixed_bfloat16."
        )
