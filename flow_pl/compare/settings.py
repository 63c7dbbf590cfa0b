"""The settings of the compared runs: as a run resolves them, and whether they can be compared."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flow_pl.cli import run
from flow_pl.engine.loop import FederatedLoop
from flow_pl.errors import ConfigurationError

Settings = dict[str, Any]
"""The whole of a configuration, as `flow-pl fit --print_config` shows it."""

WITHOUT_EFFECT = frozenset({"cache_dir", "chunk_size", "num_workers"})
"""Settings of the data that change how fast a run is, but none of its numbers."""

ROUNDS = ("max_epochs", "max_steps", "max_time", "check_val_every_n_epoch", "val_check_interval")
"""Settings of the trainer that say how many rounds there are and which of them are evaluated."""

AMOUNTS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches", "precision")
"""Settings of the trainer that change how much is trained and evaluated, and how exactly."""


def resolve(configs: Sequence[Path], options: Sequence[str]) -> Settings:
    """What configurations and options come to, with every default.

    Args:
        configs: the files, later ones win.
        options: of the command line of `flow-pl fit`.

    Raises:
        ConfigurationError: they are not valid.
    """
    printed, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            given = [f"--config={path}" for path in configs]
            run(["fit", *given, *options, "--print_config"])
    except SystemExit as stop:
        if stop.code:
            message = complaint.getvalue().strip().partition("error: ")[2] or complaint.getvalue().strip()
            raise ConfigurationError(f"{configs[-1]} with the options given: {message}") from None
    settings: Settings = yaml.safe_load(printed.getvalue())
    return {key: settings[key] for key in ("trainer", "data", "model")}


def check_comparable(settings: Mapping[str, Settings]) -> str:
    """Find what differs between runs that are to be compared, although it must not.

    Data (but for what has no effect on numbers), rounds, cohort, batch size, backbone, task and evaluation must be
    equal. The rounds of a method that communicates nothing do not matter.

    Args:
        settings: of each method.

    Returns:
        One line for each setting that differs, with the values; empty where all are equal.
    """
    found = {method: _decisive(each) for method, each in settings.items()}
    lines = []
    for key in dict.fromkeys(key for each in found.values() for key in each):
        values: dict[str, list[str]] = {}
        for method, each in found.items():
            if key in each:
                values.setdefault(json.dumps(each[key], sort_keys=True), []).append(method)
        if len(values) > 1:
            lines.append(f"  {key}: " + "; ".join(f"{v} in {', '.join(names)}" for v, names in values.items()))
    return "\n".join(lines)


def run_settings(settings: Settings, method: str, seed: int, folder: Path, group: str) -> Settings:
    """The settings of one run: those of its method, a seed, a folder, and what the comparison has to know of it.

    Args:
        settings: of the method.
        method: its name.
        seed: of the run.
        folder: of the run.
        group: name of the comparison.
    """
    settings = {"seed_everything": seed, **copy.deepcopy(settings)}
    trainer = settings["trainer"]
    trainer["default_root_dir"] = str(folder)
    listed = trainer["callbacks"] or []
    trainer["callbacks"] = [
        *(listed if isinstance(listed, list) else [listed]),
        # callbacks use flow_pl, never the reverse: the command line finds them by name
        {"class_path": "flow_pl.callbacks.LearningCurves", "init_args": {"path": "curve.csv", "figure": None}},
        {"class_path": "flow_pl.callbacks.ClientResults", "init_args": {"path": "clients.csv"}},
        {"class_path": "flow_pl.callbacks.ResultsTable", "init_args": {"path": "test.json"}},
    ]
    for logger in wandb_loggers(settings):
        named = {"name": f"{method}-seed{seed}", "group": group}
        logger |= {key: value for key, value in named.items() if logger.get(key) is None}
    return settings


def wandb_loggers(settings: Settings) -> Iterator[dict[str, Any]]:
    """The arguments of each W&B logger of a run."""
    loggers = settings["trainer"]["logger"]
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, dict) and logger["class_path"].endswith("WandbLogger"):
            yield logger["init_args"]


def _decisive(settings: Settings) -> dict[str, Any]:
    """What must be equal, by the name of its option."""
    trainer, data, model = (settings[section] for section in ("trainer", "data", "model"))
    loop = (model["loop"] or {}).get("init_args", {})
    found = {"data": data["class_path"]}
    found |= {f"data.{key}": value for key, value in data["init_args"].items() if key not in WITHOUT_EFFECT}
    found |= {f"model.{key}": model[key] for key in ("backbone", "objective")}
    found["model.loop.batch_size"] = loop.get("batch_size", FederatedLoop().batch_size)
    names = (*ROUNDS, *AMOUNTS) if _communicates(model["method"]["class_path"]) else AMOUNTS
    return found | {f"trainer.{name}": trainer[name] for name in names}


def _communicates(class_path: str) -> bool:
    """Whether clients send anything."""
    module, _, name = class_path.rpartition(".")
    return bool(getattr(importlib.import_module(module), name).shared)
