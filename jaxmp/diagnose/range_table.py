"""Rows of range audits, and the table that people read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxmp.diagnose import magnitudes
from jaxmp.numerics import observe

Kind = Literal["parameter", "input", "activation", "gradient"]
_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Range:
    """The magnitudes of one tensor: a parameter, its gradient, an input, or an operation's result."""

    kind: Kind
    name: str
    """A parameter's or input's path; the module path of an operation, "" outside of all modules."""
    magnitudes: magnitudes.Magnitudes
    module: str = ""
    """The module's path among the parameters, "" for what lies in none."""
    site: observe.Site | None = None
    """The operation: its primitive, phase, source line and loops; None for other tensors."""

    def to_json(self) -> dict[str, Any]:
        """The row as plain values."""
        row: dict[str, Any] = {"kind": self.kind, "name": self.name, "module": self.module}
        for field in ("primitive", "phase", "source", "loops"):
            row[field] = getattr(self.site, field) if self.site else ""
        return row | {"loops": list(row["loops"])} | self.magnitudes.to_json()


def table(groups: Mapping[tuple[str, str], magnitudes.Magnitudes], formats: Sequence[str]) -> str:
    """One line for each (kind, name): its range, and per format "flush/subnormal/overflow" in percent.

    Of more than forty, those that lose most in the first format are shown, in their own order.
    """
    lost = {k: max(m.shares(formats[0])) if formats else 0.0 for k, m in groups.items()}
    kept = set(sorted(groups, key=lambda key: -lost[key])[:_SHOWN])
    rows = [["kind", "module", "powers of two", "zeros", *formats]]
    for (kind, name), found in groups.items():
        if (kind, name) in kept:
            shares = [found.shares(f) for f in formats]
            rows.append(
                [kind, _shortened(name), _span(found), f"{_percent(found)}%"]
                + ["/".join(_short(part) for part in share) for share in shares]
            )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    if len(groups) > len(kept):
        lines.append(f"… and {len(groups) - len(kept)} more that lose less in {formats[0]}")
    title = "Percent of the numbers other than zero that would flush / go subnormal / overflow:"
    return "\n".join([title, *lines])


def _span(found: magnitudes.Magnitudes) -> str:
    """The smallest, middle and largest power of two."""
    text = f"{found.quantile(0)}…{found.quantile(0.5)}…{found.quantile(1)}" if found.numbers else ""
    return text + (f" +{found.not_finite} not finite" if found.not_finite else "")


def _shortened(name: str) -> str:
    return (name if len(name) <= 48 else "…" + name[-47:]) or "(outside modules)"


def _percent(found: magnitudes.Magnitudes) -> str:
    return _short(found.zeros / max(found.total, 1))


def _short(share: float) -> str:
    return "0" if share == 0 else "<.1" if share < 1e-3 else f"{100 * share:.3g}"
