"""Print the tables of `make bench`, and write `bench.json`."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.table import Table

import flow_pl
from tools.benchmarks.breakdown import MATHS, Breakdown
from tools.benchmarks.contest import TOLERANCE, Outcome
from tools.benchmarks.race import OURS, SPREAD, Entry, Race

MEANING = {
    "sequential": "bare, one client at a time: autograd.grad and torch._foreach (the practical limit)",
    "optimizer": "bare, one client at a time: loss.backward() and torch.optim.SGD",
    "vmap": "bare, all clients side by side: torch.func.vmap(grad)",
    "hand": "bare, all clients side by side: products of batches written by hand, one autograd graph (the limit)",
    "loop": "ours: FederatedLoop, ServerRound, server optimizer",
    "trainer": "ours through lightning.Trainer, reading the store: with all costs of a user's run",
    "bare": "bare, one client at a time, as sequential",
    "pfl": "pfl-research",
    "flwr": "Flower's simulation",
    "fedjax": "FedJAX",
    "blazefl": "BlazeFL",
    "fluke": "fluke",
}


def print_outcome(console: Console, outcome: Outcome) -> None:
    """Print a workload's contenders; for Flow, the cost of its round."""
    tried = ", ".join(f"chunk {size}: {value:.0f} ms" for size, value in outcome.candidates.items())
    console.print(f"[bold]{outcome.workload}[/bold]; ours: chunk {outcome.chunk_size}{f' ({tried})' if tried else ''}")
    if outcome.workload.flow:
        table = Table("round", "ms", "COST: Flow's round over FedAvg's")
        table.add_row("FedAvg, ours", f"{outcome.milliseconds('fedavg'):.1f}", "1")
        for name, label in (("loop", "Flow, ours"), ("hand", "Flow, batched by hand (the limit)")):
            if name in outcome.seconds:
                table.add_row(label, f"{outcome.milliseconds(name):.1f}", _ratio(outcome.ratios(name, "fedavg")))
        console.print(table)
    else:
        table = Table("contender", "", "ms a round", "its time over ours", "same model")
        for name in outcome.seconds:
            same = outcome.difference(name)
            verdict = f"{'yes' if same <= TOLERANCE else '[red]NO[/red]'} ({same:.0e})"
            ratio = "1" if name == "loop" else _ratio(outcome.ratios(name))
            table.add_row(name, MEANING[name], f"{outcome.milliseconds(name):.1f}", ratio, verdict)
        console.print(table)
        console.print(f"sequential over trainer: {_ratio(outcome.ratios('sequential', 'trainer'))}")
    if torch.get_num_threads() == 1:
        console.print(f"this process had {outcome.busy:.0%} of a core")
    console.print()


def print_race(console: Console, race: Race) -> None:
    """Print contenders in their own processes, each with its best settings."""
    console.print(f"[bold]{race.workload}[/bold]; every contender in its own processes, with its best settings")
    table = Table(
        "contender", "best settings", "ms a round", "over our loop", "over our Trainer", "start, s", "same model"
    )
    for name in race.contenders:
        best, difference = race.best(name), race.difference(name)
        start = min(seconds for entry, seconds in race.starts.items() if _starts(entry) == _starts(best))
        verdict = f"{'yes' if difference <= TOLERANCE else '[red]NO[/red]'} ({difference:.0e})"
        ratios = [_ratio(race.ratios(name, ours)) for ours in OURS]
        table.add_row(name, best.label, f"{race.milliseconds(best):.1f}", *ratios, f"{start:.1f}", verdict)
    console.print(table)
    every = Table("contender", "settings", "ms a round", "upper over lower quartile", "")
    for entry, heat in race.heats.items():
        if entry not in race.seconds:
            every.add_row(entry.contender, entry.label, f"{heat * 1e3:.1f}", "", "given up in the warm-up")
            continue
        verdict = "best" if entry == race.best(entry.contender) else ""
        if not race.usable(entry):
            verdict = f"unusable: spread above {SPREAD:g}"
        every.add_row(
            entry.contender, entry.label, f"{race.milliseconds(entry):.1f}", f"{race.spread(entry):.2f}", verdict
        )
    console.print(every)
    for name, why in race.failures.items():
        console.print(f"[red]{name} could not take part[/red]: {why}", markup=True)
    console.print()


def _starts(entry: Entry) -> tuple[object, ...]:
    return entry.command, entry.processes, entry.environment


