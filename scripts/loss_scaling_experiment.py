"""Why float16 needs loss scaling: the same net trained as one of R identical workers, R up to 2^18.

Trains: a 64-96-96-96-10 ReLU network on 1200 of scikit-learn's handwritten digits, tests on the 597
    others, 300 Adam steps, batches of 256 a worker. The loss is the mean over the global batch B = 256 R:
    each worker backpropagates loss / R and the float32 gradients of all R are added, which for identical
    workers is a product with R. In exact arithmetic R cancels; the derivative of the loss with respect
    to a logit is at most 1 / B, and float16 rounds what is not above 2^-25 to zero. Every cotangent of
    this network has the policy's compute dtype. (Micikevicius et al. 2018, arXiv 1710.03740.)
Command: python scripts/loss_scaling_experiment.py [--directory runs/loss_scaling] [--seeds 2]
Hardware and time: two CPU cores, about 3 minutes.
Writes: loss_scaling.png, loss_scaling.json and loss_scaling.md (the table, also printed).
Expected: float32, bfloat16 and float16 with dynamic scaling end at the same accuracy, within half a point
    of float32, whatever the batch. Float16 without scaling loses accuracy from B = 2^22 and trains to
    nothing at 2^24, where what survives of its cotangents is biased and Adam magnifies it; from 2^25 on
    all of them are zero, and at 2^26 every parameter still has the bits that it was initialised with.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import optim, precision, training
from jaxmp.nn import functional as F
from jaxmp.precision import policy as policies
from jaxmp.run import data

LAYERS = (64, 96, 96, 96, 10)
WORKER_BATCH = 256
TRAIN_ROWS = 1200
STEPS = 300
GLOBAL_BATCHES = (2**8, 2**18, 2**20, 2**22, 2**24, 2**26)
ROWS: dict[str, tuple[str, Any]] = {
    "float32": ("float32", None),
    "bfloat16": ("mixed_bfloat16", None),
    "float16": ("mixed_float16", None),
    "float16 + dynamic scaling": ("mixed_float16", precision.DynamicLossScale()),
}
"""For each row of the table its policy and loss scale."""


@functools.cache
def digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(training rows, test rows) of the digits in a fixed random order."""
    images, labels = data.digits()
    order = data.epoch_order(0, 0, len(labels))
    whole = {"inputs": images.reshape(len(labels), -1)[order], "targets": labels[order]}
    part = lambda rows: {name: array[rows] for name, array in whole.items()}
    return part(slice(None, TRAIN_ROWS)), part(slice(TRAIN_ROWS, None))


def init(key: jax.Array) -> list[dict[str, jax.Array]]:
    """He et al.'s initial weights (arXiv 1502.01852) and zero biases."""
    keys = jax.random.split(key, len(LAYERS) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for k, m, n in zip(keys, LAYERS, LAYERS[1:])
    ]


def logits_of(params: Any, x: jax.Array) -> jax.Array:
    """x [B, 64] -> logits [B, 10], all in the dtype of x."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def share_of_loss(logits: jax.Array, batch: Any) -> jax.Array:
    """One worker's share of the mean loss over the global batch, computed in float32."""
    loss = F.softmax_cross_entropy(logits.astype(jnp.float32), batch["targets"])
    return loss / batch["workers"]


