"""Settings: names, resolution of `auto`, what makes another run, and every rule of validation."""

import dataclasses
import json

import pytest

from configs import digits_mlp_float16, digits_mlp_float32, digits_vit_bfloat16, text_gpt_bfloat16
from jaxmp.nn.models.gpt import GPTConfig
from jaxmp.precision import loss_scale as loss_scales
from jaxmp.run import config as configs
from jaxmp.run import validate
from jaxmp.run.config import Config, ConfigError, LossScaleConfig, OptimizerConfig
from jaxmp.run.data import DigitsConfig, TextConfig

DIGITS = digits_mlp_float32.get_config()
TEXT = text_gpt_bfloat16.get_config()


def changed(config: Config, key: str, value) -> Config:
    """The config with one setting, by its dotted name, replaced."""
    head, _, rest = key.partition(".")
    inner = changed(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: inner})


def test_flatten_names_settings_as_the_command_line_does():
    flat = configs.flatten(DIGITS)
    assert flat["steps"] == 400 and flat["model.width"] == 256 and flat["loss_scale.kind"] == "auto"
    assert set(flat) == set(validate.setting_types(DIGITS))


@pytest.mark.parametrize(
    ("policy", "kind", "resolved"),
    [
        ("mixed_float16", "auto", "dynamic"),
        ("params=float32,compute=float16,output=float32", "auto", "dynamic"),
        ("mixed_bfloat16", "auto", "none"),
        ("float32", "auto", "none"),
        ("mixed_float16", "none", "none"),
        ("float32", "dynamic", "dynamic"),
        ("mixed_bfloat16", "static", "static"),
    ],
)
def test_auto_goes_by_the_policy(policy, kind, resolved):
    config = dataclasses.replace(DIGITS, policy=policy, loss_scale=LossScaleConfig(kind=kind))
    assert configs.loss_scale_kind(config) == resolved
    types = {"none": "NoOpLossScale", "static": "StaticLossScale", "dynamic": "DynamicLossScale"}
    assert isinstance(configs.loss_scale_of(config), getattr(loss_scales, types[resolved]))


def test_the_loss_scale_gets_every_setting():
    settings = LossScaleConfig("dynamic", 64.0, 7, 4.0, 2.0, 1024.0, 3)
    scale = configs.loss_scale_of(dataclasses.replace(DIGITS, loss_scale=settings))
    found = (
        scale.loss_scale,
        scale.period,
        scale.factor,
        scale.min_loss_scale,
        scale.max_loss_scale,
        scale.hysteresis,
    )
    assert found == (64.0, 7, 4.0, 2.0, 1024.0, 3)


def test_a_stored_config_is_of_the_same_run_through_json():
    config = dataclasses.replace(DIGITS, overrides=(("head", "float32"),))
    stored = json.loads(json.dumps(configs.to_json(config)))
    assert configs.difference(stored, config) is None


@pytest.mark.parametrize(
    "key,value",
    [("steps", 500), ("workdir", "x"), ("eval.every", 7), ("checkpoint.keep", 9), ("log.every", 3)],
)
def test_what_may_change_between_starts(key, value):
    assert configs.difference(configs.to_json(DIGITS), changed(DIGITS, key, value)) is None


@pytest.mark.parametrize(
    "key,value",
    [
        ("seed", 1),
        ("model.width", 8),
        ("optimizer.learning_rate", 0.5),
        ("policy", "mixed_float16"),
        ("overrides", (("a", "float32"),)),
    ],
)
def test_what_makes_another_run(key, value):
    found = configs.difference(configs.to_json(DIGITS), changed(DIGITS, key, value))
    assert found is not None and found[0] == key


def test_another_model_is_another_run():
    found = configs.difference(configs.to_json(DIGITS), digits_vit_bfloat16.get_config())
    assert found == ("model", "MLPConfig", "ViTConfig")


def test_a_run_of_a_version_without_a_setting_had_its_default():
    stored = configs.to_json(DIGITS)
    del stored["optimizer.skip_outliers"]
    assert configs.difference(stored, DIGITS) is None
    asked = changed(DIGITS, "optimizer.skip_outliers", 10.0)
    assert configs.difference(stored, asked) == ("optimizer.skip_outliers", 0.0, 10.0)


