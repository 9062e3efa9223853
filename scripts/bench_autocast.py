"""Compares `grad(autocast(model))` with the same model's native bfloat16: `python scripts/bench_autocast.py`.

The models are those of `autocast_zoo.py`: their source in float32 under autocast, against the same
source with `dtype=bfloat16` passed to every module. Parameters and gradients are float32 in both.

    python scripts/bench_autocast.py --target gpu-h100         # compiled, not run: bytes, memory, products
    python scripts/bench_autocast.py --error                   # of loss and gradient against float32
    python scripts/bench_autocast.py --train                   # 200 steps, spread over seeds
    python scripts/bench_autocast.py --time                    # tracing, and paired steps on this machine

Names of models choose among them; `transformers` are all of `transformers_zoo.py`. `--target`, and
`--time` on an accelerator, use the size LARGE, all else SMALL; `--size length=260` changes it. Bytes on a
TPU change with the order of the parameters: `--orders 4` gives means over four. What the
native model keeps in float32 on purpose, as some do their head, autocast keeps by `--override`, as in
`--override "**/head=float32"`, or by `--rule add=float32`. A CPU emulates 16-bit arithmetic in part: its
times say what autocast adds to a step, never what 16 bits gain.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import autocast_zoo as zoo
import transformers_zoo

from jaxmp.plan import compile as plan
from jaxmp.plan import targets
from jaxmp.precision.autocast import autocast
from jaxmp.run import data

LOW = jnp.bfloat16
MODELS = zoo.ZOO | transformers_zoo.ZOO
RATE = 1e-3  # at 2e-3 single runs of GPT-2 spike, in float32 as in 16 bits
PACKAGE = "transformers"
WAYS = ("float32", "native", "autocast")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of a size, and what autocast is told of it."""

    name: str
    size: zoo.Size
    overrides: tuple[tuple[str, str], ...] = ()
    rules: tuple[tuple[str, str], ...] = ()

    @property
    def kind(self) -> str:
        return MODELS[self.name].kind

    def init(self) -> Callable:
        """`key -> (params, state)`."""
        return MODELS[self.name].build(self.size, None).init

    def loss(self, way: str) -> Callable:
        """`(params, state, batch, key) -> (loss, state)`, in one of the WAYS."""
        loss = MODELS[self.name].build(self.size, LOW if way == "native" else None).loss
        if way != "autocast":
            return loss
        rules = dict(self.rules)
        return autocast(loss, LOW.dtype.name, rules=rules, overrides=self.overrides)

    def gradient(self, way: str) -> Callable:
        """`(params, state, batch, key) -> ((loss, state), gradients)`."""
        return jax.value_and_grad(self.loss(way), has_aux=True)


# --- compiled for an absent machine -------------------------------------------------------------


def compiled(case: Case, way: str, target: str, order: int = 0) -> plan.Compiled:
    """What forward and backward cost on a target, with the parameters in their order or, by seed, another."""
    gradient = case.gradient(way)
    leaves, tree = jax.tree.flatten(jax.eval_shape(case.init(), jax.random.key(0)))
    places = np.random.default_rng(order).permutation(len(leaves)) if order else range(len(leaves))

    def step(shuffled: list, batch: Any) -> Any:
        found = dict(zip(places, shuffled, strict=True))
        variables = jax.tree.unflatten(tree, [found[i] for i in range(len(leaves))])
        key = jax.random.key(batch["seed"])
        (loss, state), gradients = gradient(*variables, batch["data"], key)
        results = jax.tree.leaves((gradients, state))
        return [results[i] for i in places], loss

    batch = {"data": case.size.random_batch(case.kind), "seed": np.uint32(0)}
    return plan.compile_for(step, [leaves[i] for i in places], batch, target)


def compile_row(case: Case, target: str, orders: int = 1) -> dict[str, Any]:
    """Bytes moved, temporaries and float32 products of both, and their ratios: of means over orders.

    A TPU's compiler keeps more or less on chip with the order of the parameters, a GPU's does not.
    """
    row: dict[str, Any] = {"model": case.name}
    native, ours = (
        [compiled(case, way, target, order) for order in range(orders)] for way in WAYS[1:]
    )
    mean = lambda reports, figure: sum(getattr(r, figure) or 0 for r in reports) / orders

    def ratio(figure: str) -> float:
        new, old = mean(ours, figure), mean(native, figure)
        return 1.0 if new == old else new / (old or 1)  # none at all: a TPU's small models

    row["GB"] = mean(ours, "bytes_accessed") / 1e9
    row["bytes"] = ratio("bytes_accessed")
    if orders > 1:
        each = [o.bytes_accessed / n.bytes_accessed for o, n in zip(ours, native)]
        row["of an order"] = f"{min(each):.3f} to {max(each):.3f}"
    if native[0].compiler_bytes:
        row["compiler bytes"] = ratio("compiler_bytes")
        row["compiler FLOPs"] = ratio("compiler_flops")
    row["temporary"] = ratio("temporary_bytes")
    row["float32 products"] = len(ours[0].wide_products)
    row["native's"] = len(native[0].wide_products)
    return row


