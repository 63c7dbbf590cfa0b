"""Apply any element-wise torch optimizer to the stacked parameters of many clients."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from flow_pl.errors import ConfigurationError
from flow_pl.utils.groups import OptimizerFactory
from flow_pl.utils.validation import require_finite


class StackedOptimizer:
    """An optimizer of tensors [C, ...], of which only those of the first clients are still updated.

    Clients without minibatches left keep their parameters: the optimizer and its state then cover only views of the
    others, so neither momentum nor weight decay changes the finished clients, and they cost nothing.

    Args:
        factory: creates the optimizer.
        tensors: stacked parameters [C, ...], changed in place.
        lr_scale: factor on the learning rate.
    """

    def __init__(self, factory: OptimizerFactory, tensors: Sequence[Tensor], lr_scale: float = 1.0) -> None:
        self.optimizer = factory(list(tensors))
        self._active = len(tensors[0])
        for group in self.optimizer.param_groups:
            group["lr"] *= lr_scale
            _take_fastest(group)
        # Torch wraps steps for profilers, hooks and its compiler, which takes longer than the step of a small model.
        # The loop takes no gradients of steps, and an optimizer created here has no hooks.
        self._step = inspect.unwrap(type(self.optimizer).step)
        self._fused = any(group.get("fused") for group in self.optimizer.param_groups)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def narrow(self, active: int) -> None:
        """Continue with the first clients only."""
        if active == self._active:
            return
        state, self.optimizer.state = self.optimizer.state, type(self.optimizer.state)(dict)
        for group in self.optimizer.param_groups:
            cut = [p[:active] for p in group["params"]]
            for p, q in zip(group["params"], cut, strict=True):
                if p in state:
                    self.optimizer.state[q] = {k: v[:active] if _like(v, p) else v for k, v in state[p].items()}
            group["params"] = cut
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._active = active

    def step(self, grads: Sequence[Tensor], keep: Tensor | None = None) -> None:
        """Update the active clients' parameters.

        Args:
            grads: gradients [A, ...], in the order of the tensors.
            keep: [A] bool, False for clients that skip this step; their parameters and state stay unchanged, except
                for a step count that the optimizer shares between all clients.
        """
        parameters = self._parameters
        before: dict[int, Tensor] = {}
        if keep is not None:
            grads = [torch.where(_align(keep, g), g, 0) for g in grads]
            before = {id(t): t.clone() for t in (*parameters, *self._state(parameters))}
        if len({g.data_ptr() for g in grads}) < len(grads):
            grads = [g.clone() for g in grads]  # two parameters may share a gradient, and optimizers may write to it
        if self._fused:
            grads = [g.contiguous() for g in grads]  # torch's fused kernels on the CPU ignore strides
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g
        self._step(self.optimizer)
        for p in parameters:
            p.grad = None
        if keep is not None:
            for t in (*parameters, *self._state(parameters)):
                # state created in this step starts from zero
                t.copy_(torch.where(_align(keep, t), t, before.get(id(t), torch.zeros_like(t))))

    def _state(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the optimizer's state that has one element per element of a parameter."""
        return [v for p in parameters for v in self.optimizer.state.get(p, {}).values() if _like(v, p)]


def check_elementwise(factory: OptimizerFactory) -> None:
    """Check that an optimizer updates stacked clients exactly as it updates each of them alone.

    Raises:
        ConfigurationError: it does not, or its step needs more than gradients.
    """
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(2, 4, 3, generator=generator).transpose(1, 2) for _ in range(4))
    start = start.contiguous()  # unlike parameters, gradients of linear blocks are not contiguous
    stacked, alone = start.clone(), start.clone()
    try:
        together = StackedOptimizer(factory, [stacked])
        check_numbers(together.optimizer, "client_optimizer")
        each = [StackedOptimizer(factory, [alone[i : i + 1]]) for i in range(len(alone))]
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"the client optimizer cannot be made ({error}): correct its settings.") from error
    name = f"the client optimizer {type(together.optimizer).__name__}"
    try:
        for grad in grads:
            together.step([grad])
            for i, optimizer in enumerate(each):
                optimizer.step([grad[i : i + 1].contiguous()])
    except Exception as error:
        raise ConfigurationError(
            f"{name} cannot train clients side by side ({error}): use an element-wise one, such as torch.optim.SGD."
        ) from error
    if not torch.allclose(stacked, alone):
        raise ConfigurationError(
            f"{name} mixes clients that are trained side by side, expected an element-wise one: "
            "use e.g. torch.optim.SGD."
        )


def check_numbers(optimizer: Optimizer, setting: str) -> None:
    """Check that the settings of an optimizer are finite: torch's own checks let NaN and infinity pass.

    Args:
        optimizer: the optimizer.
        setting: name of the setting it comes from, for messages.

    Raises:
        ConfigurationError: a number is not finite.
    """
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key != "params":
                numbers = value if isinstance(value, tuple | list) else (value,)
                for number in numbers:
                    if isinstance(number, int | float | Tensor):
                        require_finite(**{f"{setting}.{key}": float(number)})


def _take_fastest(group: dict[str, Any]) -> None:
    """Choose the fastest implementation of an optimizer, unless the user chose one; torch's is slow on a CPU.

    A fused step reads and writes each number once; otherwise every single operation waits for the memory.
    """
    if group.get("fused") or group.get("foreach", True) is not None:
        return
    fits = all(p.device.type == "cpu" and p.is_floating_point() for p in group["params"])
    if fits and group.get("fused", True) is None and not group.get("differentiable"):
        group["fused"] = True
    else:
        group["foreach"] = True


def _like(value: object, p: Tensor) -> bool:
    """Return whether an entry of the optimizer's state has one element per element of the parameter."""
    return isinstance(value, Tensor) and value.shape == p.shape


def _align(flags: Tensor, t: Tensor) -> Tensor:
    """Reshape flags [A] to the number of axes of t."""
    return flags.view(-1, *[1] * (t.ndim - 1))
