"""Resolve the settings of the compared runs, and check that they are comparable."""

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
from lightning.pytorch.callbacks import EarlyStopping, Timer, WeightAveraging

from flow_pl.checks import check_class_paths
from flow_pl.cli import run
from flow_pl.configuration import flatten
from flow_pl.errors import ConfigurationError
from flow_pl.resume import NO_EFFECT

Settings = dict[str, Any]
"""A complete configuration, as `flow-pl fit --print_config` shows it."""

BUDGET = ("trainer.max", "trainer.callbacks", "data.cohort_size", "model.loop", "model.server")
"""Prefixes of the options that set how much and how fast a method trains."""

SENT = (".local_epochs", ".weighting")
"""Suffixes of the loop's options that have no effect on a method that communicates nothing."""

ROUNDS = ("max_epochs", "max_steps", "max_time", "check_val_every_n_epoch", "val_check_interval")
"""Trainer settings that set the number of rounds and which of them are evaluated."""

AMOUNTS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches", "precision")
"""Trainer settings that change how much is trained and evaluated, and in which precision."""


CURVES = "flow_pl.callbacks.LearningCurves"
"""Callbacks import flow_pl, never the reverse: the command line finds them by name."""


def resolve(configs: Sequence[Path], options: Sequence[str]) -> Settings:
    """Resolve configurations and options to complete settings, with every default.

    Args:
        configs: the files; later ones override earlier ones.
        options: command-line options of `flow-pl fit`.

    Raises:
        ConfigurationError: the settings are invalid, or a class path names another function.
    """
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            given = [f"--config={path}" for path in configs]
            run(["fit", *given, *options, "--print_config"])
    except SystemExit as stop:
        if stop.code:
            message = errors.getvalue().strip().partition("error: ")[2] or errors.getvalue().strip()
            raise ConfigurationError(f"{configs[-1]} with the options given: {message}") from None
    settings: Settings = yaml.safe_load(printed.getvalue())
    check_class_paths(settings)  # a fit does, but --print_config ends before it
    if settings["model"]["loop"] is None:  # make its defaults explicit, to compare them with other settings
        return resolve(configs, [*options, "--model.loop=FederatedLoop"])
    return {key: settings[key] for key in ("trainer", "data", "model")}


def differences(settings: Mapping[str, Settings]) -> dict[str, dict[str, Any]]:
    """Find the settings that must be equal in all compared runs, but differ.

    Data (except settings without effect on results), rounds, cohort, backbone, task, evaluation and the budget (the
    loop with its epochs, batch size, client optimizer and weighting, everything on the server, and the callbacks that
    end a fit or average its models) must be equal. The rounds and the server do not matter for a method that
    communicates nothing.

    Args:
        settings: settings of each method.

    Returns:
        For each option that differs, by name, the value of each method.
    """
    found = {method: _decisive(each) for method, each in settings.items()}
    values = {
        key: {method: each[key] for method, each in found.items() if key in each}
        for key in dict.fromkeys(key for each in found.values() for key in each)
    }
    return {
        key: each
        for key, each in values.items()
        if len({json.dumps(value, sort_keys=True) for value in each.values()}) > 1
    }


def check_comparable(settings: Mapping[str, Settings]) -> str:
    """List the settings that must be equal in all compared runs, but differ; see `differences`.

    Args:
        settings: settings of each method.

    Returns:
        One line for each setting that differs, with its values; empty if all are equal.
    """
    lines = []
    for key, found in differences(settings).items():
        values: dict[str, list[str]] = {}
        for method, value in found.items():
            values.setdefault(_text(value), []).append(method)
        lines.append(f"  {key}: " + "; ".join(f"{v} in {', '.join(names)}" for v, names in values.items()))
    return "\n".join(lines)


def budgets(settings: Mapping[str, Settings]) -> dict[str, str]:
    """Return the part of each method's budget that is not common to all methods: a column of the table.

    Args:
        settings: settings of each method.

    Returns:
        Each method's own epochs, steps and learning rates, and the differing budgets if those are allowed; an empty
        string if there are none.
    """
    different = {key: each for key, each in differences(settings).items() if key.startswith(BUDGET)}
    found = {}
    for method, each in settings.items():
        own = flatten(each["model"]["method"].get("init_args", {}))
        named = named_class(each["model"]["method"]["class_path"]).budget
        budget = {key: value for key, value in own.items() if key in named or _is_budget(key, value)}
        for key, values in different.items():
            if method in values:
                value = values[method]
                if key == "trainer.callbacks":  # a cell of a table has no room for their arguments
                    value = " and ".join(each["class_path"].rpartition(".")[2] for each in value) or "none"
                budget[key.partition(".")[2].removeprefix("loop.")] = value
        found[method] = ", ".join(f"{key} {value}" for key, value in budget.items())
    return found


def _is_budget(key: str, value: Any) -> bool:
    """Return whether an argument of a method sets how much or how fast it trains, beyond the loop's settings."""
    if key.endswith("lr_scale"):
        return bool(value != 1)
    if key.endswith("rounds"):
        return bool(value)
    return key.endswith(("epochs", "steps", "lr")) and value is not None


