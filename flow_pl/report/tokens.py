"""Texts whose tokens are coloured by their way, as HTML that flows with the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from flow_pl.report.instances import token_ways, way_color, way_range
from flow_pl.report.names import tokens_of, visible
from flow_pl.report.routes import Instance


def token_list(
    local: Sequence[Instance], global_: Sequence[Instance], names: Sequence[str] | None, clients: Mapping[int, str]
) -> str:
    """The most local and the most global texts, side by side where there is room.

    Args:
        local: the most local first.
        global_: the most global first.
        names: of the tokens; None for their numbers.
        clients: names by index.
    """
    low, high = way_range([*local, *global_])
    words = names is None or max(map(len, names[4:]), default=0) > 1
    lists = []
    for title, instances in (("Most local", local), ("Most global", global_)):
        texts = "".join(_text(instance, names, clients[instance.client], low, high, words) for instance in instances)
        lists.append(f"<div><h3>{title}</h3>{texts}</div>")
    stops = ", ".join(way_color(low + (high - low) * place, low, high) for place in (0, 0.5, 1))
    scale = f'<span class="scale" style="background:linear-gradient(to right, {stops})"></span>'
    ends = f'<span class="nowrap">{100 * low:.0f} %{scale}{100 * high:.0f} %</span>'
    legend = f'<p class="soft">Mean probability of the local way: {ends}</p>'
    return f'{legend}<div class="instances">{"".join(lists)}</div>'


def _text(instance: Instance, names: Sequence[str] | None, client: str, low: float, high: float, words: bool) -> str:
    spans = []
    for token, way in zip(tokens_of(instance.x, names), token_ways(instance), strict=True):
        if not np.isnan(way):
            color = way_color(float(np.clip(way, low, high)), low, high)
            spans.append(f'<span style="background:{color}">{escape(visible(token))}</span>')
    kind = "tokens words" if words else "tokens"
    right = f"{instance.generalized[instance.mask].sum()} with w_g and {instance.personalized[instance.mask].sum()}"
    where = f"{client}: {100 * instance.share:.0f} % local; {right} with its own model of {instance.mask.sum()} right"
    return f'<div class="text"><div class="{kind}">{"".join(spans)}</div><div class="soft">{escape(where)}</div></div>'
