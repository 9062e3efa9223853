"""Autocast costs no more than the native bfloat16 model, on machines that are absent too."""

import functools
import importlib
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from jaxmp.plan import targets

ROOT = pathlib.Path(__file__).parents[2]


@functools.cache
def bench():
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("bench_autocast")


def residuals(name, way):
    """Dtypes and shapes of what the first scan of a model's gradient hands on, and their bytes."""
    case = bench().Case(name, bench().zoo.SMALL)
    params, state = jax.eval_shape(case.init(), jax.random.key(0))
    batch = case.size.random_batch(case.kind)
    jaxpr = jax.make_jaxpr(case.gradient(way))(params, state, batch, jax.random.key(0)).jaxpr
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    avals = [v.aval for v in scans[0].outvars]
    return {str(a) for a in avals}, sum(a.size * a.dtype.itemsize for a in avals)


@pytest.mark.slow
def test_a_scanned_stack_saves_what_the_native_one_saves():
    (ours, our_bytes), (_, native_bytes) = (
        residuals("pre-ln-scan", way) for way in ("autocast", "native")
    )
    assert "bfloat16[2,16,2,32,32]" in ours  # attention weights
    assert "float32[2,16,2,32,32]" not in ours
    assert our_bytes <= native_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "vit-scan", "pre-ln-scan"])
def test_it_moves_what_the_native_model_moves(name):
    missing = targets.missing_wheel("gpu-h100")
    if missing:
        pytest.skip(missing)
    row = bench().compile_row(bench().Case(name, bench().zoo.LARGE), "gpu-h100")
    assert row["bytes"] <= 1.02
    assert row["temporary"] <= 1.02
    assert row["float32 products"] == 0


def test_another_order_of_the_parameters_gives_the_same_step(monkeypatch):
    monkeypatch.setattr(bench().plan, "compile_for", lambda *args: args)
    case, shapes, losses = bench().Case("mlp-equinox", bench().zoo.SMALL), [], []
    for order in (0, 1):
        step, state, batch, _ = bench().compiled(case, "native", "cpu", order)
        gradients, loss = step([jnp.full(s.shape, 0.01, s.dtype) for s in state], batch)
        assert [g.shape for g in gradients] == [s.shape for s in state]
        shapes.append([s.shape for s in state])
        losses.append(float(loss))
    assert shapes[0] != shapes[1] and sorted(shapes[0]) == sorted(shapes[1])
    assert losses[0] == losses[1] > 0


def test_over_orders_the_means_are_compared(monkeypatch):
    moved = {"native": (100, 300), "autocast": (90, 330)}

    def compiled(case, way, target, order):
        figures = dict.fromkeys(["compiler_bytes", "compiler_flops", "temporary_bytes"], 0)
        moves = {"bytes_accessed": moved[way][order], "wide_products": ()}
        return types.SimpleNamespace(**figures, **moves)

    monkeypatch.setattr(bench(), "compiled", compiled)
    row = bench().compile_row(bench().Case("vae", bench().zoo.SMALL), "tpu-v5e", orders=2)
    assert row["bytes"] == 420 / 400 and row["of an order"] == "0.900 to 1.100"
    assert row["temporary"] == 1.0


def test_a_logarithm_sees_what_float32_gives():
    autocast = bench().autocast
    w = jnp.full((1, 1), 4.0)
    squash = lambda x: jnp.log(1 - jnp.tanh(x @ w) ** 2 + 1e-6).sum()
    x = jnp.ones((1, 1))
    assert float(autocast(squash)(x)) == pytest.approx(float(squash(x)), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt-huge"], "gemma"),
        (["vae", "--orders", "0"], "at least 1"),
        (["vae", "--size", "lenght=260"], "one of width, depth, heads, vocab, length"),
        (["vae", "--size", "length=-1"], "'length=-1'"),
        (["vae", "--override", "**/head"], "**/head=float32"),
        (["vae", "--rule", "=float32"], "add=float32"),
    ],
)
def test_wrong_arguments_are_answered_in_a_sentence(capsys, arguments, said):
    with pytest.raises(SystemExit):
        bench().main(arguments)
    assert said in capsys.readouterr().err


def test_sizes_overrides_and_rules_change_what_is_run(monkeypatch):
    cases = []
    monkeypatch.setattr(bench(), "error_row", lambda case, draws: cases.append(case) or {})
    arguments = ["decoder-wide", "--error", "--size", "length=9", "vocab=40"]
    told = ["--override", "**/head=float32", "--rule", "exp=low"]
    assert bench().main([*arguments, *told]) == 0
    (case,) = cases
    assert (case.size.length, case.size.vocab, case.size.width) == (9, 40, 64)
    params, state = jax.eval_shape(case.init(), jax.random.key(0))
    batch = case.size.random_batch(case.kind)
    jaxpr = jax.make_jaxpr(case.loss("autocast"))(params, state, batch, jax.random.key(0)).jaxpr
    products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    wide = [e.outvars[0].aval.shape for e in products if e.invars[0].aval.dtype == jnp.float32]
    assert wide == [(16, 9, 40)]  # the head alone
    exponentials = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "exp"]
    assert {eqn.invars[0].aval.dtype for eqn in exponentials} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (["--override", "**/tail=float32"], "vae: The override '**/tail' matched no place"),
        (["--override", "**/tail=float99"], "float99"),
        (["--rule", "add=wide"], "vae: The rule for 'add' is 'wide'; it should be one of"),
    ],
)
def test_what_is_refused_in_tracing_is_answered_in_a_sentence(capsys, told, said):
    assert bench().main(["vae", "--error", *told]) == 0
    assert said in capsys.readouterr().err


def test_a_model_whose_package_is_absent_is_answered_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bench().main(["transformers/bert", "--error"]) == 0
    assert "transformers/bert needs the package transformers." in capsys.readouterr().err


def test_a_size_is_told_in_the_words_of_every_config():
    """Llama's, T5's, GPT-2's and Whisper's words for width, length and feed-forward width."""
    words = bench().transformers_zoo.names_of(bench().zoo.SMALL)
    assert [words[word] for word in ("hidden_size", "d_model", "n_embd")] == [64] * 3
    assert [words[word] for word in ("intermediate_size", "d_ff", "encoder_ffn_dim")] == [256] * 3
    assert words["head_dim"] * words["num_attention_heads"] == words["d_kv"] * words["n_head"] == 64
