"""Predict the names of a fit's metrics, to check the callbacks that monitor one of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint

from flow_pl.callbacks._base import EvaluationCallback
from flow_pl.callbacks._federated import federated_module
from flow_pl.callbacks.backdoor_success import BackdoorSuccess
from flow_pl.callbacks.convergence_diagnostics import PROGRESS, ConvergenceDiagnostics
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.convergence import HEAD, gradient_figures
from flow_pl.methods.steps import Phase
from flow_pl.utils.words import nearest

LOCAL_MODEL = ("global_or_local_accuracy", "best_mixture_accuracy", "gain_over_mixture")
"""Metrics that `PersonalizationGain` adds for a method with a local model."""

ROUND = ("clients", "rejected_clients", "examples", "update_norm", "bytes_up", "bytes_down", "padding")
"""Metrics of every round, besides its losses."""

SOMETIMES = (
    "skipped_steps",
    "client_lr_factor",
    "clip_norm",
    "attackers",
    "attackers_weight",
    "attackers_left_out",
    "dropped_clients",
    "late_clients",
    "clients_with_state",
    "state_bytes",
)
"""Metrics of a round that depend on the configuration."""


def check_monitors(trainer: Trainer, pl_module: LightningModule) -> None:
    """Reject a callback that monitors a metric that no round of the fit will log.

    Nothing is rejected if some callback is neither Lightning's nor this project's, since it may log the metric.

    Args:
        trainer: the trainer with all of its callbacks.
        pl_module: the module to be trained.

    Raises:
        ConfigurationError: there is no such metric; the message lists the known ones.
    """
    callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    pl_module.trainer = trainer  # as Lightning does at the start of a stage: a callback may use it
    known = validation_metrics(trainer, callbacks, pl_module)
    trained, always = loss_metrics(pl_module), [f"train/{name}" for name in ROUND]
    foreign = [callback for callback in callbacks if not _known(callback)]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        listed = isinstance(callback, EarlyStopping | ModelCheckpoint) and isinstance(monitor, str)
        if not listed or foreign or not monitor or monitor in {*known, *trained, "step", "epoch"}:
            continue
        if may_be_logged(monitor, callbacks, pl_module) or (_own_default(callback) and not known):
            continue
        if monitor.startswith("val/") and not known:
            raise ConfigurationError(
                f"{type(callback).__name__} monitors {monitor}, but nothing is validated: "
                "trainer.limit_val_batches is 0, or no callback logs metrics, as with trainer.barebones."
            )
        raise ConfigurationError(
            f"{type(callback).__name__} monitors {monitor}, which no round logs."
            f"{nearest(monitor, [*known, *trained, *always])} Known metrics: {', '.join([*trained, *always, *known])}."
        )


def validation_metrics(trainer: Trainer, callbacks: Sequence[Callback], pl_module: LightningModule) -> list[str]:
    """Return the names of the validation metrics; none if nothing is validated."""
    if trainer.limit_val_batches == 0:
        return []
    names: list[str] = []
    for callback in callbacks:
        if isinstance(callback, EvaluationCallback):
            metric = callback.create_metric(pl_module)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # from torchmetrics, about empty metrics: only their names are needed
                figures = {} if metric is None else metric.compute()
            names += [f"val/{callback.model}{name}" for name in figures]
            if "gain" in figures:
                names += [f"val/{name}" for name in LOCAL_MODEL]
        elif isinstance(callback, BackdoorSuccess):
            names += [f"val/backdoor_{model}" for model in ("generalized", "personalized")]
    return names


def loss_metrics(pl_module: LightningModule) -> list[str]:
    """Return the names of the training losses, one for each group of parameters that clients train in a round."""
    stages = [stage for stage in federated_module(pl_module).method.phases if isinstance(stage, Phase)]
    return [f"train/{name}_loss" for name in dict.fromkeys(step.moves for stage in stages for step in stage.steps)]


def may_be_logged(monitor: str, callbacks: Sequence[Callback], pl_module: LightningModule) -> bool:
    """Return whether the configured run may log this metric."""
    section, _, name = monitor.partition("/")
    if section == "train":
        return name in (*ROUND, *SOMETIMES)
    if section == "diagnostics":
        blocks = federated_module(pl_module).route_names
        routed = ("q_local", "q_global", *(f"q_local/{block}" for block in blocks)) if blocks else ()
        measured = any(isinstance(callback, ConvergenceDiagnostics) for callback in callbacks)
        return measured and name in ("G", "B", *PROGRESS, *gradient_figures(torch.zeros(HEAD + 1), 1), *routed)
    if section.startswith("lr-"):
        return any(isinstance(callback, LearningRateMonitor) for callback in callbacks)
    return monitor == "privacy/epsilon" and getattr(pl_module, "privacy", None) is not None


def _known(callback: Callback) -> bool:
    return type(callback).__module__.partition(".")[0] in ("flow_pl", "callbacks", "lightning")


def _own_default(callback: Callback) -> bool:
    """Return whether this is the checkpoint of the best round, which is left out if nothing is validated."""
    return isinstance(callback, ModelCheckpoint) and callback.filename == "best"
