"""The benchmark: its hand-written steps are jaxmp's in other words, and its command runs."""

import functools
import importlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@functools.cache
def bench():
    sys.path.insert(0, str(ROOT / "scripts"))
    module = importlib.import_module("bench")
    gpt, vit = module.gpt.GPTConfig, module.vit.ViTConfig
    module.WORKLOADS |= {
        "gpt-test": module.Workload(gpt(32, context=8, width=16, depth=1, heads=2), 2),
        "vit-test": module.Workload(vit(5, patch=4, width=16, depth=1, heads=2), 2, (8, 8, 3)),
    }
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-test", "vit-test"])
def test_by_hand_and_by_jaxmp_the_gradients_agree(name):
    workload = bench().WORKLOADS[name]
    params = bench().initial_params(workload)
    batch = workload.batch()
    with jax.numpy_dtype_promotion("standard"):
        gradients = [
            jax.jit(jax.value_and_grad(loss))(params, batch)
            for loss in (workload.hand_loss(), workload.model_loss())
        ]
    (loss, by_hand), (other, by_jaxmp) = gradients
    assert float(loss) == pytest.approx(float(other), rel=1e-5)
    for expected, got in zip(jax.tree.leaves(by_jaxmp), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-3)


@pytest.mark.slow
def test_every_row_takes_the_same_step(capsys, tmp_path):
    figures = tmp_path / "figures.json"
    only = "float32,float16,jaxmp"
    command = ["gpt-test", "--only", only, "--rounds", "1", "--steps", "1", "--json", str(figures)]
    assert bench().main(command) == 0
    rows = json.loads(figures.read_text())["results"]["gpt-test"]
    assert set(rows) >= {"hand float32", "hand float16", "jaxmp bfloat16", "jaxmp float16"}
    for name, row in rows.items():
        if "error" in row:
            assert row["error"] == "not installed"
            continue
        # The second and third losses come after one and two updates.
        start = rows["hand float32"]["losses"]
        assert row["losses"] == pytest.approx(start, rel=3e-3), name
        assert row["median_s"] > 0
    assert "no measure of a speed-up" in capsys.readouterr().out


@pytest.mark.slow
def test_the_machine_at_hand_can_be_compiled_for(capsys):
    command = ["gpt-test", "--target", "cpu", "--only", "bfloat16"]
    assert bench().main(command) == 0
    table = capsys.readouterr().out
    assert "jaxmp bfloat16" in table
    assert "products" in table


def test_wrong_arguments_are_answered_in_a_sentence(capsys):
    with pytest.raises(SystemExit):
        bench().main(["gpt-huge"])
    assert "gpt-tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench().main(["gpt-tiny", "--target", "gpu-h1000"])
    assert "gpu-h100" in capsys.readouterr().err


def test_a_step_by_hand_skips_what_is_not_finite():
    hand = bench().hand
    tx = bench().plain_adamw()
    loss = lambda params, batch: jnp.sum(params["w"] * batch["inputs"])
    step = jax.jit(hand.train_step(loss, tx, jnp.float16, scaling=True))
    state = hand.init_state({"w": jnp.ones((2, 2))}, tx)
    skipped, metrics = step(state, {"inputs": jnp.full((2, 2), jnp.inf)})
    assert not metrics["finite"]
    assert skipped.scale == state.scale / 2
    for new, old in zip(jax.tree.leaves(skipped[:2]), jax.tree.leaves(state[:2]), strict=True):
        np.testing.assert_array_equal(new, old)
    applied, metrics = step(state, {"inputs": jnp.full((2, 2), 0.5)})
    assert metrics["finite"]
    assert metrics["grad_norm"] == 1.0
    assert (applied.params["w"] < 1).all()
