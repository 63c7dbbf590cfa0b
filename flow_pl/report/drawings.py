"""List the figures of the report, with their titles and captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.figure import Figure

from flow_pl.report import client_figures, instances, route_figures
from flow_pl.report.evidence import Evidence
from flow_pl.report.routes import Instance
from flow_pl.results import curves
from flow_pl.results import figures as compared
from flow_pl.results.plotting import save

Section = Literal["rounds", "clients", "routes", "instances"]


class Drawing(NamedTuple):
    """A figure of the report.

    Attributes:
        name: stem of its file name.
        section: the section that shows it.
        title: title above it.
        caption: how to read it.
        make: draws the figure; returns None if there is nothing to draw.
    """

    name: str
    section: Section
    title: str
    caption: str
    make: Callable[[Evidence], Figure | None]


def _pictures(found: Sequence[Instance], evidence: Evidence) -> Figure | None:
    return instances.picture(found, evidence.kind, evidence.classes, evidence.tokens) if found else None


def _most(name: Literal["most_local", "most_global"], evidence: Evidence) -> Figure | None:
    return None if evidence.all_routes is None else _pictures(getattr(evidence.all_routes, name), evidence)


_INSTANCES = (
    "Above each: its class and the mean probability of the local branch over the blocks. Below: whether the server's "
    "model (g) and the client's own model (p) are right. At most three belong to the same client."
)

ROUTED_LOCAL = "Routed locally: the share of decisions for which the local branch has a probability above one half."
"""Definition shown with every figure of this share."""

DRAWINGS = (
    Drawing(
        "curves",
        "rounds",
        "Accuracy over the rounds",
        "Lines: mean over the validated clients. Bands: their 10th to 90th percentile.",
        lambda evidence: curves.accuracy_curves(evidence.curve, evidence.rounds, evidence.accuracy),
    ),
    Drawing(
        "route_rounds",
        "rounds",
        "Routed locally, over the rounds",
        f"{ROUTED_LOCAL} Over all decisions of the validated clients.",
        lambda evidence: curves.route_curves(evidence.curve, evidence.blocks, evidence.rounds),
    ),
    Drawing(
        "gains",
        "clients",
        "Personalization gain",
        "Accuracy of the client's own model minus that of the server's model. The bar at zero counts the clients "
        "whose accuracy does not change.",
        lambda evidence: client_figures.gain_histogram(evidence.clients),
    ),
    Drawing(
        "clients",
        "clients",
        "Client by client",
        "Each dot is a client; above the line, its own model is better than the server's. Areas grow with the "
        "number of training examples.",
        lambda evidence: compared.client_scatter(evidence.comparison),
    ),
    Drawing(
        "ranks",
        "clients",
        "From the worst client to the best",
        "Each line sorts the clients by that model's accuracy: the flatter, the fairer. The mean over the shaded "
        "tenth is the 'worst tenth' of the table.",
        lambda evidence: client_figures.accuracy_ranks(evidence.clients, evidence.accuracy),
    ),
    Drawing(
        "sizes",
        "clients",
        "Accuracy by client size",
        "Dots: mean of the clients of that size, seen and new together. Bars: their interquartile range.",
        lambda evidence: client_figures.accuracy_by_size(evidence.clients, evidence.accuracy),
    ),
    Drawing(
        "routes",
        "routes",
        "Routed locally, by block",
        f"{ROUTED_LOCAL} Over all decisions of the tested clients, as in the table of results.",
        lambda evidence: compared.routes(evidence.comparison),
    ),
    Drawing(
        "route_probabilities",
        "routes",
        "How sure the router is",
        "Distribution of the probability of the local branch. Mass at both ends: confident decisions; one peak: "
        "the same mixture for every instance. Decisions right of the dotted line, above one half, are routed locally.",
        lambda evidence: (
            route_figures.probability_histogram(evidence.routes, evidence.blocks) if evidence.all_routes else None
        ),
    ),
    Drawing(
        "route_clients",
        "routes",
        "Routes, client by client",
        "Share routed locally of each client, sorted for each line. A flat line: all clients are routed alike; a "
        "steep line: they differ.",
        lambda evidence: route_figures.client_ranks(evidence.shares, evidence.blocks) if evidence.blocks else None,
    ),
    Drawing(
        "route_agreement",
        "routes",
        "Do clients route alike?",
        "All clients' own models are evaluated on the same instances. Each point is a pair of clients: the share "
        "of equal decisions.",
        lambda evidence: None if evidence.agreement is None else route_figures.agreement_matrix(evidence.agreement),
    ),
    Drawing(
        "route_classes",
        "routes",
        "By class",
        "Mean probability of the local branch, in percent, for the most frequent classes; in brackets, their "
        "decisions.",
        lambda evidence: (
            None
            if evidence.all_routes is None
            else route_figures.by_class(evidence.all_routes, evidence.blocks, evidence.classes)
        ),
    ),
    Drawing("instances_local", "instances", "Most local", _INSTANCES, partial(_most, "most_local")),
    Drawing("instances_global", "instances", "Most global", _INSTANCES, partial(_most, "most_global")),
)


def draw(evidence: Evidence, folder: Path) -> dict[str, Path]:
    """Draw all figures that have something to show.

    Args:
        evidence: the content of the report.
        folder: output folder.

    Returns:
        The PNG files by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {drawing.name: folder / f"{drawing.name}.png" for drawing in DRAWINGS}
    return {d.name: paths[d.name] for d in DRAWINGS if save(partial(d.make, evidence), paths[d.name])}
