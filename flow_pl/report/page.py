"""Render the report as one self-contained HTML page; page.html.j2 and page.css define its look."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flow_pl.report.drawings import DRAWINGS, ROUTED_LOCAL, Section
from flow_pl.report.evidence import Evidence
from flow_pl.report.tables import Table, block_table, worst_clients
from flow_pl.report.tokens import TokenLists, token_lists

NO_CURVE = "The validations of the fit were not recorded: add the callback LearningCurves to the fit to see them here."

ROUTES = (
    "For each instance and block, the router gives a probability of the local branch. "
    f"{ROUTED_LOCAL} Entropy of a decision: 0 bits if the router is certain, 1 bit if it is undecided.",
    "Explained by the client: the information in bits that the client gives about the branch taken; explained by the "
    "instance: the further information that the instance gives. Both are 0 if everything takes the same branch.",
)

AGREEMENT = (
    "To compare clients, all their models are evaluated on the same {common} test instances. Agreement: the share of "
    "equal decisions, averaged over pairs of clients; by chance: the agreement of clients that route locally as often, "
    "but on random instances; beyond chance: the share of the remaining decisions on which they agree. Clients "
    "agree on everything if the router is not adapted to them and looks only at the instance."
)


class Grid(NamedTuple):
    """A table: its header, its rows by group name ("" for no group), and the caption above it."""

    header: Sequence[str]
    groups: Mapping[str, Sequence[Sequence[str]]]
    caption: str = ""


class Picture(NamedTuple):
    """A figure: the text above it, the text below it, and the PNG file in base64."""

    title: str
    caption: str
    content: str


@dataclass(frozen=True)
class Part:
    """A section of the page; omitted if it has no content.

    Attributes:
        anchor: target of links to the section.
        title: heading of the section.
        table: table at the top.
        note: paragraph below the table.
        explanations: paragraphs that the reader can unfold.
        figures: figures, side by side if there is space.
        texts: texts with coloured tokens.
        figures_first: whether the figures precede the table.
    """

    anchor: str
    title: str
    table: Grid | None = None
    note: str = ""
    explanations: Sequence[str] = ()
    figures: Sequence[Picture] = ()
    texts: TokenLists | None = None
    figures_first: bool = False

    def __bool__(self) -> bool:
        return bool(self.table or self.note or self.explanations or self.figures or self.texts)


def report(
    evidence: Evidence,
    figures: Mapping[str, Path],
    results: Mapping[str, Sequence[Sequence[str]]],
    highlights: Mapping[str, Mapping[str, str]],
) -> str:
    """Render the page.

    Args:
        evidence: the content of the report.
        figures: PNG files by name.
        results: rows of the results table by group, each a label and one cell per population.
        highlights: key figures, by name and population.
    """
    populations = list(evidence.clients)
    note = "" if evidence.curve else NO_CURVE
    table = Part("results", "Results", Grid(["in percent", *(f"{name} clients" for name in populations)], results))
    rounds = Part("rounds", "Over the rounds", note=note, figures=_figures("rounds", figures))
    clients = Part("clients", "Clients", _worst(evidence), figures=_figures("clients", figures), figures_first=True)
    sections = (
        # show a figure on the first screen; the key figures above it summarize the long table
        *((rounds, table, clients) if rounds.figures else (clients, table, rounds)),
        _routes(evidence, figures),
        _instances(evidence, figures),
    )
    counted = ", ".join(f"{len(members)} {population}" for population, members in evidence.clients.items())
    named = "" if evidence.accuracy == "accuracy" else f"; accuracy: {evidence.accuracy}"
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template("page.html.j2").render(
        title=f"{evidence.method} with {evidence.backbone}, round {evidence.rounds}",
        subtitle=f"{evidence.data}: {counted} clients tested{named}",
        highlights=highlights,
        sections=[section for section in sections if section],
    )


def _figures(wanted: Section, figures: Mapping[str, Path]) -> list[Picture]:
    return [
        Picture(d.title, d.caption, base64.b64encode(figures[d.name].read_bytes()).decode("ascii"))
        for d in DRAWINGS
        if d.section == wanted and d.name in figures
    ]


def _worst(evidence: Evidence) -> Grid | None:
    found = worst_clients(evidence)
    if not found.rows:
        return None
    population, shown = found.columns.index("population"), ("client", "examples", "w_g", "own model", "gain")
    columns = [found.columns.index(name) for name in shown]
    rows = [[row[column] for column in columns] for row in found.rows]
    for short, row in zip(rows, found.rows, strict=True):
        short[0] = f"{short[0]} ({row[population]})"
    caption = f"The {len(rows)} clients with the least accurate own models, over all populations; shares in percent"
    return Grid(shown, {"": _texts(Table(list(shown), rows), signed=("gain",))}, caption)


def _routes(evidence: Evidence, figures: Mapping[str, Path]) -> Part:
    part = Part("routes", "Routes")
    routes = evidence.all_routes
    if routes is None:
        return part
    found = block_table(evidence)
    bits = [name for name in found.columns if "bits" in name]
    # a phone has space for more rows, not for more columns
    columns = zip(*_texts(found, plain=bits), strict=True)
    blocks, *measures = zip(found.columns, columns, strict=True)
    caption = (
        f"{len(routes.clients)} clients, inspected instance by instance: {routes.decisions} decisions in each "
        "block; in percent, except for bits"
    )
    table = Grid(["", *blocks[1]], {"": [[name, *values] for name, values in measures]}, caption)
    agreed = [AGREEMENT.format(common=evidence.common)] if evidence.agreement is not None else []
    explanations = [*ROUTES, *agreed]
    return replace(part, table=table, explanations=explanations, figures=_figures("routes", figures))


def _instances(evidence: Evidence, figures: Mapping[str, Path]) -> Part:
    part = Part("instances", "Instances")
    routes = evidence.all_routes
    if routes is None or not routes.most_local:
        return part
    if evidence.kind != "text":
        return replace(part, figures=_figures("instances", figures))
    texts = token_lists(routes.most_local, routes.most_global, evidence.tokens, evidence.names)
    return replace(part, texts=texts)


def _texts(found: Table, signed: Sequence[str] = (), plain: Sequence[str] = ()) -> list[list[str]]:
    """Format rows as texts: shares in percent, except in the `plain` columns."""

    def text(name: str, value: object) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if name in plain else f"{100 * value:{'+' if name in signed else ''}.1f}"
        return "-" if value is None else str(value)

    return [[text(name, value) for name, value in zip(found.columns, row, strict=True)] for row in found.rows]
