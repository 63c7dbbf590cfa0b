"""Write the results of runs as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

Line = Mapping[str, Any]

SERVER, PERSONAL = "test/seen/generalized_accuracy", "test/seen/personalized_accuracy"
BACKDOOR = {"fedavg": "test/seen/backdoor_generalized", "flow": "test/seen/backdoor_personalized"}


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))


def different(lines: Sequence[Line], *names: str) -> list[tuple[str, ...]]:
    """Return the different values of labels, in the order of the lines."""
    return list(dict.fromkeys(tuple(line[name] for name in names) for line in lines))


def figure(lines: Sequence[Line], metric: str, digits: int = 3, **labels: str) -> str:
    """Return the mean of a metric over the seeds, and its standard deviation; "" if it was not measured."""
    values = [
        line[metric] for line in lines if metric in line and all(line[name] == label for name, label in labels.items())
    ]
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def norms(lines: Sequence[Line]) -> str:
    """Return validation accuracy by clipping norm and simulated deployment."""
    deployments = different(lines, "deployment")
    rows = [
        [norm, *(figure(lines, "val/generalized_accuracy", norm=norm, deployment=each) for (each,) in deployments)]
        for (norm,) in different(lines, "norm")
    ]
    return table(["norm", *(each for (each,) in deployments)], rows)


def privacy(lines: Sequence[Line]) -> str:
    """Return accuracy by simulated deployment and epsilon, of FedAvg, fine-tuning and Flow."""
    columns = {
        "FedAvg": ("fine_tuning", SERVER),
        "FedAvg-FT": ("fine_tuning", PERSONAL),
        "Flow, server's model": ("flow", SERVER),
        "Flow, personalized": ("flow", PERSONAL),
    }
    rows = []
    for values in different(lines, "deployment", "norm", "noise", "epsilon"):
        labels = dict(zip(("deployment", "norm", "noise", "epsilon"), values, strict=True))
        cells = [figure(lines, metric, method=method, **labels) for method, metric in columns.values()]
        rows.append([*values, *cells])
    return table(["clients", "norm", "noise", "epsilon", *columns], rows)


def robustness(lines: Sequence[Line]) -> str:
    """Return the honest clients' accuracy, and the backdoor's success, by attack and aggregation."""
    shown = [
        ("FedAvg", "fedavg", SERVER),
        ("Flow, personalized models", "flow", PERSONAL),
        ("FedAvg, success of the backdoor", "fedavg", BACKDOOR["fedavg"]),
        ("Flow, success of the backdoor on personalized models", "flow", BACKDOOR["flow"]),
    ]
    aggregations = [each for (each,) in different(lines, "aggregation")]
    tables = []
    for title, method, metric in shown:
        rows = []
        for attack, share in different(lines, "attack", "share"):
            labels = {"method": method, "attack": attack, "share": share}
            cells = [figure(lines, metric, aggregation=each, **labels) for each in aggregations]
            if any(cells):
                rows.append([f"{attack} {float(share):.0%}" if float(share) else attack, *cells])
        if rows:
            tables.append(f"{title}\n\n{table(['attack', *aggregations], rows)}")
    return "\n\n".join(tables)


def volume(lines: Sequence[Line]) -> str:
    """Return megabytes and accuracy by method and compression."""
    rows = []
    for method, compression in different(lines, "method", "compression"):
        labels = {"method": method, "compression": compression}
        chosen = [line for line in lines if (line["method"], line["compression"]) == (method, compression)]
        megabytes = f"{mean(line['train/bytes_up'] for line in chosen) / 1e6:.2f}"
        accuracy = [figure(lines, metric, **labels) for metric in (SERVER, PERSONAL)]
        rows.append([method, compression, megabytes, *accuracy])
    return table(["method", "compression", "MB up in a round", "generalized", "personalized"], rows)


TABLES: dict[str, Callable[[Sequence[Line]], str]] = {
    "norms": norms,
    "privacy": privacy,
    "robustness": robustness,
    "bytes": volume,
}
