"""Refuse settings of Lightning's Trainer that do not work with rounds of clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, strategies
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.spike import SpikeDetection

from flow_pl.errors import ConfigurationError
from flow_pl.utils.words import nearest

LARGEST_SEED = 2**32 - 1
"""Largest seed of NumPy, which Lightning seeds too."""

LEAST = {
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
    "num_nodes": 1,
    "min_epochs": 0,
    "min_steps": 0,
}
"""Smallest allowed values of integer settings that Lightning does not check before training begins."""

SHARDED = ("fsdp", "deepspeed", "model_parallel")
SPAWNED = ("ddp_spawn", "ddp_spawn_find_unused_parameters_false", "ddp_spawn_find_unused_parameters_true")

ONE_DEVICE = ("single_device", "single_xla")
"""Strategies that Lightning lists but that need a device argument; "auto" chooses them."""

UNFIT = {
    StochasticWeightAveraging: "averages the results of a local optimizer and replaces the server's schedule by "
    "its own: use EMAWeightAveraging, which averages the server's model over rounds",
    ModelPruning: "sets weights of w_g to zero without the server's knowledge, and clients train them again",
    LearningRateFinder: "searches by automatic optimization, which rounds do not use: compare a few rates of "
    "model.loop.client_optimizer instead",
    BatchSizeFinder: "enlarges a batch, which here is a chunk of clients: set data.chunk_size to auto",
    GradientAccumulationScheduler: "accumulates gradients of automatic optimization, but a round is one step of "
    "the server: set model.loop.batch_size for the clients' steps",
    SpikeDetection: "needs the loss of every batch, which a chunk of clients does not have: clients that diverge "
    "are excluded from their round (model.max_rejected)",
    BaseFinetuning: "freezes parameters while automatic optimization trains the others: set requires_grad in the "
    "backbone, or use a method that trains a part of it (FedRep, LGFedAvg)",
}
"""Lightning callbacks that cannot work here, and what to do instead."""


def check_seed(seed: Any) -> None:
    """Check the seed of a run.

    Raises:
        ConfigurationError: the seed is out of range.
    """
    if not isinstance(seed, bool) and seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise ConfigurationError(f"seed_everything is {seed}, expected a whole number from 0 to {LARGEST_SEED}.")


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Check the settings of the trainer.

    Args:
        settings: the parsed settings by name.

    Raises:
        ConfigurationError: one of them cannot work here.
    """
    for name, least in LEAST.items():
        value = settings.get(name)
        if isinstance(value, int) and value < least:
            raise ConfigurationError(f"trainer.{name} is {value}, expected a whole number of {least} or more.")
    interval = settings.get("val_check_interval")
    if interval is not None and (interval != 1.0 or not isinstance(interval, float)):
        raise ConfigurationError(
            f"trainer.val_check_interval is {interval}, expected 1.0, the end of a round: the server's model does "
            "not change within a round. To validate every few rounds, set trainer.check_val_every_n_epoch; to "
            "disable validation, set trainer.limit_val_batches to 0."
        )
    overfit = settings.get("overfit_batches")
    if overfit:
        raise ConfigurationError(
            f"trainer.overfit_batches is {overfit}, expected 0: it would replace the sampling of each round's "
            "clients. To check whether the model can fit a few clients, use a federation of a few, with all of "
            "them in each round (data.cohort_size)."
        )
    _check_strategy(settings.get("strategy"))
    _check_devices(settings.get("devices", "auto"), settings.get("accelerator"))


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Check the callbacks that a user has listed.

    Args:
        callbacks: the callbacks.

    Raises:
        ConfigurationError: one of them cannot work here.
    """
    for callback in callbacks:
        reason = next((reason for kind, reason in UNFIT.items() if isinstance(callback, kind)), None)
        if reason is not None:
            raise ConfigurationError(f"trainer.callbacks has {type(callback).__name__}, which {reason}.")


def _check_strategy(strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else ""
    arguments: Any = {}
    if not isinstance(strategy, str) and strategy is not None:
        name = str(strategy.get("class_path", "")).rpartition(".")[2]
        arguments = strategy.get("init_args") or {}
    if name.lower().startswith(SHARDED) or name in ("FSDPStrategy", "ModelParallelStrategy"):
        raise ConfigurationError(
            f"trainer.strategy is {name}, expected ddp, auto or another that keeps the model whole: clients train "
            "copies of all its parameters, which this strategy shards across processes."
        )
    if name in SPAWNED or arguments.get("start_method") == "spawn":
        raise ConfigurationError(
            f"trainer.strategy is {name}, which spawns fresh processes for the run: expected ddp, where each "
            "process reads the command line itself, or ddp_fork (ddp_notebook in a notebook), whose processes are "
            "copies of this one."
        )
    # Lightning's list includes some that cannot work here
    known = ["auto", *(each for each in strategies.StrategyRegistry.available_strategies() if _whole(each))]
    if isinstance(strategy, str) and name.lower() not in known:
        cls = name.rpartition(".")[2]
        if isinstance(getattr(strategies, cls, None), type):
            raise ConfigurationError(
                f"trainer.strategy is {name}, which is a class: expected {{class_path: {cls}}}, or one of the names "
                f"{', '.join(known)}."
            )
        raise ConfigurationError(
            f"trainer.strategy is {name}, expected one of {', '.join(known)}.{nearest(name, known)}"
        )


def _whole(strategy: str) -> bool:
    """Return whether a strategy listed by Lightning supports rounds."""
    return not strategy.startswith(SHARDED) and strategy not in SPAWNED and strategy not in ONE_DEVICE


def _check_devices(devices: Any, accelerator: Any) -> None:
    """Check the number or the list of devices."""
    number = devices if isinstance(devices, int) else None
    if isinstance(devices, str):
        text = devices.strip()
        if text == "auto" or "," in text:
            return  # a list of devices: Lightning checks that they exist
        number = int(text) if text.removeprefix("-").isdecimal() else 0
    processors = accelerator == "cpu" or (accelerator in (None, "auto") and not torch.accelerator.is_available())
    if isinstance(devices, list) and devices and not processors:
        return
    if isinstance(devices, bool) or number is None or number < -1 or number == 0 or (number == -1 and processors):
        expected = "the number of processes" if processors else "their number, -1 for all, a list of indices"
        raise ConfigurationError(f"trainer.devices is {devices}, expected {expected} or auto.")
