"""Compares one training step in many hands: `python scripts/bench.py [WORKLOAD ...] [--target NAME]`.

Rows: a step written by hand in plain JAX and optax (`bench_reference.py`), jaxmp's, and those of jmp,
MPX and flax's DynamicScale (`bench_peers.py`), all of the same model, optimizer and clipping; on a GPU
also PyTorch's (`bench_torch.py`). Without `--target` they run on the device at hand, interleaved in one
process, and the medians are compared. With `--target gpu-h100` (or tpu-v5e, see `jaxmp.plan.targets`)
nothing runs: the steps are compiled for that machine and their programs compared: bytes moved, memory,
matrix products by dtype. Ratios are against the hand-written step of the same dtype.

    python scripts/bench.py gpt-tiny vit-tiny                      # minutes on two CPU cores
    python scripts/bench.py gpt-124m --attention cudnn             # on a GPU
    python scripts/bench.py gpt-124m --target gpu-h100 --json out.json

On a CPU, 16-bit arithmetic is emulated in part: its times say what a step's machinery adds, never what
16 bits gain.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import bench_peers
import bench_reference as hand
import bench_torch

import jaxmp
from jaxmp.nn import functional as F
from jaxmp.nn import linen
from jaxmp.nn.models import gpt, vit
from jaxmp.optim import decay
from jaxmp.plan import compile as plan
from jaxmp.plan import targets

RATE, B1, B2, DECAY, CLIP = 1e-3, 0.9, 0.95, 0.1, 1.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and the shape of its batch."""

    config: Any
    batch_size: int
    image: tuple[int, int, int] | None = None
    """Height, width and channels; None for text."""

    @property
    def model(self) -> Any:
        """The Linen module of `jaxmp.nn.models`."""
        kind = gpt.GPT if self.image is None else vit.VisionTransformer
        return kind(self.config)

    def batch(self) -> dict[str, np.ndarray]:
        """One random batch, always the same."""
        rng = np.random.default_rng(0)
        if self.image is None:
            shape = (self.batch_size, self.config.context)
            draw = lambda: rng.integers(self.config.vocab_size, size=shape, dtype=np.int32)
            return {"inputs": draw(), "targets": draw()}
        labels = rng.integers(self.config.num_classes, size=self.batch_size, dtype=np.int32)
        images = rng.standard_normal((self.batch_size, *self.image), np.float32)
        return {"inputs": images, "targets": labels}

    def model_loss(self) -> Callable:
        """`loss(params, batch)` of the Linen model, in the dtype of what it is given."""
        loss_fn = linen.loss_from(self.model, F.softmax_cross_entropy)
        return lambda params, batch: loss_fn(params, batch, None, {})[0]

    def hand_loss(self) -> Callable:
        """The same by hand."""
        settings = {"heads": self.config.heads, "fused": self.config.attention == "cudnn"}
        if self.image is None:
            return functools.partial(hand.gpt_loss, **settings)
        return functools.partial(hand.vit_loss, patch=self.config.patch, **settings)


