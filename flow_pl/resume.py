"""Records a run in its checkpoints, and decides which settings may differ when another command resumes it.

| setting | if it differs |
|---|---|
| rows, and their split into training, validation and test | a fit is refused, other commands too if they could leak |
| class of the server's optimizer or scheduler | a fit is refused: the state cannot be transferred |
| settings of the two, such as the learning rate | those of the new command are used, with a warning |
| other settings that affect results: of the method, the loop, the cohort, the seed | the same |

`flow_pl.checks.check_checkpoint` checks the class of the method, and the backbone with its sizes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from flow_pl.configuration import flatten
from flow_pl.data import FederatedDataModule
from flow_pl.data.store.features import called, read_as
from flow_pl.errors import ConfigurationError, brief
from flow_pl.utils.inputs import leaves, map_inputs, names_of

Record = dict[str, Any]
"""Plain values, since a checkpoint holds no objects."""

LOOKED_AT = 100
"""Number of clients, evenly spaced over the population, whose first row and split identify a data set."""

SPLIT = ("split_seed", "val_fraction", "test_fraction", "new_client_fraction", "min_examples")
"""Settings of the data module that determine the splits."""


DECISIVE_FOR_TRAINER = ("precision", "limit_train_batches", "limit_val_batches", "overfit_batches")
"""Settings of the trainer that affect the results of later rounds, except the number of rounds."""

NO_EFFECT = (
    "cache_dir",
    "chunk_size",
    "num_workers",
    "evaluation_batch_size",
    "trace_after",
    "channels_last",
    "compile_mode",
)
"""Settings of data and loop that change the speed of a run, but its results only by rounding."""


class ChangedSettingWarning(UserWarning):
    """A resumed run uses different settings than at its start."""


def data_record(data: FederatedDataModule) -> Record:
    """Return a record of a run's data: what identifies its settings, rows and splits, and their format.

    The format is that which `flow_pl.serving` reads a client's own arrays by: types of the stored features, and names
    of the classes. Reads the numbers of rows of all clients, and the first row of `LOOKED_AT` of them.

    Args:
        data: the data module, set up.
    """
    federation = data.federation
    store = federation.store
    rows, split = hashlib.sha256(), hashlib.sha256()
    for array in (store.offsets, store.labelled, store.val_rows, store.test_rows, store.roles):
        rows.update(np.asarray(array).tobytes())
    for part in (federation.train_sizes, federation.val_sizes, federation.test_sizes, federation.seen, federation.new):
        split.update(np.asarray(part).tobytes())
    for client in np.unique(np.linspace(0, len(store) - 1, LOOKED_AT).astype(int)).tolist():
        stored = store.read(client)
        rows.update(store.name(client).encode())
        for array in (*leaves(stored.x), stored.y):
            rows.update(np.asarray(array[:1]).tobytes())
        for part in federation.split(client):
            split.update(np.asarray(part).tobytes())
    settings = {"class": type(data).__name__, **{name: getattr(data, name) for name in SPLIT}}
    return {
        "settings": settings,
        "rows": rows.hexdigest(),
        "split": split.hexdigest(),
        "features": map_inputs(lambda x: str(x.dtype), store.read(0).x),
        "class_names": list(data.class_names),
    }


def check_class_names(saved: Record, now: Record) -> None:
    """Check that the classes have the numbers that the model was trained with.

    Args:
        saved: record of the checkpoint's run; without names in older checkpoints, or if its labels were numbers.
        now: record of this run.

    Raises:
        ConfigurationError: both have names, and they differ.
    """
    before, after = saved.get("class_names", []), now.get("class_names", [])
    if not (before and after) or before == after:
        return
    pairs = enumerate(zip_longest(before, after, fillvalue=None))
    number, (old, new) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    was, is_now = ("no class" if name is None else repr(name) for name in (old, new))
    raise ConfigurationError(
        f"the checkpoint's classes are {brief(before)}, the data's are {brief(after)}: class {number} was {was} and is "
        f"{is_now}. Give the data the checkpoint's classes, in their order, by data.classes (in published files, that "
        "of the encoding), or use the data it was trained with."
    )


def check_features(saved: Record, now: Record) -> None:
    """Check that features are read as those that the model was trained with: bytes are scaled, other numbers are not.

    Args:
        saved: record of the checkpoint's run; without types of features in older checkpoints.
        now: record of this run.

    Raises:
        ConfigurationError: features of the same name are read in another way.
    """
    before, after = saved.get("features"), now.get("features")
    if before is None or after is None or names_of(before) != names_of(after):
        return  # other names are found by the model
    for name, was, is_now in zip(names_of(before) or (None,), leaves(before), leaves(after), strict=True):
        old, new = read_as(np.dtype(was)), read_as(np.dtype(is_now))
        if old != new:
            raise ConfigurationError(
                f"the checkpoint was trained with {called(name)} of type {was} ({old}), in the data they are {is_now} "
                f"({new}): the model would get other values. Write the data with the type that it was trained with."
            )


def check_data(saved: Record, now: Record, fitting: bool) -> None:
    """Check that no row that the model was trained on is used for evaluation, or the reverse.

    Args:
        saved: record of the checkpoint's run.
        now: record of this run.
        fitting: whether training continues.

    Raises:
        ConfigurationError: rows or split differ from those of the checkpoint, so that test examples would be used for
            training, or training examples for testing.
    """
    same_rows = saved["rows"] == now["rows"]
    if same_rows and saved["split"] == now["split"]:
        return
    different = [f"data.{name} is {now['settings'][name]}, was {value}" for name, value in _different(saved, now)]
    what = f": {', '.join(different)}" if different else ""
    # generated clients are drawn with the same seed as the split
    if fitting or same_rows or any("split_seed" in line for line in different):
        lost = "be used for training" if fitting else "include some of its training examples"
        kind = "split of the data" if same_rows or different else "data"
        raise ConfigurationError(
            f"the checkpoint was trained on another {kind}{what}: test examples would {lost}. Use the data "
            "and the settings it was trained with" + (", or start a new run." if fitting else ".")
        )
    warnings.warn(
        f"the checkpoint was trained on other data{what}; it may have been trained on some of these examples.",
        ChangedSettingWarning,
        stacklevel=2,
    )


def begin_round_anew(checkpoint: Record) -> None:
    """Make a fit that resumes from an exception within a round restart that round at its first client.

    Lightning would continue after the last chunk, without the updates summed so far.

    Args:
        checkpoint: the checkpoint; changed in place if the server had not made its step in that round.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    if not loop:
        return
    epochs, chunks = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    done = epochs["current"]["processed"]
    if epochs["current"]["started"] == done or checkpoint["global_step"] > done:
        return
    for counts in epochs.values():
        counts |= dict.fromkeys(counts, counts["processed"])
    chunks["current"] |= dict.fromkeys(chunks["current"], 0)
    chunks["is_last_batch"] = False


