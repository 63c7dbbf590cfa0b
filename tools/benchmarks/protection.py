"""Measure what privacy, robust aggregation and compression cost in accuracy, on real clients.

    python -m tools.benchmarks.protection privacy --data unipen_writers.npz
    python -m tools.benchmarks.protection robustness --data unipen_writers.npz
    python -m tools.benchmarks.protection bytes --data unipen_writers.npz
    python -m tools.benchmarks.protection cost

Each line is one run of the command line, printed when it ends: the settings, and the results of the test. `cost` is the
processor time of one thread for the server's part of a round of 100 clients of the EMNIST network, and for a round of
10 clients with 100 images each, private or not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch

from flow_pl.cli import run
from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.engine import aggregation
from flow_pl.engine.loop import ClientUpdate, FederatedLoop
from flow_pl.engine.privacy import GaussianMechanism, Sampling
from flow_pl.engine.server_round import ServerRound, server_groups
from flow_pl.engine.training_statistics import TrainingStatistics
from flow_pl.methods import FedAvg
from flow_pl.models import EMNISTCNN
from flow_pl.tasks import Classification

METHODS = ("fedavg", "fine_tuning", "flow")
UNIFORM = ["--model.loop.init_args.weighting=uniform"]
DEPLOYMENT = (1_000, 10_000)
"""Clients of a round and in total, whose noise and epsilon a run with 50 clients simulates."""
AGGREGATIONS = {
    "Mean": [],
    "NormBound": ["NormBound", "norm=1.0"],
    "CoordinateMedian": ["CoordinateMedian"],
    "TrimmedMean": ["TrimmedMean", "share=0.35"],
    "GeometricMedian": ["GeometricMedian"],
    "Krum": ["Krum", "share=0.35"],
    "MultiKrum": ["MultiKrum", "share=0.35"],
}
ATTACKS = {
    "none": [],
    "LabelFlip": ["LabelFlip"],
    "SignFlip": ["SignFlip", "scale=3"],
    "GaussianAttack": ["GaussianAttack", "std=0.1"],
    "Backdoor": ["Backdoor", "scale=5"],
}
COMPRESSIONS = {
    "none": [],
    "StochasticRounding": ["StochasticRounding"],
    **{f"TopK {share}": ["TopK", f"share={share}", "error_feedback=false"] for share in (0.1, 0.01)},
}


def chosen(option: str, words: list[str]) -> list[str]:
    """Return the arguments that select a class and its settings."""
    if not words:
        return []
    name, *settings = words
    return [f"--model.{option}={name}", *(f"--model.{option}.init_args.{setting}" for setting in settings)]


def privacy() -> Iterator[tuple[str, list[str]]]:
    """Yield runs of every method at every epsilon, with clipping only, and neither; and FedAvg with fewer clients."""
    for method, epsilon in itertools.product(METHODS, ("inf", "inf, clipped", "8", "4", "2")):
        settings = [method, "--data.sampling=poisson", "--data.cohort_size=50", *UNIFORM]
        if epsilon == "inf, clipped":
            settings += chosen("aggregation", AGGREGATIONS["NormBound"])
        elif epsilon != "inf":
            settings += private(epsilon, *DEPLOYMENT)
        yield f"{method} | {epsilon}", settings
    for epsilon in ("8", "4", "2"):
        settings = ["fedavg", "--data.sampling=poisson", "--data.cohort_size=50", *UNIFORM]
        yield f"fedavg, 100 of 1000 | {epsilon}", settings + private(epsilon, 100, 1_000)


def private(epsilon: str, cohort: int, population: int) -> list[str]:
    """Return the arguments of private rounds that simulate a deployment."""
    words = [f"epsilon={epsilon}", "delta=1e-5", f"noise_cohort_size={cohort}", f"population={population}"]
    clipping = ["clipping=FixedClipping", "clipping.init_args.norm=1.0"]
    return chosen("privacy", ["GaussianMechanism", *words, *clipping])


def robustness() -> Iterator[tuple[str, list[str]]]:
    """Yield runs of every aggregation under every attack, for a method without and one with personal models."""
    for method, attack, share in itertools.product(("fedavg", "flow"), ATTACKS, (0.1, 0.3)):
        if attack == "none" and share > 0.1:
            continue
        attacking = [*ATTACKS[attack], f"share={share}"] if ATTACKS[attack] else []
        for name, words in AGGREGATIONS.items():
            settings = [*UNIFORM, *chosen("aggregation", words), *chosen("attack", attacking)]
            yield f"{method} | {attack} | {share} | {name}", [method, *settings]


def volume() -> Iterator[tuple[str, list[str]]]:
    """Yield runs of every compression."""
    for method, (name, words) in itertools.product(("fedavg", "flow"), COMPRESSIONS.items()):
        yield f"{method} | {name}", [method, *chosen("compression", words)]
    for name, share in (("none", []), ("TopK 0.01, error feedback", ["TopK", "share=0.01"])):
        yield f"ditto | {name}", ["ditto", *chosen("compression", share)]


def measure(arguments: list[str], data: str, rounds: int) -> dict[str, float]:
    """Run once, and return the results by name."""
    method, *settings = arguments
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cli = run([
            "fit", "--config=task/array", f"--config=method/{method}",
            f"--data.path={data}", f"--trainer.max_epochs={rounds}",
            "--trainer.check_val_every_n_epoch=1000", "--trainer.num_sanity_val_steps=0", "--trainer.logger=false",
            "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
            "--trainer.devices=1", f"--trainer.default_root_dir={folder}", *settings,
        ])  # fmt: skip
        figures = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        return figures | {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def cost() -> None:
    """Print the cost of a round in seconds of processor time."""
    method = FedAvg()
    method.bind(EMNISTCNN(num_classes=62, in_shape=(1, 28, 28)), Classification())
    size = {"global": dict(method.modules["global"].named_parameters())}
    print(f"parameters: {sum(p.numel() for p in size['global'].values())}")
    parts = [chunk(method, 10, client) for client in range(0, 100, 10)]
    classes = {name: getattr(aggregation, name) for name in AGGREGATIONS}
    for name, make in {**classes, "private mean": None}.items():
        privacy = None if make else planned()
        times = []
        for _ in range(3):
            start = time.process_time()
            round_ = ServerRound(method, aggregation=make() if make else None, privacy=privacy)
            for update in parts:
                round_.add(replace(update, difference={"global": dict(update.difference["global"])}))
            round_.finish(lambda tensor: tensor, 0)
            times.append(time.process_time() - start)
        print(f"{name} | {min(times):.2f} s")
    server, loop = server_groups(method), FederatedLoop(20)
    batch = images(10, 100)
    for name in ("plain", "private", "plain", "private"):
        privacy = planned() if name == "private" else None
        start = time.process_time()
        round_ = ServerRound(method, privacy=privacy)
        round_.add(loop.train_clients(method, server, batch))
        round_.finish(lambda tensor: tensor, 0)
        print(f"a round, {name} | {time.process_time() - start:.2f} s")


def planned() -> GaussianMechanism:
    """Create the mechanism of a fit of 1,000 rounds."""
    privacy = GaussianMechanism(1e-5, noise_multiplier=1.0)
    privacy.plan(Sampling("poisson", 3400, 100), 1000, 0)
    return privacy


def chunk(method: FedAvg, clients: int, first: int) -> ClientUpdate:
    """Create random updates."""
    difference = {"global": {k: torch.randn(clients, *p.shape) for k, p in server_groups(method)["global"].items()}}
    statistics = TrainingStatistics(torch.device("cpu"))
    return ClientUpdate(
        torch.arange(first, first + clients), difference, {"global": torch.ones(clients)}, statistics, {}
    )


def images(clients: int, rows: int) -> ClientBatch:
    """Create a chunk of random images."""
    mask = torch.ones(clients, rows, dtype=torch.bool)
    y = torch.randint(62, (clients, rows))
    train = Examples(torch.rand(clients, rows, 1, 28, 28), y, mask, (rows,) * clients)
    order = torch.stack([torch.randperm(rows) for _ in range(clients)])[:, None]
    return ClientBatch(torch.arange(clients), train, torch.ones(clients, rows, dtype=torch.uint8), order, None, 0)


SHOWN = {
    "privacy/epsilon": "epsilon {:.2f}",
    "train/bytes_up": "bytes up {:.0f}",
    "train/attackers": "attackers {:.0f}",
    "train/attackers_left_out": "left out {:.0f}",
    "train/attackers_weight": "weight {:.2f}",
    "test/seen/generalized_accuracy": "generalized {:.3f}",
    "test/seen/personalized_accuracy": "personalized {:.3f}",
    "test/seen/backdoor_generalized": "backdoor generalized {:.3f}",
    "test/seen/backdoor_personalized": "personalized {:.3f}",
}


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"privacy": privacy, "robustness": robustness, "bytes": volume}
    parser.add_argument("table", choices=[*tables, "cost"])
    parser.add_argument("--data", help="file for task/array")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", default="", help="only the runs whose names contain this")
    options = parser.parse_args()
    if options.table == "cost":
        cost()
        return
    if options.data is None:
        parser.error("--data is missing: a .npz file with arrays x, y and client, as task/array expects")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, arguments in tables[options.table]():
        if options.only in name:
            figures = measure(arguments, options.data, options.rounds)
            shown = [text.format(figures[metric]) for metric, text in SHOWN.items() if metric in figures]
            print(f"{name} | {' | '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
