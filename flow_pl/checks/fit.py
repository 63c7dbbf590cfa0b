"""Check that data, backbone, method and trainer fit together."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from flow_pl.checks.block_calls import MIXES, named, watched
from flow_pl.data.federation import Federation
from flow_pl.errors import ConfigurationError, FlowError, brief
from flow_pl.kernels.functional import training_mode
from flow_pl.methods.base import Method
from flow_pl.methods.steps import Phase
from flow_pl.models.blocks import is_chain
from flow_pl.models.lazy import set_classes
from flow_pl.tasks import Objective
from flow_pl.utils.inputs import Inputs, described, map_inputs


def check_fit(
    method: Method,
    example: Inputs,
    num_classes: int,
    label_shape: tuple[int, ...] | None = None,
    real_valued: bool = False,
) -> tuple[int, ...]:
    """Check that features, backbone, router and targets fit together; also initializes lazy modules.

    Args:
        method: the method, bound to a backbone.
        example: one instance [1, ...].
        num_classes: number of classes of the data.
        label_shape: shape of an instance's label; None if unknown.
        real_valued: whether labels are real values.

    Returns:
        The shape of an instance's label that the task expects.

    Raises:
        ConfigurationError: the backbone cannot take the features or predict the targets.
    """
    if method.objective.real_valued != real_valued:
        found, wanted = ("real values", "Regression") if real_valued else ("classes", "Classification")
        raise ConfigurationError(
            f"the labels of the data are {found}, which {type(method.objective).__name__} cannot predict: set "
            f"model.objective to {wanted}, or data.labels (in published files, that of the encoding) to "
            f"{'classes' if real_valued else 'values'}."
        )
    modules = list(method.modules.values())
    set_classes(modules, num_classes)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), training_mode(modules, False):
            of_backbone, of_others = method.lazy_seeds
            torch.manual_seed(of_backbone)
            method.modules["global"](example)
            if of_others != of_backbone:  # else nothing was drawn in between, and what follows must not be drawn again
                torch.manual_seed(of_others)
            method.initialize(example)
            outputs = method.modules["global"](example)
    except FlowError:
        raise
    except Exception as error:
        raise _misfit(method.modules["global"], example, error) from error
    if not isinstance(outputs, Tensor):
        backbone = method.modules["global"]
        raise _no_tensor(backbone, list(backbone.children())[-1] if is_chain(backbone) else None)
    method.objective.check(outputs, num_classes)
    check_mixtures(method.objective, outputs)
    expected = method.objective.label_shape(outputs)
    if label_shape is not None and label_shape != expected:
        raise ConfigurationError(
            f"a label of the data has shape {list(label_shape)}, {type(method.objective).__name__} with outputs "
            f"{list(outputs.shape[1:])} of the backbone expects {list(expected)}: set model.objective to the task of "
            "the data, and the backbone to its number of classes."
        )
    return expected


def check_mixtures(objective: Objective, outputs: Tensor) -> None:
    """Check that a task's `outputs` undoes its `probabilities`, which mixtures of models rely on.

    Args:
        objective: the task.
        outputs: [1, ...] of the backbone.

    Raises:
        ConfigurationError: the outputs that are made from a model's probabilities predict something else.
    """
    scores = torch.linspace(2, -2, outputs.shape[-1]).expand(outputs.shape)
    expected = objective.predictions(scores)
    found = objective.predictions(objective.outputs(objective.probabilities(scores)))
    if found.shape != expected.shape or not torch.allclose(found.float(), expected.float()):
        raise ConfigurationError(
            f"the task {type(objective).__name__} predicts {brief(found.tolist())} from outputs(probabilities(scores)) "
            f"and {brief(expected.tolist())} from the scores, expected the same: override `outputs` to undo "
            "`probabilities`, for mixtures of models."
        )


def check_label_moments(objective: Objective, federation: Federation) -> None:
    """Check that a regression is set up for the mean and standard deviation of the seen clients' training labels.

    Raises:
        ConfigurationError: it is set up for other values; see `Objective.check_labels`.
    """
    if objective.real_valued:
        y = np.concatenate(
            [federation.store.read(c).y[federation.split(c).train] for c in map(int, federation.seen)],
            dtype=np.float64,
        )
        objective.check_labels(float(y.mean()), float(y.std()))


def check_several_labels(objective: Objective, largest: int, source: str) -> None:
    """Check that the labels of a task with several of them for each example are 0 and 1.

    Args:
        objective: the task.
        largest: the largest label.
        source: whose labels they are, for the message.

    Raises:
        ConfigurationError: there is a larger one, for which a binary cross-entropy has no minimum.
    """
    if objective.several_labels and largest > 1:
        raise ConfigurationError(
            f"{source} has the label {largest}, {type(objective).__name__} expects 0 and 1: write 1 for each label "
            "that an example has, however often, and 0 for the others."
        )


def check_label_range(objective: Objective, federation: Federation) -> None:
    """Check the labels of a data set by `check_several_labels`; reads no row unless one is wrong.

    Raises:
        ConfigurationError: a label is wrong; the message names a client that has it.
    """
    store = federation.store
    largest = store.meta.largest_label
    if objective.several_labels and largest is not None and largest > 1:
        client = next(client for client in range(len(store)) if store.read(client).y.max() == largest)
        check_several_labels(objective, largest, f"client {store.name(client)!r}")


def _misfit(backbone: nn.Module, example: Inputs, error: Exception) -> ConfigurationError:
    """Return the error for features that a backbone cannot take, with a remedy."""
    name = type(backbone).__name__
    with contextlib.suppress(Exception), torch.no_grad(), training_mode([backbone], False):
        with watched(backbone, example) as calls, contextlib.suppress(Exception):
            backbone(example)
        if calls.no_tensor and is_chain(backbone):
            return _no_tensor(backbone, calls.no_tensor[0])
        backbone(map_inputs(lambda t: torch.cat([t, t]), example))
        return ConfigurationError(
            f"{named(backbone, calls.inside[-1] if calls.inside else None)} mixes instances: it accepts several, but "
            f"not one alone ({brief(error)}): {MIXES}."
        )
    if isinstance(example, dict):
        found = f"it uses {error}, which is not among them" if isinstance(error, KeyError) else str(error)
        return ConfigurationError(
            f"the data has several features by name ({described(example)}), which {name} cannot take ({found}): use "
            "a backbone whose forward takes a mapping with these names, or data with a single tensor (for arrays and "
            "tables, set feature_columns)."
        )
    shape = list(example.shape[1:])
    remedy = f"give {name} the features' shape, or the data module the shape that {name} expects"
    if len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4):
        first = [shape[-1], *shape[:-1]]
        remedy = f"models expect images with channels first, but these seem to have them last: permute them to {first}"
    if (key := _looked_up(backbone)) is not None:
        remedy = (
            f"{name} takes a mapping with {key}, the data has a single tensor: give data with several features by name "
            "(for arrays and tables, set feature_columns to a mapping)"
        )
    other = example.long() if example.is_floating_point() else example.float()
    with contextlib.suppress(Exception), torch.no_grad():
        backbone(other)
        remedy = (
            f"{name} takes tokens, the data has numbers: set data.tokens to true if the data module has it"
            if example.is_floating_point()
            else f"{name} takes numbers, the data has tokens (whole numbers): set data.tokens to false if the data "
            "module has it, or convert features to float32"
        )
    return ConfigurationError(
        f"the data's features have shape {shape} ({example.dtype}), which {name} cannot take ({error}): {remedy}."
    )


def _looked_up(backbone: nn.Module) -> str | None:
    """Return the first name that a backbone looks up in a mapping; None if it does not take one."""
    try:
        with torch.no_grad():
            backbone({})
    except KeyError as error:
        return str(error)
    except Exception:  # of whatever it does to a tensor
        return None
    return None


def _no_tensor(backbone: nn.Module, block: nn.Module | None) -> ConfigurationError:
    given = "recurrent layers and attention return a tuple" if block is not None else "some libraries return a record"
    return ConfigurationError(
        f"{named(backbone, block)} returns something other than a tensor ({given}), expected one tensor for "
        f"{'the task' if block is None else 'the next block'}: wrap it in a module whose forward returns only "
        "the outputs."
    )


def check_trainer(trainer: Trainer) -> None:
    """Check that a trainer has no settings that do not work with one optimizer step per round.

    Raises:
        ConfigurationError: the trainer clips or accumulates gradients; the message names the remedy.
    """
    if trainer.gradient_clip_val:
        raise ConfigurationError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val}, expected null: a round makes one step on the "
            "clients' mean update, and the loop computes their gradients. To clip the gradient of each client's step, "
            "set model.loop.max_grad_norm; to bound what a client sends, see model.aggregation and model.privacy."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, expected 1: the updates of all "
            "chunks of a round are summed anyway. For more clients per round, raise data.cohort_size; for more "
            "examples per client step, model.loop.batch_size."
        )


def check_gradients(method: Method, trainer: Trainer, stage: str) -> None:
    """Check that a trainer allows gradients when a method personalizes clients.

    Args:
        method: the method, bound to a backbone.
        trainer: trainer of the run.
        stage: fit (which always allows gradients), validate, test or predict.

    Raises:
        ConfigurationError: the method needs gradients, but the trainer disables them.
    """
    loops = {"validate": trainer.validate_loop, "test": trainer.test_loop, "predict": trainer.predict_loop}
    forbidden = getattr(loops.get(stage), "inference_mode", False)
    if forbidden and any(isinstance(stage, Phase) for stage in method.personal_phases):
        raise ConfigurationError(
            f"trainer.inference_mode is true, expected false: {type(method).__name__} personalizes clients by gradient "
            "steps in validation, test and predict: create the trainer with Trainer(inference_mode=False)."
        )
