"""Pictures of what the instruments found. Each function draws on axes it is given; nothing is saved.

matplotlib is the caller's: this module is handed axes and never imports it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmp.numerics.formats import FloatFormat, format_of

INK, QUIET, ACCENT, SECOND, THIRD = "#1d2733", "#9aa7b4", "#2563a8", "#c8571b", "#3b8a5a"
KIND_COLORS = (ACCENT, THIRD, SECOND)


def style(axes: Any, title: str) -> None:
    """Gives axes the common look: a title at the left, a light grid, two spines."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.grid(True, color="#e3e8ee", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(QUIET)


def exponents(
    axes: Any,
    exponents: np.ndarray,
    counts: Mapping[str, np.ndarray],
    formats: Sequence[str],
    title: str = "Magnitudes, and what each format holds",
) -> None:
    """Draws shares of values over their power of two, with the range of each format below.

    Args:
      exponents: powers of two, rising.
      counts: for each kind of tensor ("parameters", "gradients"), how many values have each exponent.
      formats: names; a bar shows normal numbers, its thin end the subnormal ones.
    """
    for (kind, count), color in zip(counts.items(), KIND_COLORS):
        total = max(int(np.sum(count)), 1)
        axes.fill_between(
            exponents, np.asarray(count) / total, step="mid", color=color, alpha=0.28, linewidth=0
        )
        axes.step(
            exponents,
            np.asarray(count) / total,
            where="mid",
            color=color,
            linewidth=1.2,
            label=kind,
        )
    top = axes.get_ylim()[1]
    lane = top * 0.09
    for row, name in enumerate(formats):
        _format_bar(axes, format_of(name), -lane * (row + 0.8), lane * 0.3)
    axes.set_ylim(-lane * (len(formats) + 0.6), top)
    axes.set_xlabel("power of two of |x|", color=INK, fontsize=9)
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:.0%}" if value >= 0 else "")
    axes.legend(frameon=False, fontsize=9)
    style(axes, title)
    seen = [exponents[np.asarray(count) > 0] for count in counts.values()]
    seen = [found for found in seen if len(found)]
    low = min([found.min() for found in seen], default=-30)
    high = max([found.max() for found in seen], default=10)
    axes.set_xlim(max(low - 6, exponents.min()), min(max(high + 4, 20), exponents.max()))


def _format_bar(axes: Any, fmt: FloatFormat, y: float, height: float) -> None:
    """One lane: subnormals thin, normals thick, the name at the largest number."""
    lowest, normal = math.log2(fmt.smallest_subnormal), math.log2(fmt.smallest_normal)
    largest = math.log2(fmt.max)
    axes.plot([lowest, normal], [y, y], color=QUIET, linewidth=1.5, solid_capstyle="butt")
    axes.barh(y, largest - normal, left=normal, height=height, color=QUIET, alpha=0.75)
    axes.text(
        0.005, y, fmt.name, transform=axes.get_yaxis_transform(), fontsize=8, va="center", color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
    )  # fmt: skip


def by_depth(
    axes: Any,
    names: Sequence[str],
    values: Mapping[str, Sequence[float]],
    title: str,
    ylabel: str = "",
    logarithmic: bool = True,
) -> None:
    """Draws one or more figures of each block, from the first block to the last."""
    place = np.arange(len(names))
    for (label, series), color in zip(values.items(), KIND_COLORS):
        axes.plot(place, series, "o-", color=color, markersize=4, linewidth=1.3, label=label)
    if logarithmic and any(np.any(np.asarray(series) > 0) for series in values.values()):
        axes.set_yscale("log")
    level = sum(map(len, names)) < 70
    turned = {} if level else {"rotation": 35, "ha": "right"}
    axes.set_xticks(place, names, fontsize=7.5, **turned)
    axes.set_ylabel(ylabel, color=INK, fontsize=9)
    if len(values) > 1:
        axes.legend(frameon=False, fontsize=9)
    style(axes, title)


def over_steps(
    axes: Any, steps: np.ndarray, values: np.ndarray, title: str, *, log_base: int = 0
) -> None:
    """Draws one scalar of a run over its steps; `log_base` above 0 for a logarithmic axis."""
    axes.plot(steps, values, color=ACCENT, linewidth=1.2, drawstyle="steps-post")
    if log_base and np.any(values > 0):
        axes.set_yscale("log", base=log_base)
    axes.set_xlabel("step", color=INK, fontsize=9)
    style(axes, title)
