"""Pieces of a page of HTML that needs nothing but itself: text is escaped, pictures are part of it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

STYLE = """
:root{--ink:#1c2126;--soft:#5b6670;--line:#dfe3e6;--paper:#fff;--ground:#f4f5f6;--global:#0072b2;--local:#d55e00}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
main{max-width:1180px;margin:0 auto;padding:16px}
h1{font-size:1.5rem;line-height:1.2;margin:.4em 0 .2em}
h2{font-size:1.2rem;margin:0 0 .3em}
h3{font-size:1rem;margin:0 0 .3em}
p{margin:.3em 0 .7em;max-width:75ch}
.soft,figcaption{color:var(--soft);font-size:.875rem}
nav{display:flex;flex-wrap:wrap;gap:6px;margin:.8em 0}
nav a{background:var(--paper);border:1px solid var(--line);border-radius:999px;padding:4px 12px;font-size:.875rem;
color:var(--ink);text-decoration:none}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:16px;margin:14px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:14px 0}
.tile{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:10px 12px;min-width:0}
.tile h3{font-size:.8125rem;font-weight:400;color:var(--soft);line-height:1.35;min-height:2.7em}
.tile div{display:flex;flex-wrap:wrap;gap:2px 12px}
.tile b{display:block;white-space:nowrap;font-size:1.3rem;
line-height:1.25;color:var(--ink);font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.8125rem;display:block;line-height:1.35}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:18px;
align-items:start;margin-top:12px}
figure{margin:0}
figure img{width:100%;height:auto;display:block}
figcaption{margin-top:6px}
.table{overflow-x:auto;margin:10px 0;max-width:760px}
.table td,.table th{overflow-wrap:normal}
.table td:first-child{overflow-wrap:anywhere;min-width:8em}
details{margin:.4em 0 .8em}
summary{cursor:pointer;color:var(--soft);font-size:.875rem}
details p{font-size:.9375rem}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:4px 6px;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
tr.group td{font-weight:600;padding-top:12px}
.instances{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:18px;align-items:start}
.text{border-top:1px solid var(--line);padding:8px 0}
.tokens{font:14px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap}
.tokens span{border-radius:2px;padding:1px 0}
.words span{padding:1px 3px;margin-right:3px}
.scale{display:inline-block;width:90px;height:.8em;border-radius:3px;vertical-align:baseline;margin:0 6px}
.nowrap{white-space:nowrap}
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load: nothing but what is in the page."""


class Cells(NamedTuple):
    """A row of a table.

    Attributes:
        values: texts of its cells.
        group: whether it names the rows that follow.
    """

    values: Sequence[str]
    group: bool = False


def page(title: str, body: Iterable[str]) -> str:
    """A page.

    Args:
        title: text.
        body: pieces of HTML.
    """
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    content = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{content}\n</main></body></html>\n'


def heading(title: str, below: str) -> str:
    """The title of a page and a line below it."""
    return f'<h1>{escape(title)}</h1><p class="soft">{escape(below)}</p>'


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{escape(text)}</p>"


def section(anchor: str, title: str, *pieces: str) -> str:
    """A section; those without any piece are left out.

    Args:
        anchor: where links lead.
        title: text.
        *pieces: of HTML.
    """
    content = "\n".join(piece for piece in pieces if piece)
    return f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>\n{content}\n</section>' if content else ""


def details(summary: str, *texts: str) -> str:
    """Paragraphs that are shown when they are asked for."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(map(paragraph, texts))}</details>"


def tiles(figures: Mapping[str, Mapping[str, str]]) -> str:
    """Key figures: for each a value by population."""
    cells = []
    for name, values in figures.items():
        shown = (f"<span><b>{escape(value)}</b>{escape(population)}</span>" for population, value in values.items())
        cells.append(f'<div class="tile"><h3>{escape(name)}</h3><div>{"".join(shown)}</div></div>')
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(header: Sequence[str], rows: Iterable[Cells], caption: str = "") -> str:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        header: texts.
        rows: of as many cells, or of one that names the rows that follow.
        caption: text above it.
    """
    lines = []
    for row in rows:
        if row.group:
            lines.append(f'<tr class="group"><td colspan="{len(header)}">{escape(row.values[0])}</td></tr>')
        else:
            lines.append(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in row.values)}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    # not within the table, with which it would scroll
    above = f'<p class="soft">{escape(caption)}</p>' if caption else ""
    content = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'{above}<div class="table"><table>{content}</table></div>'


def image(path: Path, title: str, caption: str) -> str:
    """A picture, as part of the page.

    Args:
        path: PNG file.
        title: text above it.
        caption: text below it.
    """
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    picture = f'<img alt="{escape(title)}" src="data:image/png;base64,{content}">'
    return f"<figure><h3>{escape(title)}</h3>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def images(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""
