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
from flow_pl.configuration import flatten
from flow_pl.errors import ConfigurationError
from flow_pl.resume import NO_EFFECT

Settings = dict[str, Any]
"""The whole of a configuration, as `flow-pl fit --print_config` shows it."""

BUDGET = ("trainer.max", "data.cohort_size", "model.loop", "model.server")
"""How the options begin that say how much, and how fast, a method trains."""

SENT = (".local_epochs", ".weighting")
"""How the options of the loop end that mean nothing to a method that communicates nothing."""

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
    if settings["model"]["loop"] is None:  # its defaults, to be compared with what others say
        return resolve(configs, [*options, "--model.loop=FederatedLoop"])
    return {key: settings[key] for key in ("trainer", "data", "model")}


def differences(settings: Mapping[str, Settings]) -> dict[str, dict[str, Any]]:
    """Find what differs between runs that are to be compared, although it must not.

    Data (but for what has no effect on numbers), rounds, cohort, backbone, task, evaluation and the budget (the loop,
    with its epochs, batch size, client optimizer and weighting, and all of the server) must be equal. The rounds and
    the server of a method that communicates nothing do not matter.

    Args:
        settings: of each method.

    Returns:
        The values by method, by the name of each option that differs.
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
    """Tell what differs between runs that are to be compared, although it must not; see `differences`.

    Args:
        settings: of each method.

    Returns:
        One line for each setting that differs, with the values; empty where all are equal.
    """
    lines = []
    for key, found in differences(settings).items():
        values: dict[str, list[str]] = {}
        for method, value in found.items():
            values.setdefault(_text(value), []).append(method)
        lines.append(f"  {key}: " + "; ".join(f"{v} in {', '.join(names)}" for v, names in values.items()))
    return "\n".join(lines)


def budgets(settings: Mapping[str, Settings]) -> dict[str, str]:
    """What each method trains with that not all of them do: a column of the table.

    Args:
        settings: of each method.

    Returns:
        Its own epochs, steps and learning rates, and where other budgets are allowed those; empty texts where there are
        none.
    """
    different = {key: each for key, each in differences(settings).items() if key.startswith(BUDGET)}
    found = {}
    for method, each in settings.items():
        own = flatten(each["model"]["method"].get("init_args", {}))
        told = {key: value for key, value in own.items() if _is_budget(key, value)}
        for key, values in different.items():
            if method in values:
                told[key.partition(".")[2].removeprefix("loop.")] = values[method]
        found[method] = ", ".join(f"{key} {value}" for key, value in told.items())
    return found


def _is_budget(key: str, value: Any) -> bool:
    """Whether an argument of a method says how much or how fast it trains, beyond what the loop says for all."""
    if key.endswith("lr_scale"):
        return bool(value != 1)
    if key.endswith("rounds"):
        return bool(value)
    return key.endswith(("epochs", "steps", "lr")) and value is not None


def with_split(settings: Settings, seed: int) -> Settings:
    """The settings of a method with another split of the federation.

    The seed decides who is new and what is held out, of generated data also the clients, and how a partitioner that
    draws divides the rows.

    Args:
        settings: of the method.
        seed: of the split.

    Raises:
        ConfigurationError: the data have no such seed.
    """
    settings = copy.deepcopy(settings)
    data = settings["data"]["init_args"]
    if "split_seed" not in data:
        raise ConfigurationError(
            f"--split-seeds: {settings['data']['class_path']} has no argument split_seed, so it has one split alone. "
            "Leave the option out, or let the class take split_seed and hand it to FederatedDataModule."
        )
    data["split_seed"] = seed
    partitioner = data.get("partitioner")
    if isinstance(partitioner, dict) and "seed" in partitioner.get("init_args", {}):
        partitioner["init_args"]["seed"] = seed
    return settings


def run_settings(settings: Settings, name: str, seed: int, folder: Path, group: str) -> Settings:
    """The settings of one run: those of its method, a seed, a folder, and what the comparison has to know of it.

    Args:
        settings: of the method.
        name: of the run.
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
        named = {"name": name, "group": group}
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
    communicates = _communicates(model["method"]["class_path"])
    found = {"data": data["class_path"]}
    found |= {f"data.{key}": value for key, value in data["init_args"].items() if key not in NO_EFFECT}
    loop = _options("model.loop", model["loop"])
    if loop.get("model.loop.personal_epochs", 0) is None:
        loop["model.loop.personal_epochs"] = loop["model.loop.local_epochs"]
    server = model.keys() - {"backbone", "objective", "method", "loop"} if communicates else set()
    found |= {key: value for key, value in loop.items() if communicates or not key.endswith(SENT)}
    found |= {f"model.{key}": model[key] for key in ("backbone", "objective")}
    for key in sorted(server):
        found |= _options(f"model.{key}", model[key])
    names = (*ROUNDS, *AMOUNTS) if communicates else AMOUNTS
    return found | {f"trainer.{name}": trainer[name] for name in names}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _options(name: str, setting: Any) -> dict[str, Any]:
    """A setting by the names of its options: an object's class by the name of the object."""
    if not isinstance(setting, dict) or "class_path" not in setting:
        return {name: setting}
    arguments = flatten(setting.get("init_args", {}), name)
    plain = {key.replace(".init_args", "").removesuffix(".class_path"): value for key, value in arguments.items()}
    return {name: setting["class_path"]} | {
        key: value for key, value in plain.items() if key.rpartition(".")[2] not in NO_EFFECT
    }


def _communicates(class_path: str) -> bool:
    """Whether clients send anything."""
    module, _, name = class_path.rpartition(".")
    return bool(getattr(importlib.import_module(module), name).shared)