def train(policy: str, loss_scale: Any, workers: jax.Array, seed: jax.Array) -> dict[str, Any]:
    """One run: test accuracy, training loss, share of non-zero cotangents, and what moved.

    `nonzero` counts the cotangents of the logits in the compute dtype, over all steps. `moved` is the
    share of parameters whose bits differ from the initial ones.
    """
    rows, held_out = jax.tree.map(jnp.asarray, digits())
    policy = policies.get_policy(policy)
    adam = optax.chain(optax.scale_by_adam(b2=0.999), optax.scale_by_learning_rate(2e-3))
    # What adding up the gradients of all workers does to those of one.
    tx = optax.chain(optax.scale(workers), optim.with_loss_scale(adam, loss_scale))
    loss_fn = lambda params, batch: share_of_loss(logits_of(params, batch["inputs"]), batch)
    step = training.make_train_step(loss_fn, tx, policy)
    init_key, order_key = jax.random.split(jax.random.key(seed))
    start = training.TrainState.create(init(init_key), tx)

    def body(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        chosen = jax.random.randint(key, (WORKER_BATCH,), 0, TRAIN_ROWS)
        batch = {name: array[chosen] for name, array in rows.items()} | {"workers": workers}
        logits = logits_of(*policy.cast_to_compute((state.params, batch["inputs"])))
        scaled = lambda z: share_of_loss(z, batch) * optim.loss_scale_of(state.opt_state)
        alive = jnp.mean((jax.grad(scaled)(logits) != 0).astype(jnp.float32))
        return step(state, batch)[0], alive

    state, alive = jax.lax.scan(body, start, jax.random.split(order_key, STEPS))
    result = lambda part: logits_of(*policy.cast_to_compute((state.params, part["inputs"])))
    moved = [jnp.sum(a != b) for a, b in zip(*map(jax.tree.leaves, (state.params, start.params)))]
    return {
        "accuracy": F.accuracy(result(held_out), held_out["targets"]),
        "loss": F.softmax_cross_entropy(result(rows).astype(jnp.float32), rows["targets"]),
        "nonzero": jnp.mean(alive),
        "moved": sum(moved) / sum(x.size for x in jax.tree.leaves(start.params)),
    }


def run_row(name: str, global_batches: Sequence[int], seeds: int) -> dict[str, np.ndarray]:
    """The results of one row of the table, each [global batches, seeds]."""
    policy, loss_scale = ROWS[name]
    workers = jnp.asarray([b // WORKER_BATCH for b in global_batches], jnp.float32)
    one = functools.partial(train, policy, loss_scale)
    grid = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    return jax.tree.map(np.asarray, jax.jit(grid)(workers, jnp.arange(seeds)))


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table, means over seeds: accuracy (training loss), and cotangents alive."""
    names = list(results)
    head = ["global batch", *names, "logit cotangents that are not zero, float16 without → with"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for i, batch in enumerate(GLOBAL_BATCHES):
        mean = lambda name, key, i=i: float(np.mean(results[name][key][i]))
        cells = [f"{mean(n, 'accuracy'):.1%} ({mean(n, 'loss'):.4g})" for n in names]
        alive = " → ".join(f"{mean(n, 'nonzero'):.0%}" for n in names[2:])
        lines.append(f"| 2^{batch.bit_length() - 1} | " + " | ".join([*cells, alive]) + " |")
    still = 1 - float(np.max(results["float16"]["moved"][-1]))
    lines += ["", f"At 2^26 float16 without scaling left {still:.0%} of its parameters bit by bit."]
    return "\n".join(lines)


STYLES = {
    "float32": ("#c3ccd5", "-", "s"),
    "bfloat16": ("#1d2733", "--", "D"),
    "float16": ("#c8571b", "-", "o"),
    "float16 + dynamic scaling": ("#2563a8", "-", "^"),
}


def draw(results: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """Accuracy and living cotangents over the global batch, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, title in (
        (left, "accuracy", "Test accuracy after 300 Adam steps"),
        (right, "nonzero", "Cotangents of the logits that are not zero"),
    ):
        for name, row in results.items():
            color, line, marker = STYLES[name]
            values = 100 * np.mean(row[key], axis=1)
            width = 4 if name == "float32" else 1.6  # seen below the lines that lie on it
            axes.plot(GLOBAL_BATCHES, values, line, marker=marker, color=color, label=name,
                      markersize=5, linewidth=width)  # fmt: skip
        axes.axvspan(2**25, 2**27, color="#c8571b", alpha=0.08, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xlim(2**7, 2**27)
        axes.set_ylim(-3, 103)
        axes.set_xticks(GLOBAL_BATCHES)
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:.0f}%")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("global batch")
        axes.grid(True, color="#e3e8ee", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="lower left", fontsize=9)
    note = "from 2^25 every float16\ncotangent rounds to zero"
    right.annotate(note, (2**24.8, 97), ha="right", va="top", fontsize=8.5, color="#c8571b")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment and writes its figure, its figures and its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/loss_scaling"))
    parser.add_argument("--seeds", type=int, default=2, help="runs to average over")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds} is none; write 1 or more")
    try:
        options.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--directory {options.directory} cannot be written ({error.strerror})")
    results = {}
    for name in ROWS:
        print(f"{name} …", flush=True)
        results[name] = run_row(name, GLOBAL_BATCHES, options.seeds)
    record = {
        "global_batches": GLOBAL_BATCHES,
        "results": jax.tree.map(lambda x: x.tolist(), results),
    }
    place = options.directory / "loss_scaling"
    place.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    place.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")
    draw(results, place.with_suffix(".png"))
    print(table(results), f"\nwritten: {place}.png, .json, .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
