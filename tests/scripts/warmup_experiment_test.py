"""Without warm-up at a rate of 1e-2 post-LN fails, and three remedies hold: two blocks, and warm-up."""

import importlib
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
experiment = importlib.import_module("warmup_experiment")


def accuracies(model, warmups):
    """Of one seed at a rate of 1e-2. Training is chaotic here: another CPU ends some points elsewhere."""
    runs = [(1e-2, warmup, 0) for warmup in warmups]
    return [figures["accuracy"] for figures in experiment.train_all(experiment.MODELS[model], runs)]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_post_ln_stays_at_chance_without_warmup_and_warmup_rescues_it():
    without, with_warmup = accuracies("post-LN", (0, 60))
    assert without <= 0.15
    assert with_warmup >= 0.7


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_bounded_blocks_need_no_warmup():
    (without,) = accuracies("weighted residual", (0,))
    assert without >= 0.8


def test_the_command_writes_a_table_a_figure_and_the_figures(tmp_path, monkeypatch):
    constant = lambda config, runs, policy: [{"accuracy": rate * 10} for rate, _, _ in runs]
    monkeypatch.setattr(experiment, "train_all", constant)
    arguments = experiment.argparse.Namespace(
        output=tmp_path / "out",
        models=["post-LN", "LipsFormer"],
        rates=[1e-3, 1e-2],
        warmups=[0, 60],
        seeds=[0, 1],
        policy="float32",
    )
    experiment.main(arguments)
    assert "| LipsFormer | 60 | 1.0 to 1.0 | 10.0 to 10.0 |" in (tmp_path / "out.md").read_text()
    assert len(json.loads((tmp_path / "out.json").read_text())) == 16
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
