"""Tune the most important settings of several methods with equal effort, on validation examples.

    python -m tools.tuning task/array --rounds 25 --out tuning.csv --data.path unipen_writers.npz

Each setting is tried with five values: the first one with the others as in `configs/method`, the next one with the best
value of the first. No method has more than two. The figure is the personalized accuracy on validation examples of the
training clients after the last round, over examples, or its mean over the splits given with `--split-seeds`. Further
options are passed to every run. Finished runs are kept in the file, so that the same command resumes. With `--configs`,
it writes each method's configuration with the best values, for `flow-pl compare --methods`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import yaml

from flow_pl.cli import run
from flow_pl.compare.settings import resolve, with_split
from flow_pl.shipped import find
from flow_pl.utils.files import write_text

STEP = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Factors on the learning rate of personal models."""
SHARE = (0.1, 0.25, 0.4, 0.55, 0.7)
"""Shares of the neighbours."""

SETTINGS: Mapping[str, Mapping[str, Sequence[float]]] = {
    "fine_tuning": {"personal_lr_scale": STEP},
    "lp_ft": {"personal_lr_scale": STEP},
    "interpolation": {"personal_lr_scale": STEP, "alpha": (0.3, 0.5, 0.7, 0.8, 0.9)},
    "knn_per": {"neighbour_weight": SHARE, "neighbours": (3, 5, 10, 20, 50)},
    "ditto": {"regularization": (0.03, 0.1, 0.3, 1.0, 3.0), "personal_lr_scale": STEP},
    "apfl": {"alpha": (0.1, 0.25, 0.5, 0.75, 0.9), "personal_lr_scale": STEP},
    "fedrod": {"personal_lr_scale": STEP},
    "interpolation_votes": {"neighbour_weight": SHARE, "personal_lr_scale": STEP},
    "flow": {"personal_lr_scale": STEP, "regularization": (0.0, 0.001, 0.01, 0.1, 1.0)},
    "flow_evidence": {"neighbour_weight": SHARE, "personal_lr_scale": STEP},
}
"""The settings of each method in the order of the search, with their values."""
METRIC = "val/personalized_accuracy"


class Runs:
    """Trains with settings, or looks up a run that is already in the file.

    Args:
        file: CSV file of finished runs; created if it does not exist.
        task: name of the task's configuration.
        options: further arguments of every run.
        splits: seeds of the federation's splits, over which the accuracy is averaged; None for the task's split.
    """

    def __init__(self, file: Path, task: str, options: Sequence[str], splits: Sequence[int] | None = None) -> None:
        self.file, self.task, self.options = file, task, list(options)
        self.splits = [None] if splits is None else list(splits)
        rows = list(csv.reader(file.open(newline=""))) if file.exists() else []
        self.done = {tuple(row[:-1]): float(row[-1]) for row in rows}

    def __call__(self, method: str, settings: Mapping[str, float]) -> float:
        """Return the accuracy in percent."""
        chosen = [f"--model.method.init_args.{name}={value}" for name, value in settings.items()]
        return fmean(self._accuracy(method, chosen, split) for split in self.splits)

    def _accuracy(self, method: str, chosen: Sequence[str], split: int | None) -> float:
        named = [] if split is None else [f"split {split}"]
        key = (self.task, *self.options, *named, method, *chosen)
        if key not in self.done:
            self.done[key] = 100 * self._train(method, chosen, split)
            with self.file.open("a", newline="") as file:
                csv.writer(file).writerow([*key, self.done[key]])
        return self.done[key]

    def _train(self, method: str, chosen: Sequence[str], split: int | None) -> float:
        settings = resolve([find(self.task), find(f"method/{method}")], [*self.options, *chosen])
        if split is not None:
            settings = with_split(settings, split)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            file = Path(folder, "run.yaml")
            file.write_text(yaml.safe_dump({"seed_everything": 0, **settings}))
            cli = run([
                "fit", f"--config={file}", "--trainer.num_sanity_val_steps=0", "--trainer.logger=false",
                "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false",
                "--trainer.accelerator=cpu", "--trainer.devices=1", f"--trainer.default_root_dir={folder}",
            ])  # fmt: skip
            return float(cli.trainer.callback_metrics[METRIC])


def search(runs: Runs, method: str) -> list[tuple[str, dict[float, float]]]:
    """Try the values of each setting in turn, and return the accuracies by value."""
    best: dict[str, float] = {}
    tried = []
    for setting, values in SETTINGS[method].items():
        found = {value: runs(method, {**best, setting: value}) for value in values}
        best[setting] = max(found, key=lambda value: found[value])
        tried.append((setting, found))
    return tried


def write_config(folder: Path, method: str, best: Mapping[str, float]) -> None:
    """Write a method's configuration with other settings, under the method's name."""
    config = yaml.safe_load(find(f"method/{method}").read_text(encoding="utf-8"))
    config["model"]["method"].setdefault("init_args", {}).update(best)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{method}.yaml", yaml.safe_dump(config, sort_keys=False))


def main(args: Sequence[str] | None = None) -> None:
    """Print a line of a Markdown table for each setting."""
    # no abbreviations: --config and others are options of the runs
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("task", help="name of a task's configuration, such as task/digits")
    parser.add_argument("--rounds", type=int, required=True, help="communication rounds of every run")
    parser.add_argument("--out", type=Path, default=Path("tuning.csv"), help="file of the finished runs")
    parser.add_argument("--split-seeds", nargs="+", type=int, help="average over these splits, as flow-pl compare does")
    parser.add_argument("--configs", type=Path, help="folder for the methods' configurations with the best values")
    parser.add_argument("--methods", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options, others = parser.parse_known_args(args)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    length = [f"--trainer.max_epochs={options.rounds}", f"--trainer.check_val_every_n_epoch={options.rounds}"]
    words = [f"{name}={value}" for name, value in zip(others[::2], others[1::2], strict=True)]
    runs = Runs(options.out, options.task, [*length, *words], options.split_seeds)
    print("| method | setting | tried: accuracy |\n|---|---|---|")
    for method in options.methods:
        best: dict[str, float] = {}
        for setting, found in search(runs, method):
            best[setting] = max(found, key=lambda value: found[value])
            shown = (f"**{v:g}: {a:.2f}**" if v == best[setting] else f"{v:g}: {a:.2f}" for v, a in found.items())
            print(f"| `{method}` | `{setting}` | {', '.join(shown)} |", flush=True)
        if options.configs is not None:
            write_config(options.configs, method, best)


if __name__ == "__main__":
    main()
