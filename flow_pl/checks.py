"""What can be found wrong before any training starts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flow_pl.errors import ConfigurationError, FlowError
from flow_pl.methods.base import Method


def check_fit(method: Method, example: Tensor, num_classes: int) -> None:
    """Check that features, backbone, router and targets fit together; gives lazy modules their shapes.

    Args:
        method: bound to a backbone.
        example: one instance [1, ...].
        num_classes: number of classes of the data.

    Raises:
        ConfigurationError: the backbone cannot take the features or predict the targets.
    """
    modules = list(method.modules.values())
    modes = [module.training for module in modules]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(method.lazy_seed)
            for module in modules:
                module.eval()
            method.initialize(example)
            outputs = method.modules["global"](example)
    except FlowError:
        raise
    except Exception as error:
        backbone = type(method.modules["global"]).__name__
        raise ConfigurationError(
            f"the data's features have shape {list(example.shape[1:])} ({example.dtype}), which {backbone} cannot take "
            f"({error}): give {backbone} the features' shape, or the data module the shape that {backbone} expects."
        ) from error
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
    method.objective.check(outputs, num_classes)


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
