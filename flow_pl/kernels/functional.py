"""Modules called under parameters that are not their own, and operations of our own under vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def call(
    module: nn.Module, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Any:
    """Call a module under the given parameters.

    No two of them are one (`RoutedModel` refuses such backbones); that is not looked for anew at every step.
    """
    return functional_call(module, parameters, args, kwargs, tie_weights=False)


@contextmanager
def intercepted(handlers: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """A context in which the calls of modules are answered by handlers, wherever in a forward they are made.

    While a handler runs, its module is called as it is.

    Args:
        handlers: for each module a function of its (positional arguments, keyword arguments).
    """
    before = {module: vars(module).get("forward") for module in handlers}

    def restore(module: nn.Module) -> None:
        own = before[module]
        if own is None:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = own

    def install(module: nn.Module) -> None:
        def forward(*args: Any, **kwargs: Any) -> Any:
            restore(module)
            try:
                return handlers[module](args, kwargs)
            finally:
                vars(module)["forward"] = forward

        vars(module)["forward"] = forward

    try:
        for module in handlers:
            install(module)
        yield
    finally:
        for module in handlers:
            restore(module)


def mapped_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor in a vmap rule with its mapped axis, of the given size, first; one not mapped is seen by all."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


@contextmanager
def training_mode(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    """Modules in training or evaluation mode, and back in their own afterwards.

    Args:
        modules: each with all that is in it.
        training: whether they train (dropout drops, say).
    """
    # one by one: a part may be held in evaluation mode by its owner
    before = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in before:
        part.training = training
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


@contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context after which the buffers of modules are the tensors, with the values, that they were before."""
    before = [
        (part, name, buffer, buffer.clone())
        for module in modules
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, buffer, value in before:
                part._buffers[name] = buffer
                if buffer.shape != value.shape or not torch.equal(buffer, value):
                    buffer.resize_(value.shape).copy_(value)
