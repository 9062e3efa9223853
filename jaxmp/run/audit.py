"""An experiment looked over: what its numbers need of a format, and how far its gradients and blocks reach.

`audit.py configs/NAME.py` takes the experiment at its start or at a checkpoint, puts one batch of training
through every instrument, and writes one page for people who have not read the code.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxmp.diagnose import flow, layer_gains, plots, ranges, spectrum
from jaxmp.diagnose.plots import ACCENT, QUIET, SECOND
from jaxmp.run import (
    build,
    checkpoint,
    cli,
    config,
    instruments,
    loop,
    metrics,
    page,
    report,
    workdir,
)
from jaxmp.run.config import Config, ConfigError

USAGE = """usage: audit.py configs/NAME.py [--checkpoint [N]] [--setting VALUE ...]

Puts one batch of an experiment through every instrument and writes WORKDIR/audit/report.html: magnitudes
against the number formats, gradients by depth, how far blocks stretch, attention, and the run so far.
  --checkpoint      look at the newest checkpoint in the work directory; with a number, at that step's
                    (default: the experiment as it starts)
  audit.py configs/text_gpt_bfloat16.py --checkpoint --batch_size 4"""

# Of the entropy of even attention. Below, some row looks at one key and no longer learns where to look.
_COLLAPSED = 0.05
# float16 and the softmax of bfloat16 have trouble from here on (Dehghani et al. 2023, arXiv 2302.05442).
_LARGE_LOGIT = 50.0
# A block that stretches a change further than this makes depth multiply quickly.
_STRETCHED = 10.0

Section = tuple[str, str, Any, str]
"""Heading, two sentences, figure or None, and HTML to go under it."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """What the instruments found at one state, on one batch."""

    step: int | None
    """The checkpoint's step; None at the start."""
    ranges: ranges.RangeAudit
    at_inputs: flow.GradientFlow
    """The loss's gradient at the input of every block."""
    by_module: flow.GradientFlow
    gains: dict[str, layer_gains.Gains]
    """The largest singular value of each block's Jacobian."""
    whole: layer_gains.Gains
    """That of all blocks together."""
    degree: spectrum.Homogeneity
    attention: list[instruments.Attention]


