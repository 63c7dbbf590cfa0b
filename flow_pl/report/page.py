"""The report as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flow_pl.report.drawings import DRAWINGS, Section
from flow_pl.report.evidence import Evidence
from flow_pl.report.html import Cells, details, heading, image, images, page, paragraph, section, table, tiles
from flow_pl.report.tables import Table, block_table, worst_clients
from flow_pl.report.tokens import token_list

TITLES: dict[str, str] = {
    "results": "Results",
    "rounds": "Over the rounds",
    "clients": "Clients",
    "routes": "Routes",
    "instances": "Instances",
}
"""Of the sections, by their anchors."""

NO_CURVE = "There is no record of the fit's validations: add the callback LearningCurves to the fit to see them here."

ROUTES = (
    "Every instance gets, for each block, a probability of the local way; routed local is the share of decisions for "
    "which it is above a half. Entropy of a decision: 0 bits where the router is sure, 1 where it halves.",
    "Explained by the client: how many bits one learns about the way by knowing whose instance it is; explained by the "
    "instance: how many more by knowing which one it is. Both are 0 where everything goes the same way.",
)

AGREEMENT = (
    "To compare clients, all their models are asked about the same {common} test instances. Same way: mean share, over "
    "pairs of clients, of decisions that fall the same way; by chance: what clients that go local as often, but on "
    "instances of their own choice, would have; beyond chance: the share of what is left that they agree on. A router "
    "that is not adapted to clients agrees on everything, where it looks at the instance alone."
)


def report(
    evidence: Evidence,
    figures: Mapping[str, Path],
    results: Sequence[Cells],
    highlights: Mapping[str, Mapping[str, str]],
) -> str:
    """The page.

    Args:
        evidence: what was found out.
        figures: PNG files by name.
        results: rows of the table of results, with a cell for each population.
        highlights: key figures by what they are and by population.
    """
    title = f"{evidence.method} with {evidence.backbone}, round {evidence.rounds}"
    populations = list(evidence.clients)
    contents = {
        "results": [table(["in percent", *(f"{name} clients" for name in populations)], results)],
        "rounds": [_figures("rounds", figures) or (paragraph(NO_CURVE) if not evidence.curve else "")],
        "clients": [_figures("clients", figures), _worst(evidence)],
        "routes": _routes(evidence, figures),
        "instances": _instances(evidence, figures),
    }
    sections = {anchor: section(anchor, TITLES[anchor], *pieces) for anchor, pieces in contents.items()}
    links = "".join(f'<a href="#{anchor}">{TITLES[anchor]}</a>' for anchor, content in sections.items() if content)
    counted = ", ".join(f"{len(members)} {population}" for population, members in evidence.clients.items())
    above = [heading(title, f"{evidence.data}: {counted} clients tested"), tiles(highlights), f"<nav>{links}</nav>"]
    return page(title, [*above, *filter(None, sections.values())])


def _figures(wanted: Section, figures: Mapping[str, Path]) -> str:
    shown = [drawing for drawing in DRAWINGS if drawing.section == wanted and drawing.name in figures]
    return images([image(figures[drawing.name], drawing.title, drawing.caption) for drawing in shown])


def _worst(evidence: Evidence) -> str:
    found = worst_clients(evidence)
    if not found.rows:
        return ""
    population, shown = found.columns.index("population"), ("client", "examples", "w_g", "own model", "gain")
    columns = [found.columns.index(name) for name in shown]
    rows = [[row[column] for column in columns] for row in found.rows]
    for short, row in zip(rows, found.rows, strict=True):
        short[0] = f"{short[0]} ({row[population]})"
    caption = f"The {len(rows)} clients whose own models do worst, of all populations; shares in percent"
    return table(shown, _cells(Table(list(shown), rows), signed=("gain",)), caption)


def _routes(evidence: Evidence, figures: Mapping[str, Path]) -> list[str]:
    routes = evidence.all_routes
    if routes is None:
        return []
    found = block_table(evidence)
    bits = [name for name in found.columns if "bits" in name]
    # on a phone there is room for more rows, not for more columns
    rows = zip(*(row.values for row in _cells(found, plain=bits)), strict=True)
    blocks, *measures = zip(found.columns, rows, strict=True)
    sample = (
        f"{len(routes.clients)} clients, looked at instance by instance: {routes.decisions} decisions in each block; "
        "in percent, but for bits"
    )
    summary = table(["", *blocks[1]], [Cells([name, *values]) for name, values in measures], sample)
    agreed = [AGREEMENT.format(common=evidence.common)] if evidence.agreement is not None else []
    return [summary, details("What these figures mean", *ROUTES, *agreed), _figures("routes", figures)]


def _instances(evidence: Evidence, figures: Mapping[str, Path]) -> list[str]:
    routes = evidence.all_routes
    if routes is None or not routes.most_local:
        return []
    if evidence.kind != "text":
        return [_figures("instances", figures)]
    return [token_list(routes.most_local, routes.most_global, evidence.tokens, evidence.names)]


def _cells(found: Table, signed: Sequence[str] = (), plain: Sequence[str] = ()) -> list[Cells]:
    """Rows as texts: shares in percent, but for columns that are `plain`."""

    def text(name: str, value: object) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if name in plain else f"{100 * value:{'+' if name in signed else ''}.1f}"
        return "-" if value is None else str(value)

    return [Cells([text(name, value) for name, value in zip(found.columns, row, strict=True)]) for row in found.rows]
