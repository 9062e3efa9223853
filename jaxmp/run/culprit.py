"""Says which operation broke a step that is not finite, once loss scaling has had its chance.

At the first such step of a run its loss and gradients are computed once more from its batch and its state,
operation by operation (`diagnose.blame`), and what is found goes into `blame.txt` and `blame.json`.
Steps that `skip_outliers` leaves out are finite and do not count.

The step itself pays nothing for it: it is looked at when its metrics are read, which is one step late.
Since a step that is not finite is skipped, the parameters then are those it had, unless the step behind
it was applied: then they are one update on, and what is written says so.

The search runs on one device, with parameters that are whole on it. Of several processes each searches with
its own rows of the batch, and the first that finds something speaks.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp import training
from jaxmp.diagnose import blame, fault
from jaxmp.run import build, hosts
from jaxmp.run import config as configs
from jaxmp.run.config import Config
from jaxmp.training import mesh as meshes

TEXT_FILE, JSON_FILE = "blame.txt", "blame.json"


class Chance:
    """Decides from the records of steps alone whether a step is beyond what a loss scale could mend."""

    def __init__(self, config: Config) -> None:
        settings = config.loss_scale
        self._dynamic = configs.loss_scale_kind(config) == "dynamic"
        self._floor, self._most = settings.floor, max(settings.patience // 2, 1)
        self._in_a_row = 0

    def lost(self, record: Mapping[str, Any]) -> str:
        """Why the step of the next record is worth a search, in a clause; "" if it is not."""
        loss, norm = (_is_finite(record[key]) for key in ("loss", "grad_norm"))
        self._in_a_row = 0 if loss and norm else self._in_a_row + 1
        if not loss:
            return "the loss is not finite, which no loss scale can mend"
        if norm:
            return ""
        if not self._dynamic:
            return "the gradients are not finite and the loss scale does not adapt"
        if record["loss_scale"] <= self._floor:
            return (
                f"the gradients are not finite with the loss scale at its floor of {self._floor:g}"
            )
        if self._in_a_row >= self._most:
            return f"the gradients were not finite {self._in_a_row} times in a row, whatever the loss scale"
        return ""


class Culprit:
    """Watches a run's records, and searches once."""

    def __init__(self, parts: build.Experiment, where: pathlib.Path) -> None:
        self._parts, self._where = parts, where
        self._chance: Chance | None = Chance(parts.config) if parts.config.log.blame else None

    def see(self, record: Mapping[str, Any], state: Any, behind: Mapping[str, Any] | None) -> str:
        """Takes the next record and returns a note for people, "" if there is nothing to say.

        `state` is the newest one; `behind` the metrics of the step behind the record's, if there was one.
        """
        reason = self._chance.lost(record) if self._chance is not None else ""
        if not reason:
            return ""
        self._chance = None
        later = behind is not None and not bool(jax.device_get(behind["skipped"]))
        found, error = self._found(record, state, later)
        head = f"step {record['step']}: {reason}."
        if error:
            return f"{head} The search for the operation failed: {error}"
        text = f"{head} {_told(found, later)}"
        hosts.first(lambda: _write(self._where, record, reason, later, found, text))
        return f"{text} ({self._where / TEXT_FILE})"

    def _found(self, *step: Any) -> tuple[fault.Blame | None, str]:
        """What the first process found that found something, else the first error, else nothing."""
        mine: tuple[fault.Blame | None, str] = None, ""
        try:
            mine = search(self._parts, *step), ""
        except Exception as error:  # such as too little memory: an instrument must not end the run
            mine = None, f"{type(error).__name__}: {error}"
        return max(hosts.gather(mine), key=lambda it: (it[0] is not None, bool(it[1])))


def search(
    parts: build.Experiment, record: Mapping[str, Any], state: Any, later: bool = False
) -> fault.Blame | None:
    """What made the loss or the gradients of a recorded step not finite, or None if now they are.

    `later`: the state is behind another step, which was applied.
    """
    config = parts.config
    both = training.value_and_grad(
        parts.loss, parts.policy, accumulate=config.accumulate, autocast=config.autocast
    )

    def loss_and_gradients(
        params: Any, batch: Any, rng: Any, model_state: Any, scale: Any
    ) -> tuple[Any, Any]:
        return both(params, batch, rng, model_state, scale=scale)

    step, rng, params, model_state = _on_one_device(
        parts, (state.step, state.rng, state.params, state.model_state)
    )
    return blame.blame_nonfinite(
        loss_and_gradients,
        params=params,
        batch=parts.source.batch_at(record["step"] - 1),
        rng=jax.random.fold_in(rng, step - int(later)),
        model_state=model_state,
        scale=jnp.float32(
            record["loss_scale"] / hosts.count()
        ),  # as one's share of the mean has it
    )


def _on_one_device(parts: build.Experiment, tree: Any) -> Any:
    """The arrays whole on this process's first device."""
    if parts.shardings is None:
        return tree
    whole = meshes.in_turn(build.whole_jit(parts, lambda tree: tree))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), whole)


def _told(found: fault.Blame | None, later: bool) -> str:
    moved = "with the parameters that the step behind it had updated already"
    if found is not None:
        return f"{found.paragraph()} (Found {moved}.)" if later else found.paragraph()
    how = f"operation by operation, {moved}," if later else "operation by operation"
    return (
        f"Run once more {how} it was finite: what differs then is the order of sums and what the "
        "compiler fuses, and on several devices the random numbers."
    )


def _write(
    where: pathlib.Path,
    record: Mapping[str, Any],
    reason: str,
    later: bool,
    found: fault.Blame | None,
    text: str,
) -> None:
    plain = {
        "step": record["step"],
        "loss_scale": record["loss_scale"],
        "reason": reason,
        "parameters": "one update later" if later else "as in the step",
        "blame": None if found is None else found.to_json(),
        "paragraph": text,
    }
    (where / TEXT_FILE).write_text(text + "\n", encoding="utf-8")
    (where / JSON_FILE).write_text(
        json.dumps(plain, indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