def race_figures(race: Race) -> tuple[dict[str, float], dict[str, Any]]:
    """Return ratios by `<workload>.<contender>`, over our loop and over our Trainer, and the facts to read them by."""
    ratios: dict[str, float] = {}
    for name in race.contenders:
        if name not in OURS:
            ratios[f"{race.workload.name}.{name}"] = race.ratios(name, "loop")[1]
            ratios[f"{race.workload.name}.{name}_over_trainer"] = race.ratios(name, "trainer")[1]
    facts = {
        "timed_rounds": len(next(iter(race.seconds.values()), [])),
        "best_settings": {name: race.best(name).label for name in race.contenders},
        "milliseconds": {f"{e.contender}, {e.label}": race.milliseconds(e) for e in race.seconds},
        "upper_over_lower_quartile": {f"{e.contender}, {e.label}": race.spread(e) for e in race.seconds},
        "unusable": [f"{e.contender}, {e.label}" for e in race.seconds if not race.usable(e)],
        "processor_milliseconds_of_first_process": {
            f"{e.contender}, {e.label}": median(s) * 1e3 for e, s in race.processor_seconds.items()
        },
        "milliseconds_of_heats": {f"{e.contender}, {e.label}": s * 1e3 for e, s in race.heats.items()},
        "quartiles_of_time_over_loop": {name: race.ratios(name, "loop") for name in race.contenders},
        "quartiles_of_time_over_trainer": {name: race.ratios(name, "trainer") for name in race.contenders},
        "start_to_first_round_seconds": {f"{e.contender}, {e.label}": s for e, s in race.starts.items()},
        "memory_mb_of_first_process": {f"{e.contender}, {e.label}": s for e, s in race.memory.items()},
        "same_model": {name: race.difference(name) for name in race.contenders},
        "could_not_take_part": race.failures,
    }
    return ratios, facts


def _ratio(quartiles: tuple[float, float, float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def print_breakdown(console: Console, name: str, breakdown: Breakdown) -> None:
    """Print the time of a round by section."""
    console.print(f"[bold]{name}[/bold]: where a round by the Trainer goes")
    table = Table("part of a round", "ms", "share", "calls")
    total = sum(breakdown.milliseconds.values())
    for part, value in breakdown.milliseconds.items():
        label = f"[bold]{part}[/bold]" if part in MATHS else part
        calls = breakdown.calls[part]
        table.add_row(label, f"{value:.2f}", f"{value / total:.1%}", f"{calls:.0f}" if calls else "")
    table.add_row("all", f"{total:.2f}", "")
    console.print(table)
    console.print(f"overhead, all but {' and '.join(MATHS)}: {breakdown.overhead:.1%}\n")


def figures(
    outcomes: list[Outcome], breakdowns: dict[str, Breakdown], races: list[Race], start: dict[str, float]
) -> dict[str, Any]:
    """Return the content of `bench.json`: ratios by `<workload>.<contender>`, and the facts to read them by."""
    ratios: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for outcome in outcomes:
        name = outcome.workload.name
        if outcome.workload.flow:
            ratios[f"{name}.fedavg"] = outcome.ratios("loop", "fedavg")[1]
            if "hand" in outcome.seconds:
                ratios[f"{name}.hand"] = outcome.ratios("hand", "fedavg")[1]
        else:
            for contender in outcome.seconds:
                if contender not in ("loop", "trainer"):
                    ratios[f"{name}.{contender}"] = outcome.ratios(contender)[1]
            ratios[f"{name}.trainer"] = outcome.ratios("sequential", "trainer")[1]
        facts[name] = {
            "what": str(outcome.workload),
            "chunk_size": outcome.chunk_size,
            "chunk_size_milliseconds": {str(size): value for size, value in outcome.candidates.items()},
            "timed_rounds": len(outcome.seconds["loop"]),
            "milliseconds": {contender: outcome.milliseconds(contender) for contender in outcome.seconds},
            "quartiles_of_time_over_ours": {
                contender: outcome.ratios(contender) for contender in outcome.seconds if contender != "loop"
            },
            "same_model": {contender: outcome.difference(contender) for contender in outcome.models},
            "share_of_a_core": outcome.busy,
        }
    for name, breakdown in breakdowns.items():
        ratios[f"{name}.overhead"] = breakdown.overhead
        facts[name]["breakdown_milliseconds"] = breakdown.milliseconds
    for race in races:
        more, facts[race.workload.name]["in_own_processes"] = race_figures(race)
        ratios |= more
    ratios |= {f"digits.{name}": value for name, value in start.items()}
    meaning = {
        "<workload>.<contender>": "their round time over our loop's, median of the rounds: above 1, we are faster; "
        "sequential, optimizer, vmap and hand in one process, the others in their own, each with its best settings",
        "<workload>.<contender>_over_trainer": "the same over ours through lightning.Trainer",
        "<workload>.trainer": "sequential's round time over that of ours through lightning.Trainer",
        "flow_<workload>.fedavg": "a COST: our Flow round's time over our FedAvg round's on the same examples",
        "flow_mlp.hand": "the same for a Flow round batched by hand, the limit",
        "digits.start_seconds": "of flow-pl fit, from the start of the process to its end after the first round",
        "digits.start_processor_seconds": "processor time in these",
        "<workload>.overhead": "share of the Trainer's round outside the gradients' and the optimizer's arithmetic",
    }
    return {**ratios, "meaning": meaning, **surroundings(), "workloads": facts}


def surroundings() -> dict[str, Any]:
    """Return versions and machine."""
    versions = {
        "flow_pl": flow_pl.__version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }
    machine = {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "load_of_the_last_minutes": os.getloadavg(),
    }
    return {"versions": versions, "machine": machine}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically; results of the scale and of the contests are kept if the content lacks them."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content = {**before, **content} if "scale" in content else {**content, **_part(before, "scale")}
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _part(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {key: content[key]} if key in content else {}