def server_record(
    optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None, parameters: Iterable[Tensor]
) -> Record:
    """Return a record of the server's optimizer and scheduler: their classes and settings.

    Args:
        optimizer: makes the optimizer.
        scheduler: makes the scheduler; None for none.
        parameters: parameters of the server; only their number and dimensions matter.
    """
    made, schedule = _make(optimizer, scheduler, parameters)
    record: Record = {"optimizer": _name(made), "optimizer_settings": _plain(_settings(made))}
    if schedule is not None:
        record |= {"scheduler": _name(schedule), "scheduler_settings": _plain(schedule.state_dict())}
    return record


def check_server(saved: Record, now: Record) -> bool:
    """Check that a fit can resume with the state of the server's optimizer and scheduler.

    Args:
        saved: record of the checkpoint's run.
        now: record of this run.

    Returns:
        Whether the settings differ, so that `apply_server` must apply those of this run.

    Raises:
        ConfigurationError: the classes differ.
    """
    for role in ("optimizer", "scheduler"):
        if saved.get(role) != now.get(role):
            raise ConfigurationError(
                f"model.server_{role} is {now.get(role, 'null')}, but the checkpoint was trained with "
                f"{saved.get(role, 'null')}, whose state cannot be transferred: use that one, or start a new run."
            )
    lines = []
    for role in ("optimizer", "scheduler"):
        before, after = saved.get(f"{role}_settings", {}), now.get(f"{role}_settings", {})
        names = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
        changed = [key for key in names if not key.startswith("_") and key not in ("initial_lr", "base_lrs")]
        lines += [f"model.server_{role}.{key} is {after.get(key)}, was {before.get(key)}" for key in changed]
        if names and not changed and not lines:  # settings of a schedule within a schedule
            lines.append(f"model.server_{role} has different settings")
    if lines:
        warnings.warn(
            f"the run continues with settings other than the checkpoint's: {', '.join(lines)}. Those of this command "
            "are used from here on"
            + (", the schedule as if it had been from the first round." if "scheduler" in now else "."),
            ChangedSettingWarning,
            stacklevel=2,
        )
    return bool(lines)