def test_shipped_settings_are_valid():
    validate.check(DIGITS)
    validate.check(TEXT)
    validate.check(digits_mlp_float16.get_config())


WRONG = {
    "steps": (DIGITS, "steps", 0, "steps=0 must be at least 1"),
    "wrong type": (DIGITS, "steps", "many", "steps='many' is not a whole number"),
    "a float for an int": (DIGITS, "batch_size", 12.5, "batch_size=12.5 is not a whole number"),
    "a bool for an int": (DIGITS, "seed", True, "seed=True is not a whole number"),
    "a number for text": (DIGITS, "policy", 16, "policy=16 is not text"),
    "a class for its instance": (
        DIGITS,
        "optimizer",
        OptimizerConfig,
        r"optimizer=OptimizerConfig is not OptimizerConfig\(\.\.\.\)",
    ),
    "choice": (DIGITS, "optimizer.name", "adam", "optimizer.name='adam' is not one of adamw, sgd"),
    "a pair too short": (
        DIGITS,
        "overrides",
        (("a",),),
        r"overrides=.* is not any number of \(text, text\)",
    ),
    "not a model": (DIGITS, "model", "mlp", r"model='mlp' is not one of MLPConfig\(...\)"),
    "not divisible": (
        DIGITS,
        "accumulate",
        3,
        "batch_size=128 cannot be cut into accumulate=3.*write batch_size=129",
    ),
    "unknown policy": (DIGITS, "policy", "float17", "policy: Unknown dtype 'float17'"),
    "16-bit parameters": (DIGITS, "policy", "float16", "write policy=mixed_float16"),
    "float64": (DIGITS, "policy", "p=f32,c=f64", "asks for float64"),
    "dtype of an override": (
        DIGITS,
        "overrides",
        (("head", "f33"),),
        "overrides: Unknown dtype 'f33'",
    ),
    "warm-up": (DIGITS, "optimizer.warmup", 400, "optimizer.warmup=400 leaves none of steps=400"),
    "rsqrt": (
        changed(DIGITS, "optimizer.warmup", 0),
        "optimizer.schedule",
        "rsqrt",
        "optimizer.warmup=40",
    ),
    "descent": (
        changed(DIGITS, "optimizer.schedule", "stable_decay"),
        "optimizer.decay_steps",
        390,
        "do not fit into steps=400",
    ),
    "momentum": (DIGITS, "optimizer.b1", 1.0, r"optimizer.b1=1.0 must be in \[0, 1\)"),
    "scale outside": (
        digits_mlp_float16.get_config(),
        "loss_scale.initial",
        0.5,
        "loss_scale.initial=0.5 lies outside",
    ),
    "images for tokens": (
        DIGITS,
        "data",
        TextConfig(),
        r"model=MLPConfig cannot read data=TextConfig; write data=DigitsConfig\(\)",
    ),
    "tokens for images": (
        TEXT,
        "data",
        DigitsConfig(),
        "model=GPTConfig cannot read data=DigitsConfig",
    ),
    "too few classes": (DIGITS, "model.num_classes", 9, "model.num_classes=9 is too small"),
    "vocabulary": (
        TEXT,
        "model",
        GPTConfig(vocab_size=80),
        "model.vocab_size=80 is too small for bytes; write 256",
    ),
    "context": (
        TEXT,
        "data.sequence_length",
        65,
        "data.sequence_length=65 is longer than model.context=64",
    ),
}


@pytest.mark.parametrize(("config", "key", "value", "words"), WRONG.values(), ids=WRONG)
def test_mistakes_are_told_by_key(config, key, value, words):
    with pytest.raises(ConfigError, match=words):
        validate.check(changed(config, key, value))


def test_what_get_config_returns_must_be_a_config():
    with pytest.raises(ConfigError, match=r"get_config\(\) returned a dict"):
        validate.check({"steps": 3})
