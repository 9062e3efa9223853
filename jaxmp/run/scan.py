"""A learning-rate scan: one experiment at several rates and seeds, and how much the rate matters.

All runs share one compiled step, in which the rate is an argument. Nothing is resumed: a scan's runs
are short, and its directory holds its result alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.diagnose import plots
from jaxmp.run import build, cli, loop, validate, workdir
from jaxmp.run import config as configs
from jaxmp.run.config import Config, ConfigError

FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
"""The default rates, as multiples of the config's."""

USAGE = """usage: lr_scan.py configs/NAME.py [--rates R ...] [--seeds N ...] [--setting VALUE ...]

Trains the experiment at every rate with every seed, and tells how sensitive it is to the rate.
  --rates    learning rates (default: five, from a tenth of the config's to ten times it)
  --seeds    seeds (default: the config's and the next)
  lr_scan.py configs/NAME.py --rates 1e-3 3e-3 1e-2 --seeds 0 1 2 --optimizer.warmup 0"""


@dataclasses.dataclass(frozen=True)
class Trial:
    """How one run of a scan ended."""

    rate: float
    seed: int
    loss: float
    """Training loss, the mean over the last twentieth of the steps; not finite if the run broke."""
    held_out: dict[str, float]
    """Metrics on held-out data at the end."""


def sensitivity(losses: Any, uniform: float) -> float:
    """The learning-rate sensitivity: by how much the loss exceeds the best one, averaged over the rates.

        mean over rates of min(l, uniform) - min over rates of l

    `losses` is [rates] or [rates, seeds], then averaged over seeds first; `uniform` is the loss of a
    uniform guess, log(classes), which also stands for losses that are not finite: a diverged run
    counts as one that learned nothing. 0 says that any of these rates will do. The figure depends on
    the range of rates, so compare it only between scans of the same rates. (Wortsman et al. 2023,
    arXiv 2309.14322, section 2.2.)
    """
    by_rate = np.asarray(losses, np.float64)
    by_rate = np.where(np.isfinite(by_rate), np.minimum(by_rate, uniform), uniform)
    by_rate = by_rate.reshape(len(by_rate), -1).mean(axis=1)
    return float(by_rate.mean() - by_rate.min())


