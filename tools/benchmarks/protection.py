"""What privacy, robust aggregation and compression cost in accuracy, on real clients.

    python -m tools.benchmarks.protection privacy --data unipen_writers.npz
    python -m tools.benchmarks.protection robustness --data unipen_writers.npz
    python -m tools.benchmarks.protection bytes --data unipen_writers.npz

Each line is one run of the command line, printed when it is done: the settings, and what the test found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import tempfile
import warnings
from collections.abc import Iterator

from flow_pl.cli import run

METHODS = ("fedavg", "fine_tuning", "flow")
UNIFORM = ["--model.loop.init_args.weighting=uniform"]
SIMULATED = {"delta": "1e-5", "noise_cohort_size": "1000", "population": "10000"}
"""The deployment whose noise and epsilon a run has: 1,000 of 10,000 clients in a round, simulated with 50."""
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
    """The arguments that set a class and its settings."""
    if not words:
        return []
    name, *settings = words
    return [f"--model.{option}={name}", *(f"--model.{option}.init_args.{setting}" for setting in settings)]


def privacy() -> Iterator[tuple[str, list[str]]]:
    """Every method at every epsilon; clipped without noise, and neither."""
    clipping = ["clipping=FixedClipping", "clipping.init_args.norm=1.0"]
    simulated = [f"{name}={value}" for name, value in SIMULATED.items()]
    for method, epsilon in itertools.product(METHODS, ("inf", "inf, clipped", "8", "4", "2")):
        settings = [method, "--data.sampling=poisson", "--data.cohort_size=50", *UNIFORM]
        if epsilon == "inf, clipped":
            settings += chosen("aggregation", AGGREGATIONS["NormBound"])
        elif epsilon != "inf":
            settings += chosen("privacy", ["GaussianMechanism", f"epsilon={epsilon}", *simulated, *clipping])
        yield f"{method} | {epsilon}", settings


def robustness() -> Iterator[tuple[str, list[str]]]:
    """Every aggregation under every attack, for a method without and one with personal models."""
    for method, attack, share in itertools.product(("fedavg", "flow"), ATTACKS, (0.1, 0.3)):
        if attack == "none" and share > 0.1:
            continue
        attacking = [*ATTACKS[attack], f"share={share}"] if ATTACKS[attack] else []
        for name, aggregation in AGGREGATIONS.items():
            settings = [*UNIFORM, *chosen("aggregation", aggregation), *chosen("attack", attacking)]
            yield f"{method} | {attack} | {share} | {name}", [method, *settings]


def volume() -> Iterator[tuple[str, list[str]]]:
    """Every compression."""
    for method, (name, words) in itertools.product(("fedavg", "flow"), COMPRESSIONS.items()):
        yield f"{method} | {name}", [method, *chosen("compression", words)]
    for name, share in (("none", []), ("TopK 0.01, error feedback", ["TopK", "share=0.01"])):
        yield f"ditto | {name}", ["ditto", *chosen("compression", share)]


def measure(arguments: list[str], data: str, rounds: int) -> dict[str, float]:
    """One run: its figures by name."""
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
    parser.add_argument("table", choices=tables)
    parser.add_argument("--data", required=True, help="file for task/array")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", default="", help="only the runs whose names contain this")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, arguments in tables[options.table]():
        if options.only in name:
            figures = measure(arguments, options.data, options.rounds)
            shown = [text.format(figures[metric]) for metric, text in SHOWN.items() if metric in figures]
            print(f"{name} | {' | '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
