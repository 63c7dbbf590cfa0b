"""Call modules with given parameters, and help custom operations work under vmap."""

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
    """Call a module with the given parameters.

    `RoutedModel` refuses backbones with tied parameters, so they are not searched for at every step.
    """
    return functional_call(module, parameters, args, kwargs, tie_weights=False)


@contextmanager
def intercepted(handlers: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the calls of modules by handlers within the context, wherever in a forward pass they are made.

    While a handler runs, its own module is not intercepted.

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
    """Move the mapped axis of a tensor in a vmap rule to the front; expand an unmapped tensor to the given size."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


@contextmanager
def training_mode(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    """Put modules into training or evaluation mode within the context.

    Args:
        modules: modules, with all submodules.
        training: whether to use training mode, in which dropout is active.
    """
    # restore one by one: an owner may keep a submodule in evaluation mode
    changed = [part for module in modules for part in module.modules() if part.training != training]
    for part in changed:
        part.training = training
    try:
        yield
    finally:
        for part in changed:
            part.training = not training


@contextmanager
def differentiable(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let torch's recurrent layers be differentiated in evaluation mode within the context.

    Their fused kernels keep what a gradient needs in training mode only. Without dropout, the outputs are the same.

    Args:
        modules: modules, with all submodules.
    """
    parts = (part for module in modules for part in module.modules())
    with training_mode([part for part in parts if isinstance(part, nn.RNNBase) and not part.dropout], True):
        yield


@contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the buffers of modules, both tensors and values, at the end of the context."""
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
