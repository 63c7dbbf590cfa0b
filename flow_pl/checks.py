"""What can be found wrong before any training starts."""

from __future__ import annotations

import contextlib
import pkgutil
import typing
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from flow_pl.engine.client_optimizer import check_numbers
from flow_pl.errors import ConfigurationError, FlowError
from flow_pl.kernels.functional import training_mode
from flow_pl.methods.base import Method, Phase
from flow_pl.models.lazy import set_classes


def check_fit(method: Method, example: Tensor, num_classes: int, label_shape: tuple[int, ...] | None = None) -> None:
    """Check that features, backbone, router and targets fit together; gives lazy modules their shapes.

    Args:
        method: bound to a backbone.
        example: one instance [1, ...].
        num_classes: number of classes of the data.
        label_shape: of an instance's label; None if it is not known.

    Raises:
        ConfigurationError: the backbone cannot take the features or predict the targets.
    """
    modules = list(method.modules.values())
    set_classes(modules, num_classes)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), training_mode(modules, False):
            torch.manual_seed(method.lazy_seed)
            method.initialize(example)
            outputs = method.modules["global"](example)
    except FlowError:
        raise
    except Exception as error:
        raise _misfit(method.modules["global"], example, error) from error
    method.objective.check(outputs, num_classes)
    expected = method.objective.label_shape(outputs)
    if label_shape is not None and label_shape != expected:
        raise ConfigurationError(
            f"a label of the data has shape {list(label_shape)}, {type(method.objective).__name__} with outputs "
            f"{list(outputs.shape[1:])} of the backbone expects {list(expected)}: set model.objective to the task of "
            "the data, and the backbone to its number of classes."
        )


def _misfit(backbone: nn.Module, example: Tensor, error: Exception) -> ConfigurationError:
    """The error that a backbone cannot take the features, with the remedy for what is wrong with them."""
    name, shape = type(backbone).__name__, list(example.shape[1:])
    remedy = f"give {name} the features' shape, or the data module the shape that {name} expects"
    if len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4):
        first = [shape[-1], *shape[:-1]]
        remedy = f"models get pictures with their channels first, these seem to have them last: make them {first}"
    other = example.long() if example.is_floating_point() else example.float()
    with contextlib.suppress(Exception), torch.no_grad():
        backbone(other)
        remedy = (
            f"{name} takes tokens, the data has numbers: set data.tokens to true where the data module has it"
            if example.is_floating_point()
            else f"{name} takes numbers, the data has tokens (whole numbers): set data.tokens to false where the data "
            "module has it, or give features as float32"
        )
    return ConfigurationError(
        f"the data's features have shape {shape} ({example.dtype}), which {name} cannot take ({error}): {remedy}."
    )


def check_trainer(trainer: Trainer) -> None:
    """Check that a trainer asks for nothing that its optimizer steps, one a round, cannot have.

    Raises:
        ConfigurationError: it clips gradients or accumulates them; the remedy is named.
    """
    if trainer.gradient_clip_val:
        raise ConfigurationError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val}, expected null: a round makes one step on the "
            "clients' mean, whose gradients are taken by the loop. To clip the gradient of each client's step, set "
            "model.loop.max_grad_norm; to bound what a client sends, see model.aggregation and model.privacy."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, expected 1: the updates of all "
            "chunks of a round are summed as it is. For more clients in a round raise data.cohort_size, for more "
            "examples in a client's step model.loop.batch_size."
        )


def check_gradients(method: Method, trainer: Trainer, stage: str) -> None:
    """Check that a trainer lets a method take gradients where it personalizes clients.

    Args:
        method: bound to a backbone.
        trainer: of the run.
        stage: fit (which never forbids gradients), validate, test or predict.

    Raises:
        ConfigurationError: the method takes steps, and the trainer forbids gradients.
    """
    loops = {"validate": trainer.validate_loop, "test": trainer.test_loop, "predict": trainer.predict_loop}
    forbidden = getattr(loops.get(stage), "inference_mode", False)
    if forbidden and any(isinstance(stage, Phase) for stage in method.personal_phases):
        raise ConfigurationError(
            f"trainer.inference_mode is true, expected false: {type(method).__name__} personalizes clients by gradient "
            "steps in validation, test and predict: make the trainer with Trainer(inference_mode=False)."
        )


