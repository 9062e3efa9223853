"""The command line: overrides by dotted name, and every mistake a short sentence with exit code 2."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from jaxmp.run import cli, loop, signals
from jaxmp.run.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
MLP, VIT, GPT = (
    str(ROOT / "configs" / f"{n}.py")
    for n in ("digits_mlp_float32", "digits_vit_bfloat16", "text_gpt_float16")
)

WRONG = {
    "typo": (
        [MLP, "--optimizer.lerning_rate", "1"],
        "--optimizer.lerning_rate",
        "did you mean --optimizer.learning_rate?",
    ),
    "typo without its group": (
        [MLP, "--learning_rate", "1"],
        "--learning_rate",
        "--optimizer.learning_rate",
    ),
    "a group for a setting": (
        [MLP, "--loss_scale", "dynamic"],
        "--loss_scale",
        "--loss_scale.kind",
    ),
    "another model's setting": ([MLP, "--model.heads", "4"], "--model.heads", "--model.depth"),
    "wrong type": (
        [MLP, "--steps", "ten"],
        "--steps cannot be 'ten'",
        "a whole number, such as --steps 400",
    ),
    "fraction": ([MLP, "--steps=1e3"], "--steps cannot be '1e3'", "a whole number"),
    "no value": ([MLP, "--workdir", "x", "--seed"], "--seed lacks a value", "a whole number"),
    "choice": (
        [MLP, "--optimizer.schedule", "cosin"],
        "--optimizer.schedule cannot be 'cosin'",
        "cosine, rsqrt, constant",
    ),
    "flag": ([MLP, "--log.report", "perhaps"], "--log.report cannot be 'perhaps'", "True or False"),
    "stray word": ([MLP, "fast"], "'fast'", "--name VALUE"),
    "not divisible": ([MLP, "--accumulate", "3"], "accumulate=3", "batch_size=129"),
    "unknown policy": ([MLP, "--policy", "mixed_bfloat61"], "policy", "mixed_bfloat16"),
    "16-bit parameters": (
        [MLP, "--policy", "bfloat16"],
        "policy='bfloat16'",
        "policy=mixed_bfloat16",
    ),
    "impossible schedule": (
        [MLP, "--optimizer.warmup", "400"],
        "optimizer.warmup=400",
        "a share such as 0.1",
    ),
    "too little": ([MLP, "--batch_size", "0"], "batch_size=0", "at least 1"),
    "larger than the data": (
        [MLP, "--batch_size", "1501"],
        "batch_size=1501",
        "between 1 and 1500",
    ),
    "override of nothing": (
        [MLP, "--overrides", "**/LayerNorm_*", "float32"],
        "overrides",
        "Dense_0/kernel",
    ),
    "half a pair": ([MLP, "--overrides", "head"], "--overrides", "'**/LayerNorm_*' float32"),
    "model choice": (
        [MLP, "--model.activation", "swish"],
        "model: activation 'swish'",
        "relu, gelu, tanh",
    ),
    "heads": ([VIT, "--model.heads", "5"], "heads", "multiple of heads"),
    "patch": ([VIT, "--model.patch", "3"], "patch", "divides both"),
    "missing text": ([GPT, "--data.path", "nowhere.txt"], "data.path='nowhere.txt'", "'plays'"),
    "context": (
        [GPT, "--data.sequence_length", "65"],
        "data.sequence_length=65",
        "model.context=64",
    ),
    "missing config": (
        [str(ROOT / "configs" / "digits_vit_bfloat17.py")],
        "digits_vit_bfloat17.py does not exist",
        "digits_vit_bfloat16.py",
    ),
    "option first": (["--steps", "5", MLP], "--steps", "train.py configs/NAME.py --steps"),
    "directory": ([MLP, "--workdir", "/proc/nowhere"], "workdir='/proc/nowhere'", "--workdir"),
}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Tests leave the user's cache directory alone."""
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)


