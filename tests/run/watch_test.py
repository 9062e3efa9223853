"""When a run is given up, and what it says."""

import dataclasses

import pytest

from configs import digits_mlp_float16, digits_mlp_float32
from jaxmp.run.config import LossScaleConfig
from jaxmp.run.watch import RunFailed, Watch

PATIENT = LossScaleConfig(patience=5)


def watch(config, **scale):
    return Watch(dataclasses.replace(config, loss_scale=dataclasses.replace(PATIENT, **scale)))


def record(step, *, skipped=False, scale=2.0**15, loss=1.0):
    return {"step": step, "skipped": skipped, "loss_scale": scale, "loss": loss}


FLOAT16, FLOAT32 = digits_mlp_float16.get_config(), digits_mlp_float32.get_config()


def test_skips_in_a_row_end_the_run_and_single_ones_do_not():
    judge = watch(FLOAT16)
    for step in range(101):
        judge.see(record(step, skipped=step % 5 != 0))  # four in a row, then a good one
    for step in range(101, 105):
        judge.see(record(step, skipped=True))
    with pytest.raises(
        RunFailed,
        match=r"step 105: the last \d steps were all skipped.*loss scale went down to 32768",
    ):
        judge.see(record(105, skipped=True))


def test_a_loss_that_is_not_finite_is_not_blamed_on_the_scale():
    judge = watch(FLOAT16)
    with pytest.raises(
        RunFailed, match="the loss itself is not finite, which no loss scale can mend"
    ):
        for step in range(5):
            judge.see(record(step, skipped=True, loss=None if step else float("nan")))


def test_without_a_scale_the_advice_is_to_use_one():
    judge = watch(FLOAT32)
    with pytest.raises(RunFailed, match=r"--loss_scale\.kind dynamic"):
        for step in range(5):
            judge.see(record(step, skipped=True, scale=1.0))


def test_sitting_at_the_floor_ends_the_run():
    judge = watch(FLOAT16, floor=4.0)
    for step in range(4):
        judge.see(record(step, scale=4.0))
    judge.see(record(4, scale=8.0))  # it recovered: the count starts anew
    with pytest.raises(
        RunFailed, match="step 9: the loss scale has been at its floor of 4 for 5 steps"
    ):
        for step in range(5, 10):
            judge.see(record(step, scale=4.0))


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (FLOAT32, {}),
        (FLOAT16, {"floor": 1.0, "initial": 1.0}),
        (FLOAT16, {"kind": "static", "initial": 1.0}),
    ],
    ids=["none", "starts there", "static"],
)
def test_a_scale_that_is_meant_to_be_there_is_no_floor(config, settings):
    judge = watch(config, **settings)
    for step in range(100):
        judge.see(record(step, scale=1.0))