def apply_server(
    make_optimizer: OptimizerCallable,
    make_scheduler: LRSchedulerCallable | None,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    rounds: int,
) -> None:
    """Apply this run's settings to an optimizer and a scheduler restored with those of another run.

    The optimizer's state (such as momentum) is kept.

    Args:
        make_optimizer: makes an optimizer of this run.
        make_scheduler: makes a scheduler of this run; None for none.
        optimizer: the restored optimizer.
        scheduler: the restored scheduler; None for none.
        rounds: number of completed rounds.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    made, schedule = _make(make_optimizer, make_scheduler, parameters)
    if schedule is not None and scheduler is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer itself is not stepped
            for _ in range(rounds):
                schedule.step()
        scheduler.load_state_dict(schedule.state_dict())
    for group in optimizer.param_groups:
        group.update(_settings(made))


def warn_of_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn about settings of a resumed fit that differ from its start, except those without effect on results.

    Args:
        saved: configuration of the checkpoint's run; empty if it has none.
        now: configuration of this run.
    """
    before, after = (
        {key: value for key, value in flatten(settings).items() if _decisive(key)} for settings in (saved, now)
    )
    names = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)] if saved else []
    if names:
        changed = [f"{key} is {after.get(key)}, was {before.get(key)}".replace(".init_args.", ".") for key in names]
        warnings.warn(
            f"the run continues with settings other than those it began with: {'; '.join(changed)}. Those of this "
            "command are used from here on.",
            ChangedSettingWarning,
            stacklevel=2,
        )


def _decisive(key: str) -> bool:
    """Return whether a setting affects results and is not checked elsewhere."""
    section, _, name = key.partition(".")
    if section == "trainer":
        return name in DECISIVE_FOR_TRAINER
    return not name.startswith(("server_optimizer", "server_scheduler")) and key.rpartition(".")[2] not in NO_EFFECT


def _make(
    optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None, parameters: Iterable[Tensor]
) -> tuple[Optimizer, LRScheduler | None]:
    """Create the optimizer and scheduler of this run, on tiny parameters."""
    made = optimizer([torch.zeros([min(2, n) for n in p.shape], requires_grad=True) for p in parameters])
    return made, None if scheduler is None else scheduler(made)


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}


def _name(made: object) -> str:
    return f"{type(made).__module__}.{type(made).__qualname__}"


def _different(saved: Record, now: Record) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in saved["settings"].items() if now["settings"].get(name) != value]


def _plain(value: Any) -> Any:
    """Convert a value to plain data, which can be compared and loaded without running code; objects by class."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