def main(arguments: Sequence[str] | None = None) -> int:
    """Audits what the command line asks for; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)

    def run() -> int:
        wanted, rest = cli.take(arguments, "--checkpoint")
        settings, name = cli.parse(rest, USAGE)
        settings = dataclasses.replace(settings, mesh="")  # one batch on one device
        directory = pathlib.Path(settings.workdir or f"runs/{name}").expanduser()
        workdir.prepare(directory / "audit")
        cli.use_compilation_cache()
        parts = build.build(settings)
        step, state = state_at(parts, directory, wanted)
        found = measure(parts, state, step)
        print(write(directory / "audit", name, settings, found, directory))
        return 0

    return cli.exit_code_of(run)


def state_at(
    parts: build.Experiment, directory: pathlib.Path, wanted: Sequence[str] | None
) -> tuple[int | None, Any]:
    """(step, state): of the start if no checkpoint is wanted, of the newest for (), else of the one named."""
    if wanted is None:
        return None, build.first_state(parts)
    if len(wanted) > 1 or not all(word.isdigit() for word in wanted):
        raise ConfigError(
            f"--checkpoint cannot be {' '.join(wanted)!r}; write the step of one, such as "
            "--checkpoint 100, or --checkpoint alone for the newest."
        )
    with build.model_mistakes():
        abstract, _ = build.abstract_arguments(parts)
    try:
        step = int(wanted[0]) if wanted else None
        restored = checkpoint.read(directory / "checkpoints", abstract, step)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"--checkpoint: {error}") from error
    return restored.step, restored.state


def measure(parts: build.Experiment, state: Any, step: int | None = None) -> Audit:
    """What the instruments find at a state, on the batch that would be trained on next."""
    batch = parts.source.batch_at(step or 0)
    with build.model_mistakes():
        at_inputs, by_module = jax.jit(instruments.flow_of(parts))(state, batch)
        gains, whole, degree = instruments.gains_of(parts, state, batch)
        audited = ranges.audit_ranges(parts.loss, state.params, batch, state.rng, state.model_state)
        attention = instruments.attention_of(parts, state, batch)
    return Audit(step, audited, at_inputs, by_module, gains, whole, degree, attention)


def write(
    directory: pathlib.Path, name: str, settings: Config, found: Audit, run: pathlib.Path
) -> pathlib.Path:
    """Writes `report.html` and its pictures to a directory; returns the page. `run` has the run's records.

    Raises ConfigError where matplotlib is missing.
    """
    try:
        sections = [
            _ranges(found.ranges),
            _flow(found),
            _gains(found),
            _attention(found.attention),
            _history(run),
        ]
    except ImportError as error:
        raise ConfigError(
            "an audit draws with matplotlib, which is missing: pip install matplotlib."
        ) from error
    shown = []
    for number, (heading, text, figure, more) in enumerate(sections, 1):
        inner = page.paragraph(text)
        if figure is not None:
            picture = _png(figure)
            slug = heading.lower().replace(" ", "-")
            (directory / f"{number}-{slug}.png").write_bytes(picture)
            inner += page.image(picture, f"{heading}. {text}")
        shown.append((heading, inner + more))
    shown.append(("Settings", page.settings(config.to_json(settings))))
    when = "as it starts" if found.step is None else f"at step {found.step}"
    parts = [type(settings.model).__name__.removesuffix("Config"), f"policy {settings.policy}"]
    document = page.document(
        f"{name}, {when}",
        f"{', '.join(parts)}: one batch of training, looked at by every instrument.",
        cards(found, metrics.read(run / loop.METRICS_FILE)),
        shown,
    )
    where = directory / "report.html"
    where.write_text(document, encoding="utf-8")
    return where


def cards(found: Audit, steps: Sequence[metrics.Record]) -> dict[str, str]:
    """The verdicts, each in a few words, by what they are about."""
    shown: dict[str, str] = {}
    for name, advice in found.ranges.suggestions.items():
        kept = len(advice.overrides)
        words = "does not fit" if not advice.holds else "fits"
        if advice.holds and kept:
            words = f"fits, {kept} in float32"
        if advice.holds and advice.loss_scale > 1:
            words += f", scale {_power(advice.loss_scale)}"
        shown[name] = words
    verdicts = [f.verdict for f in (*found.at_inputs.findings(), *found.by_module.findings())]
    shown["gradients"] = ", ".join(dict.fromkeys(verdicts)) or "reach every layer"
    block, gain = _largest(found.gains)
    shown[f"largest stretch, {block}"] = f"{gain:.3g}×"
    if found.attention:
        shown["sharpest attention"] = f"{min(a.least_entropy for a in found.attention):.2f} nats"
    if steps:
        skipped = sum(bool(record.get("skipped")) for record in steps)
        shown["skipped steps"] = f"{skipped:,} of {len(steps):,}"
    return shown


def _ranges(audited: ranges.RangeAudit) -> Section:
    verdicts = []
    for name, advice in audited.suggestions.items():
        if not advice.holds:
            verdicts.append(f"{name} does not hold them")
            continue
        places = ", ".join(path for path, _ in advice.overrides)
        needs = [f"with {places} in float32"] if places else []
        needs += (
            [f"with a loss scale of {_power(advice.loss_scale)}"] if advice.loss_scale > 1 else []
        )
        verdicts.append(f"{name} holds them {' and '.join(needs) or 'as they are'}")
    text = (
        "How large the numbers of one training step are, by powers of two; each bar is what a format "
        "holds, its thin end with fewer and fewer digits. "
        f"Here {'; '.join(verdicts)}."
    )
    figure, (axes,) = _figure(1, 4.6)
    plots.exponents(axes, audited.exponents, audited.histograms, audited.formats, "")
    advice = "\n\n".join(map(str, audited.suggestions.values()))
    table = str(dataclasses.replace(audited, suggestions={}))
    return (
        "Numbers and formats",
        text,
        figure,
        page.listing(advice) + page.folded("Every module, in figures", page.listing(table)),
    )


def _flow(found: Audit) -> Section:
    said = [str(f) for f in (*found.at_inputs.findings(), *found.by_module.findings())]
    text = (
        "How large the gradient of the loss is at the input of each block, from the first block to the "
        "last, and in each module's parameters. "
        + (said[0] if said else "Here gradients reach every layer at a similar size.")
    )
    many = len(found.by_module.names) > 12
    figure, (left, right) = _figure(2, 5.4 if many else 4.2)
    inputs, modules = found.at_inputs, found.by_module
    plots.by_depth(left, inputs.names, {"norm": inputs.norm.tolist()}, "At the input of blocks")
    plots.by_depth(
        right, modules.names, {"rms": modules.rms.tolist()}, "Of parameters, root mean square"
    )
    more = page.listing("\n\n".join(said[1:])) if said[1:] else ""
    return "Gradients by depth", text, figure, more


def _gains(found: Audit) -> Section:
    names = list(found.gains)
    values = {
        "largest of the examples": [float(g.max) for g in found.gains.values()],
        "median": [float(g.median) for g in found.gains.values()],
    }
    block, gain = _largest(found.gains)
    whole = float(found.whole)
    verdict = (
        f"Here {block} stretches most, {gain:.3g} times, and all blocks together {whole:.3g} times"
    )
    if whole == 0:
        verdict = (
            "Here the outputs do not depend on the inputs at all yet: the last layer starts at zero"
        )
    elif gain > _STRETCHED:
        verdict += "; a norm before it, a weighted residual or a smaller start would calm it"
    text = (
        "How far each block stretches a small change of its input at most (the largest singular value "
        "of its Jacobian), at the examples of this batch: local figures, no bound for other inputs. "
        f"{verdict}."
    )
    figure, (axes,) = _figure(1, 4.2)
    plots.by_depth(axes, names, values, "")
    axes.axhline(1.0, color=QUIET, linewidth=1, linestyle="--")
    degree = f"All blocks together, at the first example: {found.degree}."
    return "How far blocks stretch", text, figure, "" if whole == 0 else page.paragraph(degree)


def _attention(layers: Sequence[instruments.Attention]) -> Section:
    heading = "Attention"
    if not layers:
        return heading, "The model has no attention.", None, ""
    names = [layer.layer for layer in layers]
    sharpest = min(layers, key=lambda layer: layer.least_entropy)
    loudest = max(layers, key=lambda layer: layer.max_logit)
    mean = np.mean([layer.entropy for layer in layers])
    verdict = "Here attention is spread out everywhere"
    if sharpest.least_entropy < _COLLAPSED * mean:
        verdict = f"Here a row of {sharpest.layer} looks at one key alone"
    if loudest.max_logit > _LARGE_LOGIT:
        verdict += (
            f", and the logits of {loudest.layer} reach {loudest.max_logit:.3g}: normalise queries and "
            "keys, or cap the logits"
        )
    text = (
        "The entropy of attention, in nats: 0 looks at one key alone, the logarithm of the number of keys "
        f"at all alike; beside it the largest logit. {verdict}."
    )
    figure, (left, right) = _figure(2, 4.2)
    entropies = {
        "mean": [layer.entropy for layer in layers],
        "sharpest row": [layer.least_entropy for layer in layers],
    }
    plots.by_depth(left, names, entropies, "Entropy", "nats", logarithmic=False)
    left.set_ylim(bottom=0)
    logits = {"largest logit": [layer.max_logit for layer in layers]}
    plots.by_depth(right, names, logits, "Largest logit", logarithmic=False)
    return heading, text, figure, ""


def _history(run: pathlib.Path) -> Section:
    heading = "The run so far"
    steps = metrics.read(run / loop.METRICS_FILE)
    if not steps:
        return heading, f"There are no records in {run} yet; train it and look again.", None, ""
    flows = metrics.read(run / loop.INSTRUMENTS_FILE)
    x, skipped = report.column(steps, "step"), np.nan_to_num(report.column(steps, "skipped"))
    scale = report.column(steps, "loss_scale")
    moved = f"moved between {_power(np.nanmin(scale))} and {_power(np.nanmax(scale))}"
    verdict = f"the loss scale {moved if np.ptp(scale) else f'stayed at {_power(scale[0])}'}"
    text = (
        "The loss scale, the steps that were skipped because a gradient was not finite or an outlier, and "
        f"gradients by depth as the run recorded them. In {len(steps):,} steps {verdict} and "
        f"{int(skipped.sum()):,} were skipped."
    )
    figure, axes = _figure(3 if flows else 2, 4.2)
    plots.over_steps(axes[0], x, scale, "Loss scale", log_base=2)
    axes[0].set_ylim(min(0.5, np.nanmin(scale) / 2), np.nanmax(scale) * 4)
    plots.over_steps(axes[1], x, np.cumsum(skipped), "Skipped steps, in all")
    axes[1].set_ylim(0, max(1.0, skipped.sum() * 1.15))
    if flows:
        keys = [key for key in flows[-1] if key.startswith("flow/")]
        for place, key in enumerate(keys):
            share = place / max(len(keys) - 1, 1)
            label = key.removeprefix("flow/") if place in (0, len(keys) - 1) else None
            axes[2].plot(
                report.column(flows, "step"),
                report.column(flows, key),
                ".-",
                color=_between(ACCENT, SECOND, share),
                linewidth=1,
                label=label,
            )
        axes[2].set_yscale("log")
        axes[2].set_xlabel("step", fontsize=9)
        axes[2].legend(frameon=False, fontsize=8)
        plots.style(axes[2], "Gradient norm at the input of blocks")
    return heading, text, figure, ""


def _figure(panels: int, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, panels))


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def _between(one: str, other: str, share: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple((1 - share) * a + share * b for a, b in zip(to_rgb(one), to_rgb(other)))


def _largest(gains: dict[str, layer_gains.Gains]) -> tuple[str, float]:
    """(the block that stretches most, how far)."""
    found = {name: float(gain) for name, gain in gains.items()}
    name = max(found, key=lambda name: found[name])
    return name, found[name]


def _power(scale: float) -> str:
    """A power of two as people write it, another number as it is."""
    exponent = math.log2(scale) if scale > 0 else math.nan
    return f"2^{exponent:.0f}" if exponent == round(exponent) else f"{scale:g}"