# --- errors -------------------------------------------------------------------------------------


def relative(found: Any, expected: Any) -> float:
    """The distance of two trees relative to the second one's norm, in float64."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    error = sum(np.sum((a - b) ** 2) for a, b in pairs)
    return float(np.sqrt(error / sum(np.sum(b**2) for _, b in pairs)))


def error_row(case: Case, draws: int = 64) -> dict[str, Any]:
    """Root mean square errors of loss and gradient against float32, over initialisations and data.

    Native's and autocast's are taken from the same draws, and their ratio's standard error with them.

    The compiler may leave out a rounding between two operations that it fuses. Here it may not:
    otherwise an error of the loss depends on how a loss of a few numbers was fused.
    """
    exactly = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    gradients = {way: exactly(case.gradient(way)) for way in WAYS}
    init = jax.jit(case.init())
    batch_at = source(case.kind, case.size)
    errors: dict[str, list] = {way: [] for way in WAYS}
    for draw in range(draws):
        params, state = init(jax.random.key(draw))
        args = (params, state, batch_at(draw), jax.random.key(draw))
        (exact, _), exact_gradient = gradients["float32"](*args)
        for way in WAYS[1:]:
            (loss, _), gradient = gradients[way](*args)
            errors[way].append((float(loss / exact - 1), relative(gradient, exact_gradient)))
    row: dict[str, Any] = {"model": case.name}
    for i, what in enumerate(("loss", "gradient")):
        native, ours = (np.square(errors[way])[:, i] for way in WAYS[1:])
        row |= {f"{what} native": native.mean() ** 0.5, f"{what} autocast": ours.mean() ** 0.5}
        row[f"{what} ratio"] = ratio = row[f"{what} autocast"] / row[f"{what} native"]
        # Of the root of a ratio of two means over the same draws, to first order in their errors.
        spread = np.std(ours / ours.mean() - native / native.mean())
        row[f"{what} ratio's standard error"] = ratio * spread / (2 * draws**0.5)
    return row


# --- training -----------------------------------------------------------------------------------


@functools.cache
def source(kind: str, size: zoo.Size) -> Callable[[int], dict[str, Any]]:
    """step -> a batch of the plays or of the digits; of noise for models that eat neither."""
    if kind not in ("text", "images"):
        return functools.partial(size.random_batch, kind)
    if kind == "text":
        config: Any = data.TextConfig(sequence_length=size.length)
        batch_at = data.load(config, size.batch, 0).batch_at

        def text(step: int) -> dict[str, Any]:
            batch = batch_at(step)
            return {"tokens": np.concatenate([batch["inputs"], batch["targets"][:, -1:]], 1)}

        return text
    batch_at = data.load(data.DigitsConfig(), size.batch, 0).batch_at

    def images(step: int) -> dict[str, Any]:
        batch = batch_at(step)
        return {"images": batch["inputs"], "labels": batch["targets"]}

    return images


def losses(case: Case, way: str, seeds: int, steps: int) -> np.ndarray:
    """The mean training loss of the last quarter of a run by AdamW, for each seed."""
    gradient, tx = case.gradient(way), optax.adamw(RATE)
    batch_at = source(case.kind, case.size)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, batch: Any, key: Any) -> tuple[Any, jax.Array]:
        params, state, moments = carry
        (loss, state), gradients = gradient(params, state, batch, key)
        updates, moments = tx.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), state, moments), loss

    init = jax.jit(case.init())
    found = []
    for seed in range(seeds):
        params, state = init(jax.random.key(seed))
        carry, trace = (params, state, tx.init(params)), []
        for i in range(steps):
            key = jax.random.fold_in(jax.random.key(seed), i)
            carry, loss = step(carry, batch_at(seed * steps + i), key)
            trace.append(loss)
        found.append(np.mean(trace[-steps // 4 :]))
    return np.array(found)


def train_row(case: Case, seeds: int = 8, steps: int = 200) -> dict[str, Any]:
    """Final losses of float32 and autocast runs, and whether they lie within the seeds' spread."""
    exact, ours = (losses(case, way, seeds, steps) for way in ("float32", "autocast"))
    spread = exact.max() - exact.min()
    return {
        "model": case.name,
        "float32": float(exact.mean()),
        "autocast": float(ours.mean()),
        "same seed": float(np.abs(ours - exact).max()),
        "spread of seeds": float(spread),
        "within": bool(np.abs(ours - exact).max() <= spread),
    }