WORKLOADS = {
    "gpt-tiny": Workload(gpt.GPTConfig(512, context=128, width=128, depth=2, heads=2), 8),
    "gpt-small": Workload(gpt.GPTConfig(8192, context=512, width=512, depth=4, heads=8), 16),
    "gpt-124m": Workload(gpt.GPT2_124M, 8),
    "vit-tiny": Workload(vit.ViTConfig(10, patch=4, width=128, depth=2, heads=2), 32, (32, 32, 3)),
    "vit-small": Workload(
        vit.ViTConfig(100, patch=8, width=384, depth=6, heads=6), 64, (96, 96, 3)
    ),
    "vit-b16": Workload(
        vit.ViTConfig(1000, patch=16, width=768, depth=12, heads=12), 64, (224, 224, 3)
    ),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to write the step."""

    build: Callable[[Workload], tuple[Callable, Callable]]
    """Gives `init(params) -> state` and `step(state, batch) -> (state, loss or metrics)`."""
    baseline: str
    """The row that its figures are divided by."""


def plain_adamw() -> optax.GradientTransformation:
    """What stands behind unscaling and clipping in every row."""
    return optax.chain(
        optax.scale_by_adam(b1=B1, b2=B2),
        optax.add_decayed_weights(DECAY, decay.decay_mask),
        optax.scale_by_learning_rate(RATE),
    )


def _hand(dtype: str, **settings: Any) -> Callable:
    def build(workload: Workload) -> tuple[Callable, Callable]:
        tx = plain_adamw()
        if dtype == "float32":  # the fused kernel takes 16 bits alone
            config = dataclasses.replace(workload.config, attention="xla")
            workload = dataclasses.replace(workload, config=config)
        step = hand.train_step(workload.hand_loss(), tx, jnp.dtype(dtype), **settings)
        return lambda params: hand.init_state(params, tx), step

    return build


def _jaxmp(dtype: str) -> Callable:
    def build(workload: Workload) -> tuple[Callable, Callable]:
        scale = jaxmp.DynamicLossScale() if dtype == "float16" else None
        tx = jaxmp.adamw(RATE, b1=B1, b2=B2, weight_decay=DECAY, clip=CLIP, loss_scale=scale)
        loss_fn = linen.loss_from(workload.model, F.softmax_cross_entropy)
        step = jaxmp.make_train_step(loss_fn, tx, f"mixed_{dtype}")
        return lambda params: jaxmp.TrainState.create(params, tx), step

    return build


def _peer(builder: Callable) -> Callable:
    return lambda workload: builder(workload.model_loss(), plain_adamw())


VARIANTS = {
    "hand float32": Variant(_hand("float32"), "hand bfloat16"),
    "hand bfloat16": Variant(_hand("bfloat16"), "hand bfloat16"),
    "hand bfloat16, no clip, no check": Variant(_hand("bfloat16", clip=None), "hand bfloat16"),
    "jaxmp bfloat16": Variant(_jaxmp("bfloat16"), "hand bfloat16"),
    "hand float16": Variant(_hand("float16", scaling=True), "hand float16"),
    "jaxmp float16": Variant(_jaxmp("float16"), "hand float16"),
    **{name: Variant(_peer(build), "hand float16") for name, build in bench_peers.PEERS.items()},
}


def build(name: str, workload: Workload) -> tuple[Callable, Callable] | str:
    """Returns init and step of a variant, or why there is none."""
    try:
        return VARIANTS[name].build(workload)
    except ImportError:
        return "not installed"


def initial_params(workload: Workload) -> Any:
    """The same start for every row."""
    inputs = workload.batch()["inputs"]
    return linen.init(workload.model, jax.random.key(0), inputs)[0]


# --- compiled for an absent machine --------------------------------------------------------------


def compile_rows(
    workload: Workload, target: str, names: list[str], options: dict[str, Any]
) -> dict[str, dict]:
    """Returns what each variant's program costs on the target, as plain data."""
    params = jax.eval_shape(lambda: initial_params(workload))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), workload.batch())
    rows: dict[str, dict] = {}
    for name in names:
        built = build(name, workload)
        if isinstance(built, str):
            rows[name] = {"error": built}
            continue
        init, step = built
        state = jax.eval_shape(init, params)
        try:
            report = plan.compile_for(step, state, batch, target, compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            rows[name] = {"error": f"the compiler gives up: {str(error)[:60]}"}
            continue
        rows[name] = report.to_dict()
        print(f"  {name}: compiled in {report.compile_seconds:.0f} s", file=sys.stderr)
    return rows


def compile_table(rows: dict[str, dict]) -> list[list[str]]:
    """Lays the rows of `compile_rows` out for people."""
    table = [["step", "GB moved", "ratio", "compiler GB", "temp GiB", "copied MB", "products"]]
    for name, row in rows.items():
        if "error" in row:
            table.append([name, row["error"]] + [""] * 5)
            continue
        base = rows.get(VARIANTS[name].baseline, {}).get("bytes_accessed")
        products = [f"{p['count']} {dtypes}" for dtypes, p in row["products"].items()]
        own = row["compiler_bytes"]
        # What is donated comes back in its own buffers; the rest are metrics of a few bytes.
        copied = (row["output_bytes"] - row["alias_bytes"]) / 1e6
        table.append(
            [
                name,
                f"{row['bytes_accessed'] / 1e9:.3f}",
                f"{row['bytes_accessed'] / base:.4f}" if base else "",
                f"{own / 1e9:.3f}" if own else "",
                f"{row['temporary_bytes'] / 2**30:.2f}",
                f"{copied:.3f}",
                "; ".join(products).replace("bfloat", "bf").replace("float", "f"),
            ]
        )
    return table


# --- run here ------------------------------------------------------------------------------------


def runner(name: str, workload: Workload, params: Any, batch: Any) -> Callable[[], Any] | str:
    """Returns a function that advances the variant by one step and gives its loss, or why not."""
    built = build(name, workload)
    if isinstance(built, str):
        return built
    init, step = built
    compiled = jax.jit(step, donate_argnums=0)
    holder = [jax.tree.map(lambda x: jnp.array(x, copy=True), init(params))]

    def advance() -> Any:
        holder[0], out = compiled(holder[0], batch)
        return out["loss"] if isinstance(out, dict) else out

    return advance


def torch_runners(workload: Workload) -> dict[str, Callable[[], Any] | str]:
    """Returns PyTorch's rows: only where there is a GPU, and for the GPT."""
    if workload.image is not None or jax.default_backend() != "gpu":
        return {}
    rows: dict[str, Callable[[], Any] | str] = {}
    for dtype in ("bfloat16", "float16"):
        try:
            rows[f"torch.compile {dtype}"] = bench_torch.gpt_step(
                workload.config, workload.batch_size, dtype
            )
        except ImportError:
            rows[f"torch.compile {dtype}"] = "not installed"
        except RuntimeError as error:
            rows[f"torch.compile {dtype}"] = str(error)
    return rows


def time_rows(workload: Workload, names: list[str], rounds: int, steps: int) -> dict[str, dict]:
    """Returns the times of each variant: `rounds` times `steps` steps, in turns."""
    params = initial_params(workload)
    batch = jax.device_put(workload.batch())
    runners = {name: runner(name, workload, params, batch) for name in names}
    runners |= torch_runners(workload)
    rows: dict[str, dict] = {}
    for name, advance in list(runners.items()):
        if isinstance(advance, str):
            rows[name] = {"error": advance}
            del runners[name]
            continue
        started = time.perf_counter()
        first = [float(advance()) for _ in range(3)]  # compiles and warms up
        rows[name] = {"compile_s": time.perf_counter() - started, "losses": first, "times_s": []}
        print(f"  {name}: ready in {rows[name]['compile_s']:.0f} s", file=sys.stderr)
    for _ in range(rounds):
        for name, advance in runners.items():
            started = time.perf_counter()
            for _ in range(steps):
                loss = advance()
            loss = float(loss)  # waits for the last step
            rows[name]["times_s"].append((time.perf_counter() - started) / steps)
            rows[name]["loss"] = loss
    for row in rows.values():
        if "error" not in row:
            row["median_s"] = statistics.median(row["times_s"])
    return rows


def time_table(rows: dict[str, dict]) -> list[list[str]]:
    """Lays the rows of `time_rows` out for people."""
    table = [["step", "ms a step", "least", "ratio", "first loss", "last loss"]]
    for name, row in rows.items():
        if "error" in row:
            table.append([name, row["error"]] + [""] * 4)
            continue
        known = VARIANTS.get(name)
        baseline = known.baseline if known else f"hand {name.split()[-1]}"
        base = rows.get(baseline, {}).get("median_s")
        table.append(
            [
                name,
                f"{row['median_s'] * 1e3:.2f}",
                f"{min(row['times_s']) * 1e3:.2f}",
                f"{row['median_s'] / base:.3f}" if base else "",
                f"{row['losses'][0]:.4f}",
                f"{row['loss']:.4f}",
            ]
        )
    return table


# --- the command ---------------------------------------------------------------------------------


def format_table(table: list[list[str]]) -> str:
    """Returns rows of text as a Markdown table with even columns."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def environment(target: str | None) -> dict[str, str]:
    """Returns what a figure needs beside it: machine, versions, date."""
    device = target or f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    versions = {}
    for package in ("jax", "flax", "optax", "jmp", "mixed-precision-for-jax", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"device": device, "date": today, "jaxmp": jaxmp.__version__, **versions}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workloads", nargs="*", default=[], help=", ".join(WORKLOADS))
    parser.add_argument("--target", help="compile for this machine instead of running here")
    parser.add_argument("--attention", choices=F.ATTENTION_IMPLEMENTATIONS, default="xla")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --target, an option of XLA; xla_gpu_enable_triton_gemm=false for cuBLAS products",
    )
    parser.add_argument("--only", help="rows whose name contains one of these, comma-separated")
    parser.add_argument("--batch", type=int, help="batch size instead of the workload's")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="steps between two looks at the clock")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all figures")
    parsed = parser.parse_args(arguments)
    parsed.workloads = parsed.workloads or ["gpt-tiny", "vit-tiny"]
    switches = {"true": True, "false": False}
    pairs = [option.partition("=")[::2] for option in parsed.option]
    parsed.option = {name: switches.get(value, value) for name, value in pairs}
    unknown = [name for name in parsed.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"unknown workload {unknown[0]!r}: choose from {', '.join(WORKLOADS)}")
    if parsed.target:
        try:
            targets.devices(parsed.target)  # before JAX starts: it may not find the compiler later
        except ValueError as error:
            parser.error(str(error))
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    settings = parse_arguments(arguments)
    wanted = settings.only.split(",") if settings.only else [""]
    names = [name for name in VARIANTS if any(part in name for part in wanted)]
    here = environment(settings.target)
    print(", ".join(f"{key} {value}" for key, value in here.items()))
    if settings.target is None and jax.default_backend() == "cpu":
        print("A CPU emulates 16 bits in part: these times are no measure of a speed-up.")
    results = {}
    for workload_name in settings.workloads:
        workload = WORKLOADS[workload_name]
        config = dataclasses.replace(workload.config, attention=settings.attention)
        batch_size = settings.batch or workload.batch_size
        workload = dataclasses.replace(workload, config=config, batch_size=batch_size)
        if settings.target is None:
            rows = time_rows(workload, names, settings.rounds, settings.steps)
            table = time_table(rows)
        else:
            rows = compile_rows(workload, settings.target, names, settings.option)
            table = compile_table(rows)
        print(f"\n## {workload_name}, batch {batch_size}, attention {settings.attention}\n")
        print(format_table(table))
        results[workload_name] = rows
    if settings.json:
        settings.json.write_text(json.dumps({"environment": here, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
