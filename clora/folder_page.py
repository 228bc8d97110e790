"""A saved adapter as one self-contained HTML page: tables and a heat map, no script, nothing from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .anatomy import CELLS, LayerAnatomy
from .console import heat, printable
from .report import STYLE

HEAT = """
.heat { border-collapse: separate; border-spacing: 1px; width: auto; }
.heat td { padding: .15rem .3rem; border: 0; font-size: .75rem; } .heat td:first-child { white-space: nowrap; }
.bars { display: inline-flex; align-items: flex-end; height: 1.4rem; gap: 1px; }
.bars i { width: 4px; background: #2f8f5b; }
"""


def page(about: Mapping[str, Any], layers: Sequence[LayerAnatomy], tasks: Sequence[str], overlap: Any) -> str:
    """The page."""
    named = {key: value for key, value in about.items() if key != "provenance"} | about["provenance"]
    facts = "".join(f"<tr><td>{_cell(key)}</td><td>{_cell(_text(value))}</td></tr>" for key, value in named.items())
    rows = "".join(_row(layer) for layer in layers)
    heads = "".join(f"<th>{name}</th>" for name in CELLS)
    heat = ""
    if len(tasks) > 1:
        heat = (
            "<h2>Overlap of tasks</h2><figure class='wide'>" + _heat(tasks, overlap) + "<figcaption>Cosine of what two "
            "tasks changed, over all layers: 1 the same change, 0 nothing in common, -1 one undoes the other."
            "</figcaption></figure>"
        )
    title = printable(f"C-LoRA adapter {about['folder']}")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}{HEAT}</style></head><body><h1>{escape(title)}</h1>"
        f"<table>{facts}</table><h2>Layers</h2><div class='wide'><table><tr>{heads}<th>spectrum</th></tr>{rows}</table>"
        f"</div>{heat}</body></html>\n"
    )


def _cell(text: str) -> str:
    return escape(printable(text))


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else "none" if value is None else str(value)


def _row(layer: LayerAnatomy) -> str:
    top = layer.spectrum[0] if layer.spectrum else 0.0
    bars = (
        "".join(f"<i style='height:{100 * value / top:.0f}%'></i>" for value in layer.spectrum[:64]) if top > 0 else ""
    )
    text = "".join(f"<td>{_cell(cell)}</td>" for cell in layer.cells())
    return f"<tr>{text}<td><span class='bars'>{bars}</span></td></tr>"


def _heat(tasks: Sequence[str], overlap: Any) -> str:
    rows = []
    for i, (task, row) in enumerate(zip(tasks, overlap, strict=True)):
        cells = []
        for other, value in zip(tasks[: i + 1], row[: i + 1], strict=True):
            tip = _cell(f"{task}, {other}: {float(value):+.3f}")
            cells.append(f"<td style='background:{heat(value)}' title='{tip}'>{float(value):+.2f}</td>")
        rows.append(f"<tr><td>{_cell(task)}</td>{''.join(cells)}</tr>")
    return f"<table class='heat'>{''.join(rows)}</table>"