def with_split(settings: Settings, seed: int) -> Settings:
    """Return the settings of a method with another split of the federation.

    The seed determines the new clients and the held-out examples, for generated data also the clients, and the
    assignment of rows by a random partitioner.

    Args:
        settings: settings of the method.
        seed: seed of the split.

    Raises:
        ConfigurationError: the data module has no split seed.
    """
    settings = copy.deepcopy(settings)
    data = settings["data"]["init_args"]
    if "split_seed" not in data:
        raise ConfigurationError(
            f"--split-seeds: {settings['data']['class_path']} has no argument split_seed, so it has a single split. "
            "Leave the option out, or let the class accept split_seed and pass it to FederatedDataModule."
        )
    data["split_seed"] = seed
    partitioner = data.get("partitioner")
    if isinstance(partitioner, dict) and "seed" in partitioner.get("init_args", {}):
        partitioner["init_args"]["seed"] = seed
    return settings


def run_settings(settings: Settings, name: str, seed: int, folder: Path, group: str) -> Settings:
    """Return the settings of one run: those of its method, a seed, a folder, and callbacks that record its results.

    Args:
        settings: settings of the method.
        name: name of the run.
        seed: seed of the run.
        folder: folder of the run.
        group: name of the comparison.
    """
    settings = {"seed_everything": seed, **copy.deepcopy(settings)}
    trainer = settings["trainer"]
    trainer["default_root_dir"] = str(folder)
    listed = _callbacks(trainer)
    # a trainer takes one callback of this class; the figure of a listed one is kept
    given = [each for each in listed if named_class(each["class_path"]) is named_class(CURVES)]
    figure = given[-1].get("init_args", {}).get("figure") if given else None
    trainer["callbacks"] = [
        *(each for each in listed if each not in given),
        {"class_path": CURVES, "init_args": {"path": "curve.csv", "figure": figure}},
        {"class_path": "flow_pl.callbacks.ClientResults", "init_args": {"path": "clients.csv"}},
        {"class_path": "flow_pl.callbacks.ResultsTable", "init_args": {"path": "test.json"}},
    ]
    for logger in wandb_loggers(settings):
        named = {"name": name, "group": group}
        logger |= {key: value for key, value in named.items() if logger.get(key) is None}
    return settings


def wandb_loggers(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield the arguments of each W&B logger of a run."""
    loggers = settings["trainer"]["logger"]
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, dict) and logger["class_path"].endswith("WandbLogger"):
            yield logger["init_args"]


def _decisive(settings: Settings) -> dict[str, Any]:
    """Return the settings that must be equal in all runs, by option name."""
    trainer, data, model = (settings[section] for section in ("trainer", "data", "model"))
    in_rounds = communicates(model["method"]["class_path"])
    found = {"data": data["class_path"]}
    found |= {f"data.{key}": value for key, value in data["init_args"].items() if key not in NO_EFFECT}
    loop = _options("model.loop", model["loop"])
    if loop.get("model.loop.personal_epochs", 0) is None:
        loop["model.loop.personal_epochs"] = loop["model.loop.local_epochs"]
    server = model.keys() - {"backbone", "objective", "method", "loop"} if in_rounds else set()
    found |= {key: value for key, value in loop.items() if in_rounds or not key.endswith(SENT)}
    found |= {f"model.{key}": model[key] for key in ("backbone", "objective")}
    for key in sorted(server):
        found |= _options(f"model.{key}", model[key])
    if in_rounds:
        found["trainer.callbacks"] = [each for each in _callbacks(trainer) if _is_decisive(each["class_path"])]
    names = (*ROUNDS, *AMOUNTS) if in_rounds else AMOUNTS
    return found | {f"trainer.{name}": trainer[name] for name in names}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _options(name: str, setting: Any) -> dict[str, Any]:
    """Flatten a setting to its option names; an object's class goes by the name of the object."""
    if not isinstance(setting, dict) or "class_path" not in setting:
        return {name: setting}
    arguments = flatten(setting.get("init_args", {}), name)
    plain = {key.replace(".init_args", "").removesuffix(".class_path"): value for key, value in arguments.items()}
    return {name: setting["class_path"]} | {
        key: value for key, value in plain.items() if key.rpartition(".")[2] not in NO_EFFECT
    }


def communicates(class_path: str) -> bool:
    """Return whether clients of this method send anything to the server."""
    return bool(named_class(class_path).shared)


def _callbacks(trainer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the callbacks that a trainer's settings list, as class paths with arguments."""
    listed = trainer["callbacks"] or []
    return listed if isinstance(listed, list) else [listed]


def _is_decisive(class_path: str) -> bool:
    """Return whether this callback sets the number of rounds, or evaluates an average of the server's models."""
    return issubclass(named_class(class_path), (EarlyStopping, Timer, WeightAveraging))


def named_class(class_path: str) -> Any:
    """Return the class with an import path.

    Args:
        class_path: its path, as resolved settings have it.
    """
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)
