"""Targets: names, wrong names, missing compilers, and no trace left in the environment."""

import os

import jax
import pytest

from jaxmp.plan import targets


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpu-h100", 1),
        ("gpu-h200:8", 8),
        ("tpu-v5e:1", 1),
        ("tpu-v5e:4x4", 16),
        ("tpu-v5p:2x2x4", 16),
    ],
)
def test_a_name_says_chip_and_count(name, count):
    target = targets.parse_target(name)
    assert target.device_count == count
    assert target.chip is targets.CHIPS[name.split(":")[0]]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu-h1000", "gpu-h100"),
        ("gpu-h100:2x2", "gpu-h100:8"),
        ("tpu-v5e:8", "tpu-v5e:4x4"),
        ("tpu-v5e:", None),
        ("tpu-v5e:0x4", "tpu-v5e:4x4"),
        ("tpu-v5e:4by4", "tpu-v5e:4x4"),
    ],
)
def test_a_wrong_name_is_answered_with_a_right_one(name, said):
    if said is None:
        assert targets.parse_target(name).device_count == 1
        return
    with pytest.raises(ValueError, match=r"[Tt]arget") as raised:
        targets.parse_target(name)
    assert said in str(raised.value)


@pytest.mark.parametrize("name", ["gpu-h100", "tpu-v5e"])
def test_a_missing_compiler_names_its_extra(name, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda module: None)
    extra = {"gpu-h100": "cuda", "tpu-v5e": "tpu"}[name]
    with pytest.raises(ValueError, match=rf'pip install "jaxmp\[{extra}\]"'):
        targets.devices(name)


def test_the_machine_at_hand_is_a_target():
    assert targets.devices("cpu") == jax.devices("cpu")[:1]
    with pytest.raises(ValueError, match="device"):
        targets.devices("cpu:4096")


def test_figures_are_of_the_right_size():
    for chip in targets.CHIPS.values():
        if chip.platform != "cpu":
            assert 1e10 < chip.memory_bytes < 1e12
            assert 5e11 < chip.memory_bandwidth < 1e13
            assert 1e14 < chip.peak_flops["bfloat16"] < 1e16


def test_a_gpus_text_is_filled_in():
    text = targets.gpu_config_text(targets.CHIPS["gpu-a100"])
    assert "cuda_compute_capability { major: 8 }" in text
    assert "core_count: 108" in text
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize("name", ["gpu-h100", "gpu-h200:8", "gpu-a100", "tpu-v5e", "tpu-v6e:4x4"])
def test_the_compiler_knows_the_target(name):
    missing = targets.missing_wheel(name)
    if missing:
        pytest.skip(missing)
    before = dict(os.environ)
    devices = targets.devices(name)
    assert len(devices) == targets.parse_target(name).device_count
    assert devices[0].platform == {"gpu": "gpu", "tpu": "tpu"}[name[:3]]
    assert dict(os.environ) == before


def test_a_gpus_compiler_is_asked_for_without_its_driver(monkeypatch):
    seen = {}

    def refuse(**_):
        seen.update(os.environ)
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(targets, "missing_wheel", lambda name: None)
    monkeypatch.setattr(targets.topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match="set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the env"):
        targets.topology("gpu-h100")
    assert seen["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1"
    assert "JAX_SKIP_CUDA_CONSTRAINTS_CHECK" not in os.environ