def check_class_paths(settings: Any) -> None:
    """Check that what a configuration calls are classes, or functions that make modules, optimizers or schedulers.

    Where a class is expected, jsonargparse refuses those of other kinds, but it calls any function (4.53).

    Args:
        settings: parsed but not instantiated: mappings, namespaces, lists and values.

    Raises:
        ConfigurationError: a class path names another function.
    """
    if isinstance(settings, list | tuple | set):
        for entry in settings:
            check_class_paths(entry)
        return
    if isinstance(settings, Namespace):
        settings = vars(settings)
    if not isinstance(settings, Mapping):
        return  # a value: an enumeration, a duration, a signal
    for entry in settings.values():
        check_class_paths(entry)
    path = settings.get("class_path")
    try:
        found = pkgutil.resolve_name(path) if isinstance(path, str) and "." in path else nn.Module
    except (ImportError, AttributeError, ValueError):  # for whoever is to make something of it to refuse
        return
    if not isinstance(found, type):
        try:
            made = typing.get_type_hints(found).get("return")
        except Exception:  # whatever an annotation does when it is looked up
            made = None
        if not (isinstance(made, type) and issubclass(made, nn.Module | Optimizer | LRScheduler)):
            raise ConfigurationError(
                f"class_path is {path}, which is no class: name one, or a function that is annotated to return a "
                "module, an optimizer or a scheduler."
            )


def check_checkpoint(
    saved: dict[str, str], expected: dict[str, str], saved_state: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    """Check that a checkpoint was written by the same method and backbone.

    Args:
        saved: class names in the checkpoint, by role ("method", "backbone").
        expected: class names of this run.
        saved_state: parameters in the checkpoint.
        state: parameters of this run.

    Raises:
        ConfigurationError: they differ.
    """
    for role, name in expected.items():
        if saved.get(role) != name:
            raise ConfigurationError(
                f"the checkpoint was written by the {role} {saved.get(role)}, this configuration has {name}: use the "
                f"configuration that the checkpoint was trained with, or another checkpoint."
            )
    missing, unknown = sorted(state.keys() - saved_state.keys()), sorted(saved_state.keys() - state.keys())
    other = [
        f"{key} {list(saved_state[key].shape)} instead of {list(p.shape)}"
        for key, p in state.items()
        if key in saved_state and not isinstance(p, nn.UninitializedParameter) and saved_state[key].shape != p.shape
    ]
    problems = [f"without {key}" for key in missing] + [f"with unknown {key}" for key in unknown] + other
    if problems:
        raise ConfigurationError(
            f"the checkpoint's {expected['backbone']} has other parameters than this configuration's: "
            f"{'; '.join(problems[:3])}{' ...' if len(problems) > 3 else ''}: use the sizes that it was trained with."
        )


MOST_ROUNDS = 10_000
"""Rounds of a schedule that are looked at beforehand: half a second."""


def check_server_optimizer(
    optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None, parameters: Iterable[Tensor], rounds: int
) -> None:
    """Step an optimizer and a scheduler on parameters of a few numbers, as the rounds of a fit would.

    Args:
        optimizer: makes the optimizer.
        scheduler: makes the scheduler; None = none.
        parameters: of the server; only how many there are and their axes matter.
        rounds: number of rounds of the fit; -1 = no end.

    Raises:
        ConfigurationError: one of them cannot be made or stepped, or has a setting that is not finite.
    """
    tiny = [torch.zeros([min(2, n) for n in p.shape], requires_grad=True) for p in parameters]
    setting, doing = "server_optimizer", "made"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = optimizer(tiny)
            check_numbers(made, setting)
            doing = "stepped once a round"
            for p in tiny:
                p.grad = torch.zeros_like(p)
            made.step()
            if scheduler is None:
                return
            setting, doing = "server_scheduler", "made"
            schedule = scheduler(made)
            if isinstance(schedule, ReduceLROnPlateau):
                raise ConfigurationError(
                    "server_scheduler is ReduceLROnPlateau, expected one that is stepped once a round without a "
                    "metric: use e.g. torch.optim.lr_scheduler.CosineAnnealingLR."
                )
            for round_ in range(min(rounds, MOST_ROUNDS) if rounds >= 0 else 1):
                doing = f"stepped in round {round_}"
                schedule.step()
                check_numbers(made, f"server_scheduler, in round {round_}: server_optimizer")
    except FlowError:
        raise
    except Exception as error:  # whatever an optimizer does with its settings
        raise ConfigurationError(
            f"{setting} cannot be {doing} ({type(error).__name__}: {error}): correct its settings, or use another one."
        ) from error
