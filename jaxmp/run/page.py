"""The frame of a self-contained HTML page: headline figures as cards, then sections, pictures inside."""

from __future__ import annotations

import base64
import html
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #f5f7f9; margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.5rem 3rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { margin: .2rem 0 1.2rem; color: #566472; }
.figures { display: flex; flex-wrap: wrap; gap: .7rem; margin-bottom: 1.2rem; }
.figures div { background: #fff; border: 1px solid #e3e8ee; border-radius: 8px; padding: .6rem 1rem; }
.figures b { display: block; font-size: 1.35rem; } .figures span { color: #566472; font-size: .85rem; }
img { width: 100%; background: #fff; border: 1px solid #e3e8ee; border-radius: 8px; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e3e8ee; font-size: .9rem; }
td, th { padding: .25rem .9rem; border-bottom: 1px solid #eef1f4; text-align: left; }
pre { background: #fff; border: 1px solid #e3e8ee; border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
  font: 12.5px/1.45 ui-monospace, monospace; }
summary { cursor: pointer; color: #2563a8; margin: .8rem 0; }
.settings { columns: 2; } .settings div { break-inside: avoid; font: 13px/1.6 ui-monospace, monospace; }
"""


def document(
    title: str, subtitle: str, cards: Mapping[str, str], sections: Sequence[tuple[str, str]]
) -> str:
    """The page as text. Sections are (heading, HTML); an empty heading makes no headline."""
    figures = "".join(
        f"<div><b>{_text(value)}</b><span>{_text(key)}</span></div>" for key, value in cards.items()
    )
    body = "".join((f"<h2>{_text(head)}</h2>" if head else "") + inner for head, inner in sections)
    made = (
        f"{time.strftime('%Y-%m-%d %H:%M')}, jax {jax.__version__} on "
        f"{jax.devices()[0].device_kind}, Python {platform.python_version()}"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style></head>
<body><main><h1>{_text(title)}</h1><p>{_text(subtitle)}</p>
<div class="figures">{figures}</div>
{body}
<h2>Made</h2><p>{_text(made)}</p></main></body></html>
"""


def image(png: bytes, alt: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{_text(alt)}" src="data:image/png;base64,{data}">'


def paragraph(text: str) -> str:
    """Words, line breaks kept."""
    return f"<p>{_text(text)}</p>".replace("\n", "<br>")


def listing(text: str) -> str:
    """Text as it was written, in a typewriter's letters."""
    return f"<pre>{_text(text)}</pre>"


def folded(summary: str, inner: str) -> str:
    """HTML that shows when its summary is clicked."""
    return f"<details><summary>{_text(summary)}</summary>{inner}</details>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of values as text."""
    line = lambda cells, tag: "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells)
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{line(head, 'th')}</tr>{body}</table>"


def settings(values: Mapping[str, Any]) -> str:
    """Settings in two columns, one a line."""
    lines = "".join(f"<div>{_text(key)} = {_text(value)}</div>" for key, value in values.items())
    return f'<div class="settings">{lines}</div>'


def _text(value: Any) -> str:
    return html.escape(str(value))
