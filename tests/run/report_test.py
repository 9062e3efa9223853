"""The picture at the end, also of runs that have little to show."""

import math

import numpy as np
import pytest

from configs import digits_mlp_float16
from jaxmp.run import metrics, report, workdir

pytest.importorskip("matplotlib")


def fill(directory, steps, evaluations):
    for name, count in (("metrics.jsonl", steps), ("eval.jsonl", evaluations)):
        lines = metrics.JsonLines(directory / name, after=0)
        for step in range(1, count + 1):
            lines.write(
                {
                    "step": step, "loss": math.nan if step == 3 else 2.0 / step, "accuracy": 1 - 1 / step,
                    "grad_norm": math.inf if step == 3 else 1.0, "loss_scale": 2.0**15, "learning_rate": 1e-3,
                    "skipped": step == 3, "examples_per_second": 10.0,
                }
                if name == "metrics.jsonl"
                else {"step": step, "loss": 1.5 / step, "accuracy": 0.5}
            )  # fmt: skip
        lines.close()


@pytest.mark.parametrize(("steps", "evaluations"), [(60, 3), (1, 1), (0, 0)])
def test_both_files_are_written(tmp_path, steps, evaluations):
    fill(tmp_path, steps, evaluations)
    workdir.remember(tmp_path, digits_mlp_float16.get_config())
    page = report.write(tmp_path, "digits <mlp>").read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "digits &lt;mlp&gt;" in page and "optimizer.learning_rate = 0.002" in page
    assert 'src="data:image/png;base64,' in page and "http" not in page  # self-contained
    if steps == 60:
        assert (
            "<b>50.0%</b><span>held-out accuracy</span>" in page
            and "<b>1</b><span>skipped</span>" in page
        )


def test_smoothing_leaves_out_what_is_not_finite():
    values = np.ones(200)
    values[50] = math.nan
    np.testing.assert_allclose(report.smooth(values), 1)
    assert report.smooth(np.array([])).size == 0


def test_without_the_directory_of_a_config(tmp_path):
    fill(tmp_path, 5, 1)
    assert report.write(tmp_path, "nameless").exists()