@pytest.mark.parametrize(("arguments", "key", "advice"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_a_sentence_with_code_2(arguments, key, advice, tmp_path, capsys):
    if "--workdir" not in arguments:
        arguments = [*arguments, "--workdir", str(tmp_path)]
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert key in told and advice in told
    assert "Traceback" not in told and len(told.splitlines()) <= 6


CONFIG_FILES = {
    "no get_config": ("x = 1", "has no get_config()"),
    "wrong return": ("get_config = dict", "get_config() returned a dict"),
    "syntax": ("def get_config(:", "line 1: SyntaxError"),
    "misspelt field": (
        "from jaxmp.run.config import *\ndef get_config():\n    return OptimizerConfig(lerning_rate=1)",
        "line 3: TypeError: OptimizerConfig.__init__() got an unexpected keyword argument "
        "'lerning_rate'; did you mean learning_rate?",
    ),
    "bad value": (
        "import dataclasses\nfrom configs import digits_mlp_float32 as base\n"
        "def get_config():\n    return dataclasses.replace(base.get_config(), steps='3')",
        "steps='3' is not a whole number",
    ),
    "missing import": ("import not_a_module", "line 1: ModuleNotFoundError"),
}


@pytest.mark.parametrize(("text", "words"), CONFIG_FILES.values(), ids=CONFIG_FILES)
def test_a_broken_config_file_is_told_with_its_line(text, words, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert cli.main([str(path)]) == 2
    told = capsys.readouterr().err
    assert words in told and "broken.py" in told and len(told.splitlines()) <= 6


def test_overrides_by_dotted_name():
    arguments = [
        "--steps",
        "7",
        "--model.width=32",
        "--optimizer.learning-rate",
        "3e-4",
        "--log.report",
        "False",
    ]
    pairs = ["--overrides", "head", "float32", "Dense_*", "float16", "--optimizer.warmup", "0"]
    config, name = cli.parse([MLP, *arguments, *pairs])
    assert name == "digits_mlp_float32"
    assert (config.steps, config.model.width, config.optimizer.learning_rate) == (7, 32, 3e-4)
    assert config.log.report is False and config.overrides == (
        ("head", "float32"),
        ("Dense_*", "float16"),
    )
    assert config.batch_size == 128


def test_help_lists_the_settings_of_the_experiment(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse([GPT, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "--model.context" in shown and "--checkpoint.every" in shown


def test_exit_codes_follow_the_outcome(monkeypatch, capsys):
    for code in (0, 1, 75):
        monkeypatch.setattr(
            loop, "train", lambda *a, code=code, **k: loop.Outcome(3, code, {}, "so it ended")
        )
        assert cli.main([MLP]) == code
        told = capsys.readouterr()
        assert "so it ended" in (told.err if code == 1 else told.out)


def test_a_second_interrupt_ends_at_once(monkeypatch, capsys):
    def interrupted_twice(config, *, stop, **_):
        stop.ask("SIGINT")
        stop.ask("SIGINT")

    monkeypatch.setattr(loop, "train", interrupted_twice)
    assert cli.main([MLP]) == cli.EXIT_KILLED
    assert "Traceback" not in capsys.readouterr().err


def test_a_config_error_carries_no_more_than_five_lines():
    assert len(cli.shorten("line\n" * 50).splitlines()) == 5
    assert len(cli.shorten("x" * 1000)) == 300


def test_without_the_extra_for_training_a_sentence_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main([MLP]) == cli.EXIT_USAGE
    said = capsys.readouterr().err
    assert said.startswith("error: the command line needs the package tyro") and "[train]" in said


def test_the_script_answers_mistakes_too(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), MLP, "--stepz", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment())
    assert done.returncode == 2
    assert done.stderr == "error: --stepz is not a setting of this config; did you mean --steps?\n"


def _environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def test_listening_gives_the_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with signals.listening() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)
