"""Refuse blocks whose random numbers would depend on the clients that are trained side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from flow_pl.engine.client_draws import ClientDraws
from flow_pl.errors import ConfigurationError
from flow_pl.kernels.functional import buffers_kept
from flow_pl.methods.base import Method
from flow_pl.utils.inputs import Inputs, first, map_inputs
from flow_pl.utils.unit_stream import UnitStream, UnitTable


def check_draws(method: Method, example: Inputs) -> None:
    """Check that the server's modules draw nothing from torch's generators in a step, and nothing at all in evaluation.

    Functions replaced by `ClientDraws` draw for each client separately. Other draws would depend on the chunk size, the
    number of processes and earlier draws.

    Args:
        method: bound to a backbone whose lazy modules have their shapes.
        example: one instance [1, ...].

    Raises:
        ConfigurationError: a block draws by other means; the message names it.
    """
    names = {module: f"{group}.{name}" if name else group for group, module, name in _submodules(method)}
    modes = {module: module.training for module in names}
    rows = map_inputs(lambda t: torch.cat([t, t]), example)  # some blocks cannot compute statistics of a single row
    watch = _Watch()  # type: ignore[no-untyped-call]
    key = torch.zeros(2, dtype=torch.int32, device=first(example).device)
    try:
        for training in (False, True):
            for module in method.modules.values():
                module.train(training)
            kept = buffers_kept(method.modules.values())
            with kept, torch.no_grad(), torch.random.fork_rng(devices=[]), _inside(names) as inside:
                try:
                    # other errors of a block are found elsewhere
                    with suppress(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                        if training:
                            with ClientDraws(UnitStream(key, UnitTable())), watch:
                                method.initialize(rows)
                        else:
                            with watch:
                                method.initialize(rows)
                except _DrawnError as error:
                    _refuse(inside[-1] if inside else None, str(error), training)
    finally:
        for module, mode in modes.items():
            module.training = mode


class _DrawnError(Exception):
    """An operation, given by name, has drawn from a generator of torch."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at the first operation that draws."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not _draws_nothing(func, args, kwargs or {}):
            raise _DrawnError(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


def _draws_nothing(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a random operation is called such that it draws nothing, as attention without dropout."""
    given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    given |= {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    off = {"dropout_p": 0, "dropout": 0, "p": 0, "training": False, "train": False}
    return any(name in given and given[name] == value for name, value in off.items())


def _submodules(method: Method) -> Iterator[tuple[str, nn.Module, str]]:
    for group, module in method.modules.items():
        for name, inner in module.named_modules():
            yield group, inner, name


@contextmanager
def _inside(names: dict[nn.Module, str]) -> Iterator[list[tuple[str, nn.Module]]]:
    """Track the modules that are being called, the innermost last."""
    inside: list[tuple[str, nn.Module]] = []

    def enter(module: nn.Module, args: Any) -> None:
        if module in names:
            inside.append((names[module], module))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in names:
            inside.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield inside
    finally:
        for hook in hooks:
            hook.remove()


def _refuse(block: tuple[str, nn.Module] | None, operation: str, training: bool) -> None:
    name = "the model" if block is None else f"block '{block[0]}' ({type(block[1]).__name__})"
    if not training:
        raise ConfigurationError(
            f"{name} draws random numbers ({operation}) in evaluation too, so predictions could not be repeated: "
            "let it draw in training only, for instance by functional.dropout(x, p, training=self.training)."
        )
    raise ConfigurationError(
        f"{name} draws random numbers by {operation}, which cannot be drawn for each client separately; the results "
        "would depend on the chunk size and the number of processes. Use nn.Dropout between the layers, or draw by "
        "torch.rand_like, randn_like or bernoulli, without a generator."
    )