# --- time ---------------------------------------------------------------------------------------


def time_row(case: Case, rounds: int = 20) -> dict[str, Any]:
    """Tracing of autocast against tracing of the function, and steps against native's, paired.

    On an accelerator also how long its kernels run, against native's (a small step waits for launches),
    how many times faster than in float32 a step is, and what the compiler that sees the device needs in
    temporaries, against native's.
    """
    on_cpu = jax.default_backend() == "cpu"
    params, state = jax.jit(case.init())(jax.random.key(0))
    batch = jax.device_put(case.size.random_batch(case.kind))
    args = (params, state, batch, jax.random.key(0))
    steps = {
        way: jax.jit(case.gradient(way)).lower(*args).compile()
        for way in (WAYS[1:] if on_cpu else WAYS)
    }
    times = seconds(steps, args, rounds, calls=3 if on_cpu else 20)
    took = {way: np.array(times) for way, times in times.items()}
    low, middle, high = np.quantile(took["autocast"] / took["native"], [0.25, 0.5, 0.75])
    row = {
        "model": case.name,
        "tracing": tracing(case, args),
        "step": float(middle),
        "quartiles": f"{low:.3f} to {high:.3f}",
    }
    if not on_cpu:
        busy = {way: kernel_seconds(steps[way], args) for way in WAYS[1:]}
        row["kernels"] = busy["autocast"] / busy["native"]
        memory = {way: step.memory_analysis().temp_size_in_bytes for way, step in steps.items()}
        row["milliseconds"] = 1e3 * float(np.median(took["autocast"]))
        row["faster than float32"] = float(np.median(took["float32"] / took["autocast"]))
        row["temporary"] = memory["autocast"] / (memory["native"] or 1)
    return row


def seconds(
    steps: Mapping[str, Callable], args: tuple, rounds: int, calls: int
) -> dict[str, list[float]]:
    """How long each of some steps takes, once a round, in an order that changes with the round."""
    took: dict[str, list[float]] = {way: [] for way in steps}
    for i in range(rounds + 2):
        for way in sorted(steps, reverse=bool(i % 2)):
            started = time.perf_counter()
            for _ in range(calls):
                result = steps[way](*args)
            jax.block_until_ready(result)
            took[way].append((time.perf_counter() - started) / calls)
    # The first two rounds bring clocks and memory to what they stay at.
    return {way: times[2:] for way, times in took.items()}


