"""The picture of a run: `report.png` and a self-contained `report.html` in its directory."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmp.diagnose import plots
from jaxmp.diagnose.plots import ACCENT, INK, SECOND
from jaxmp.run import metrics, page, workdir

# What an outline of a run shows beside its figures; the rest of the settings is in the table below.
_HEADLINE = ("policy", "steps", "batch_size", "optimizer.name", "optimizer.learning_rate", "seed")


def write(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Writes both files into the run's directory and returns the path of the page.

    Raises ImportError where matplotlib is missing.
    """
    steps = metrics.read(directory / "metrics.jsonl")
    evaluations = metrics.read(directory / "eval.jsonl")
    settings = workdir.recall(directory) or {}
    picture = directory / "report.png"
    draw(steps, evaluations, name).savefig(picture, dpi=150)
    where = directory / "report.html"
    where.write_text(
        _page(name, steps, evaluations, settings, picture.read_bytes()), encoding="utf-8"
    )
    return where


def draw(steps: Sequence[metrics.Record], evaluations: Sequence[metrics.Record], name: str) -> Any:
    """A matplotlib figure of six panels over steps: loss, accuracy, gradient norm, rate, scale, skips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    figure.suptitle(name, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    panels = figure.subplots(2, 3)
    x = column(steps, "step")
    held_x = column(evaluations, "step")
    for axes, key, title in (
        (panels[0, 0], "loss", "Loss"),
        (panels[0, 1], "accuracy", "Accuracy"),
    ):
        y = column(steps, key)
        axes.plot(x, y, color=ACCENT, alpha=0.22, linewidth=0.8)
        axes.plot(x, smooth(y), color=ACCENT, linewidth=1.6, label="training")
        axes.plot(
            held_x,
            column(evaluations, key),
            "o-",
            color=SECOND,
            markersize=4,
            linewidth=1.2,
            label="held out",
        )
        axes.legend(frameon=False, fontsize=9)
        plots.style(axes, title)
    _logarithmic_if_far(panels[0, 0], column(steps, "loss"))
    panels[0, 1].yaxis.set_major_formatter(lambda value, place: f"{value:.0%}")
    for axes, key, title in (
        (panels[0, 2], "grad_norm", "Gradient norm, before clipping"),
        (panels[1, 0], "learning_rate", "Learning rate"),
        (panels[1, 1], "loss_scale", "Loss scale"),
    ):
        y = column(steps, key)
        axes.plot(
            x,
            y,
            color=ACCENT,
            linewidth=1.2,
            drawstyle="steps-post" if key == "loss_scale" else "default",
        )
        plots.style(axes, title)
        if key == "grad_norm" and np.any(y > 0):
            axes.set_yscale("log")
        if key == "loss_scale" and len(y):
            axes.set_yscale("log", base=2)
            axes.set_ylim(min(0.5, np.nanmin(y) / 2), np.nanmax(y) * 4)
    skipped = np.nan_to_num(column(steps, "skipped"))
    panels[1, 2].fill_between(
        x, np.cumsum(skipped), step="post", color=SECOND, alpha=0.35, linewidth=0
    )
    panels[1, 2].plot(x, np.cumsum(skipped), color=SECOND, linewidth=1.2, drawstyle="steps-post")
    panels[1, 2].set_ylim(0, max(1.0, skipped.sum() * 1.15))
    plots.style(panels[1, 2], f"Skipped steps, {int(skipped.sum())} in all")
    for axes in panels[1]:
        axes.set_xlabel("step", color=INK, fontsize=9)
    return figure


def column(records: Sequence[metrics.Record], key: str) -> np.ndarray:
    """One value of all records, float64, NaN where it is missing or was not finite."""
    values = (record.get(key) for record in records)
    return np.array([math.nan if value is None else float(value) for value in values], np.float64)


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a fiftieth of the values, centred, that leaves NaN out."""
    if not len(values):
        return values
    width = max(1, len(values) // 50)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), np.ones(width), mode="same")
    count = np.convolve(known.astype(float), np.ones(width), mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def summary(
    steps: Sequence[metrics.Record], evaluations: Sequence[metrics.Record]
) -> dict[str, str]:
    """The outcome in a few figures, each as text: held-out results, steps, skips, time, speed."""
    figures: dict[str, str] = {}
    if evaluations:
        for key, value in evaluations[-1].items():
            if key != "step" and value is not None:
                figures["held-out " + key.replace("_", " ")] = (
                    f"{value:.1%}" if "accuracy" in key else f"{value:.4f}"
                )
    figures["steps"] = f"{len(steps):,}"
    figures["skipped"] = f"{sum(bool(record.get('skipped')) for record in steps):,}"
    unit = next((key for key in (steps[-1] if steps else ()) if key.endswith("_per_second")), None)
    if unit:
        figures[unit.replace("_per_second", "/s (median)")] = (
            f"{np.nanmedian(column(steps, unit)):,.0f}"
        )
    return figures


def _logarithmic_if_far(axes: Any, loss: np.ndarray) -> None:
    """A logarithmic loss axis where the loss falls by more than a factor of ten."""
    known = loss[np.isfinite(loss) & (loss > 0)]
    if len(known) and known.max() / known.min() > 10:
        axes.set_yscale("log")


def _page(
    name: str,
    steps: Sequence[metrics.Record],
    evaluations: Sequence[metrics.Record],
    settings: dict[str, Any],
    picture: bytes,
) -> str:
    outline = ", ".join(
        f"{key.rpartition('.')[2]} {settings[key]}" for key in _HEADLINE if key in settings
    )
    models = " on ".join(
        str(settings[k]).removesuffix("Config") for k in ("model", "data") if k in settings
    )
    about = "loss, accuracy, gradient norm, learning rate, loss scale and skipped steps over time"
    return page.document(
        name,
        f"{models}: {outline}",
        summary(steps, evaluations),
        [
            ("", page.image(picture, about)),
            ("Held-out data", _table(evaluations)),
            ("Settings", page.settings(settings)),
        ],
    )


def _table(evaluations: Sequence[metrics.Record], rows: int = 12) -> str:
    """The last evaluations as an HTML table."""
    if not evaluations:
        return page.paragraph("none")
    keys = list(evaluations[-1])
    cell = lambda value: f"{value:.4f}" if isinstance(value, float) else str(value)
    return page.table(
        [key.replace("_", " ") for key in keys],
        [[cell(record.get(key)) for key in keys] for record in evaluations[-rows:]],
    )