def scan(
    config: Config,
    rates: Sequence[float],
    seeds: Sequence[int],
    *,
    seen: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Trains `config` at each rate with each seed, in that order; calls `seen` after each run.

    Raises ConfigError for a user's mistake.
    """
    if not rates or not seeds:
        raise ConfigError("a scan needs at least one of --rates and one of --seeds.")
    for rate in rates:
        if not math.isfinite(rate):
            raise ConfigError(f"--rates must be finite and above 0, got {rate}.")
        validate.check(at(config, rate, seeds[0]))
    for seed in seeds:
        validate.check(at(config, rates[0], seed))
    parts = {seed: with_rate(build.build(at(config, rates[0], seed))) for seed in seeds}
    _, step = build.compile_step(parts[seeds[0]])  # a seed is data, not program
    evaluate = jax.jit(parts[seeds[0]].evaluate)
    inits = {seed: jax.jit(parts[seed].init) for seed in seeds}
    trials = []
    for rate in rates:
        for seed in seeds:
            _, state = inits[seed]()
            carry = (jnp.float32(rate), state)
            trials.append(_train(parts[seed], step, evaluate, carry, rate, seed))
            seen(trials[-1])
    return trials


def at(config: Config, rate: Any, seed: int) -> Config:
    """The config at another rate and seed."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    return dataclasses.replace(config, optimizer=optimizer, seed=seed)


def with_rate(parts: build.Experiment) -> build.Experiment:
    """The experiment with the pair (learning rate, state) for its state."""

    def step(carry: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        rate, state = carry
        at_rate = build.build(at(parts.config, rate, parts.config.seed), parts.source)
        state, metrics = at_rate.step(state, batch)
        return (rate, state), metrics

    init = lambda: (jnp.float32(parts.config.optimizer.learning_rate), parts.init())
    return dataclasses.replace(parts, init=init, step=step)


def _train(
    parts: build.Experiment, step: build.Step, evaluate: Any, carry: Any, rate: float, seed: int
) -> Trial:
    steps, losses = parts.config.steps, []
    for index in range(steps):
        carry, metrics = step(carry, parts.source.batch_at(index))
        if index >= steps - max(1, steps // 20):
            losses.append(metrics["loss"])
    held_out = build.evaluate_all(evaluate, carry[1], parts.source.validation)
    return Trial(rate, seed, float(np.mean(jax.device_get(losses))), held_out)


def table(trials: Sequence[Trial], uniform: float) -> str:
    """The scan for people: a line a rate, means over seeds, then the sensitivity in a sentence."""
    key = _metric(trials)
    lines = [f"{'rate':>10}  {'train loss':>10}  held-out {key}, mean (each seed)"]
    for rate, losses, values in by_rate(trials):
        show = (lambda v: f"{v:.1%}") if key == "accuracy" else (lambda v: f"{v:.4f}")
        each = ", ".join(map(show, values))
        lines.append(f"{rate:>10.3g}  {np.mean(losses):>10.4f}  {show(np.mean(values))} ({each})")
    score = sensitivity([losses for _, losses, _ in by_rate(trials)], uniform)
    best = min(by_rate(trials), key=lambda row: _below(float(np.mean(row[1])), math.inf))[0]
    lines.append(
        f"learning-rate sensitivity {score:.3f} over these rates (loss of a uniform guess "
        f"{uniform:.3f}); lowest training loss at {best:.3g}"
    )
    return "\n".join(lines)


def by_rate(trials: Sequence[Trial]) -> list[tuple[float, list[float], list[float]]]:
    """(rate, training losses of its seeds, their held-out metrics), rates rising."""
    key = _metric(trials)
    rates = sorted({trial.rate for trial in trials})
    of = lambda rate: [trial for trial in trials if trial.rate == rate]
    return [(r, [t.loss for t in of(r)], [t.held_out[key] for t in of(r)]) for r in rates]


def write(directory: pathlib.Path, name: str, config: Config, trials: Sequence[Trial]) -> None:
    """Writes `lr_scan.json` and, where matplotlib is installed, `lr_scan.png`."""
    uniform = uniform_loss(config)
    known = lambda value: value if math.isfinite(value) else None
    record = {
        "name": name,
        "uniform_loss": uniform,
        "sensitivity": sensitivity([losses for _, losses, _ in by_rate(trials)], uniform),
        "trials": [
            {"rate": t.rate, "seed": t.seed, "loss": known(t.loss)}
            | {"held_out": {k: known(v) for k, v in t.held_out.items()}}
            for t in trials
        ],
        "config": configs.to_json(config),
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    (directory / "lr_scan.json").write_text(text, encoding="utf-8")
    try:
        figure = draw(trials, name, uniform)
    except ImportError:
        print(
            "no picture: it needs matplotlib (pip install matplotlib); lr_scan.json has the figures."
        )
        return
    figure.savefig(directory / "lr_scan.png", dpi=150)


def draw(trials: Sequence[Trial], name: str, uniform: float) -> Any:
    """A matplotlib figure of training loss and held-out metric over the rate, a dot a seed."""
    from matplotlib.figure import Figure

    rows, key = by_rate(trials), _metric(trials)
    score = sensitivity([losses for _, losses, _ in rows], uniform)
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(
        f"{name}: learning-rate sensitivity {score:.3f}", x=0.012, ha="left", fontsize=13
    )
    left, right = figure.subplots(1, 2)
    rates = [row[0] for row in rows]
    clipped = [[_below(loss, uniform) for loss in row[1]] for row in rows]
    percent = key == "accuracy"
    held_out = [[100 * v if percent else _below(v, 2 * uniform) for v in row[2]] for row in rows]
    for axes, values, color, title in (
        (left, clipped, plots.ACCENT, "Final training loss"),
        (right, held_out, plots.SECOND, f"Held-out {key}" + (", %" if percent else "")),
    ):
        axes.plot(rates, [np.mean(v) for v in values], color=color, linewidth=1.6)
        for rate, of_seeds in zip(rates, values):
            axes.plot([rate] * len(of_seeds), of_seeds, "o", color=color, markersize=5, alpha=0.6)
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("learning rate")
        plots.style(axes, title)
    left.axhline(uniform, color=plots.QUIET, linestyle="--", linewidth=1)
    left.text(min(rates), uniform, "uniform guess, and runs that broke", va="bottom", fontsize=8.5)
    if percent:
        right.set_ylim(0, 102)
    return figure


def uniform_loss(config: Config) -> float:
    """The loss of a uniform guess: the log of the number of outputs."""
    outputs = getattr(config.model, "num_classes", None) or getattr(config.model, "vocab_size", 0)
    return math.log(outputs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Scans what the command line asks for; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)

    def run() -> int:
        rates, rest = _numbers(arguments, "--rates", float)
        seeds, rest = _numbers(rest, "--seeds", int)
        config, name = cli.parse(rest, USAGE)
        directory = pathlib.Path(config.workdir or f"runs/{name}-lr-scan").expanduser()
        workdir.prepare(directory)
        cli.use_compilation_cache()
        seen = lambda trial: print(
            f"rate {trial.rate:.3g} seed {trial.seed}: training loss {trial.loss:.4f}, "
            f"held out {loop.describe(trial.held_out)}",
            flush=True,
        )
        around = [float(f"{config.optimizer.learning_rate * f:.2g}") for f in FACTORS]
        next_to = [config.seed, config.seed + 1]
        trials = scan(config, rates or around, seeds or next_to, seen=seen)
        write(directory, name, config, trials)
        print(table(trials, uniform_loss(config)), f"\nwritten: {directory}/lr_scan.json and .png")
        return 0

    return cli.exit_code_of(run, "stopped; a scan does not resume.")


def _numbers(arguments: Sequence[str], option: str, kind: type) -> tuple[list[Any], list[str]]:
    """(the numbers behind an option, the arguments without them). Raises ConfigError."""
    words, rest = cli.take(arguments, option)
    if words == []:
        raise ConfigError(f"{option} lacks its values; write {option} and one or more numbers.")
    values = []
    for word in words or []:
        try:
            values.append(kind(word))
        except ValueError:
            wanted = "numbers, such as 1e-3 3e-3" if kind is float else "whole numbers, such as 0 1"
            raise ConfigError(f"{option} cannot hold {word!r}; write {wanted}.") from None
    return values, rest


def _metric(trials: Sequence[Trial]) -> str:
    """What to report of held-out data: the accuracy of images, the loss of text."""
    return "accuracy" if "accuracy" in trials[0].held_out else "loss"


def _below(value: float, limit: float) -> float:
    return min(value, limit) if math.isfinite(value) else limit
