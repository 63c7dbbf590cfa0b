"""The report as one page of HTML that needs no other file: page.html.j2 and page.css say how it looks."""

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

NO_CURVE = "There is no record of the fit's validations: add the callback LearningCurves to the fit to see them here."

ROUTES = (
    "The router gives every instance, for each block, a probability of the local branch. "
    f"{ROUTED_LOCAL} Entropy of a decision: 0 bits where it is sure, 1 where it is undecided.",
    "Explained by the client: how many bits one learns about the route by knowing whose instance it is; explained by "
    "the instance: how many more by knowing which one it is. Both are 0 where everything takes the same branch.",
)

AGREEMENT = (
    "To compare clients, all their models are asked about the same {common} test instances. Agreement: the share "
    "of equal decisions, mean over pairs of clients; by chance: that of clients that route local as often, but "
    "on random instances; beyond chance: the share of the rest that they agree on. A router "
    "that is not adapted to clients agrees on everything, where it looks at the instance alone."
)


class Grid(NamedTuple):
    """A table: its header, its rows by the name of their group ("" for none), and the text above it."""

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
    """A section of the page; one without any content is left out.

    Attributes:
        anchor: where links lead.
        title: above it.
        table: at the top.
        note: a paragraph below it.
        explanations: paragraphs that are shown when they are asked for.
        figures: side by side where there is room.
        texts: with coloured tokens.
        figures_first: whether they come before the table.
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
    """The page.

    Args:
        evidence: what was found out.
        figures: PNG files by name.
        results: rows of the table of results by group, each a label and a cell for each population.
        highlights: key figures by what they are and by population.
    """
    populations = list(evidence.clients)
    note = "" if evidence.curve else NO_CURVE
    table = Part("results", "Results", Grid(["in percent", *(f"{name} clients" for name in populations)], results))
    rounds = Part("rounds", "Over the rounds", note=note, figures=_figures("rounds", figures))
    clients = Part("clients", "Clients", _worst(evidence), figures=_figures("clients", figures), figures_first=True)
    sections = (
        # a figure is on the first screen; the key figures above it say what the long table says
        *((rounds, table, clients) if rounds.figures else (clients, table, rounds)),
        _routes(evidence, figures),
        _instances(evidence, figures),
    )
    counted = ", ".join(f"{len(members)} {population}" for population, members in evidence.clients.items())
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template("page.html.j2").render(
        title=f"{evidence.method} with {evidence.backbone}, round {evidence.rounds}",
        subtitle=f"{evidence.data}: {counted} clients tested",
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
    caption = f"The {len(rows)} clients whose own models do worst, of all populations; shares in percent"
    return Grid(shown, {"": _texts(Table(list(shown), rows), signed=("gain",))}, caption)


def _routes(evidence: Evidence, figures: Mapping[str, Path]) -> Part:
    part = Part("routes", "Routes")
    routes = evidence.all_routes
    if routes is None:
        return part
    found = block_table(evidence)
    bits = [name for name in found.columns if "bits" in name]
    # on a phone there is room for more rows, not for more columns
    columns = zip(*_texts(found, plain=bits), strict=True)
    blocks, *measures = zip(found.columns, columns, strict=True)
    caption = (
        f"{len(routes.clients)} clients, looked at instance by instance: {routes.decisions} decisions in each block; "
        "in percent, but for bits"
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
    """Rows as texts: shares in percent, but for columns that are `plain`."""

    def text(name: str, value: object) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if name in plain else f"{100 * value:{'+' if name in signed else ''}.1f}"
        return "-" if value is None else str(value)

    return [[text(name, value) for name, value in zip(found.columns, row, strict=True)] for row in found.rows]