def kernel_seconds(step: Callable, args: tuple, calls: int = 5) -> float:
    """How long the device's kernels run in one step, by JAX's profiler."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready([step(*args) for _ in range(calls)])
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        lines = [line for p in planes if p.name.startswith("/device:") for line in p.lines]
        nanoseconds = (
            e.duration_ns for x in lines if x.name.startswith("Stream") for e in x.events
        )
        return sum(nanoseconds) / 1e9 / calls


def tracing(case: Case, args: tuple, rounds: int = 5) -> float:
    """How many times as long autocast takes to trace a function as JAX takes without it."""
    took: dict[str, list] = {way: [] for way in ("float32", "autocast")}
    for _ in range(rounds):
        for way, times in took.items():
            loss = case.loss(way)
            jax.clear_caches()
            started = time.perf_counter()
            jax.make_jaxpr(loss)(*args)
            times.append(time.perf_counter() - started)
    return min(took["autocast"]) / min(took["float32"])


# --- the command --------------------------------------------------------------------------------


def missing(name: str) -> str | None:
    """A sentence if the package that a model is from is not installed."""
    package = MODELS[name].package
    if package and importlib.util.find_spec(package) is None:
        return f"{name} needs the package {package.replace('_', '-')}."
    return None


def misfit(case: Case) -> str | None:
    """A sentence if a model is not to be had as it is told: no such place or rule, heads that do not fit."""
    try:
        params, state = jax.eval_shape(case.init(), jax.random.key(0))
        batch = case.size.random_batch(case.kind)
        jax.eval_shape(case.loss("autocast"), params, state, batch, jax.random.key(0))
    except (AssertionError, ValueError) as error:  # a model's own checks are of either kind
        return f"{case.name}: {error}"
    return None


def refusal(name: str, said: str) -> str:
    """What to tell when a compiler gives up on a model, and what to try."""
    said = " ".join(said.split())[:120]
    return (
        f"{name}: the compiler gives up: {said}; if that is about tiles, leave products to a library "
        "with XLA_FLAGS=--xla_gpu_enable_triton_gemm=false."
    )


def size_of(mode: str, kind: str, changes: Mapping[str, int]) -> zoo.Size:
    """The size at which a mode runs models of a kind, with some changes."""
    on_device = mode == "time" and jax.default_backend() != "cpu"
    size = zoo.LARGE if mode == "target" or on_device else zoo.SMALL
    if on_device and kind == "images":  # with 32 it would wait for launches
        size = dataclasses.replace(size, batch=256)
    return dataclasses.replace(size, **changes)


def changes_of(words: list[str]) -> dict[str, int]:
    """What `--size` changes.

    Raises:
      ValueError: a word is not one of the names of a size, "=" and a positive number.
    """
    names = [field.name for field in dataclasses.fields(zoo.Size)]
    changes = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in names or not number.isdigit() or int(number) < 1:
            raise ValueError(
                f"--size is {word!r}; it takes, as in length=260, one of {', '.join(names)} and a number."
            )
        changes[name] = int(number)
    return changes


def pairs_of(flag: str, example: str, words: list[str]) -> tuple[tuple[str, str], ...]:
    """What `--override` or `--rule` decides, as pairs.

    Raises:
      ValueError: a word has no "=" with something before and behind it.
    """
    pairs = [word.rpartition("=")[::2] for word in words]
    for word, pair in zip(words, pairs):
        if not all(pair):
            raise ValueError(f"--{flag} is {word!r}; it takes two words, as in {example}.")
    return tuple(pairs)


def show(row: dict[str, Any]) -> str:
    """One line for people."""
    cells = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
    return ", ".join(cells).replace("model ", "", 1)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", help=", ".join(zoo.ZOO))
    parser.add_argument("--target", help="compile for this machine: gpu-h100, tpu-v5e, ...")
    for flag in ("error", "train", "time"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument(
        "--orders", type=int, default=1, help="orders of the parameters for --target (1)"
    )
    parser.add_argument("--draws", type=int, default=64, help="initialisations for --error (64)")
    parser.add_argument("--seeds", type=int, default=8, help="runs for --train, each way (8)")
    several = {"nargs": "+", "default": []}
    parser.add_argument("--size", metavar="NAME=NUMBER", help="as in length=260", **several)
    parser.add_argument("--override", metavar="PATH=DTYPE", help="**/head=float32", **several)
    parser.add_argument("--rule", metavar="PRIMITIVE=RULE", help="add=float32", **several)
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    names = options.models or list(zoo.ZOO)
    names = [one for name in names for one in (transformers_zoo.ZOO if name == PACKAGE else [name])]
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(
            f"{unknown[0]!r} is no model: they are {', '.join(MODELS)}, or {PACKAGE} for all of its."
        )
    if options.orders < 1:
        parser.error(f"--orders is {options.orders}; it takes at least 1.")
    if options.draws < 1:
        parser.error(f"--draws is {options.draws}; it takes at least 1.")
    if options.seeds < 2:
        parser.error(f"--seeds is {options.seeds}; a spread takes at least 2.")
    try:
        changes = changes_of(options.size)
        overrides = pairs_of("override", "**/head=float32", options.override)
        rules = pairs_of("rule", "add=float32", options.rule)
        if options.target:
            targets.devices(options.target)  # before JAX starts: it may not find the compiler later
    except ValueError as error:
        parser.error(str(error))
    modes: dict[str, Callable[[Case], dict]] = {
        "target": functools.partial(compile_row, target=options.target, orders=options.orders),
        "error": functools.partial(error_row, draws=options.draws),
        "train": functools.partial(train_row, seeds=options.seeds),
        "time": time_row,
    }
    rows = []
    for name in names:
        if absent := missing(name):
            print(absent, file=sys.stderr)
            continue
        for mode in (mode for mode in modes if getattr(options, mode)):
            case = Case(name, size_of(mode, MODELS[name].kind, changes), overrides, rules)
            if (changes or overrides or rules) and (sentence := misfit(case)):
                print(sentence, file=sys.stderr)
                continue
            try:
                rows.append(modes[mode](case))
            except jax.errors.JaxRuntimeError as error:
                print(refusal(name, str(error)), file=sys.stderr)
                continue
            print(show(rows[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
