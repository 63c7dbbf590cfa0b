"""Watch the calls of a backbone's blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from flow_pl.utils.inputs import Inputs, leaves


@dataclass
class Calls:
    """Records the blocks' behavior in one call of a backbone.

    Attributes:
        inside: blocks whose calls are in progress, the innermost last; after an error, those that it passed through.
        outputs: outputs of every called block, in the order in which the calls ended, if they are kept.
        in_place: blocks that have changed an input in place, the innermost first.
        on_data: blocks among these that have changed the data themselves.
        no_tensor: top-level blocks that have returned something other than a tensor.
    """

    inside: list[nn.Module] = field(default_factory=list)
    outputs: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    in_place: list[nn.Module] = field(default_factory=list)
    on_data: list[nn.Module] = field(default_factory=list)
    no_tensor: list[nn.Module] = field(default_factory=list)


@contextmanager
def watched(backbone: nn.Module, data: Inputs, keep: bool = False) -> Iterator[Calls]:
    """Record the calls of blocks within the context.

    Args:
        backbone: the backbone; its blocks are all modules in it and itself.
        data: the input of the call.
        keep: whether to keep copies of the outputs.
    """
    blocks, tops, calls = set(backbone.modules()), {*backbone.children()}, Calls()
    parts = leaves(data)
    copies = [part.clone() for part in parts]
    versions: list[tuple[list[Tensor], list[int], list[int]]] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in blocks:
            tensors = [t for t in args if isinstance(t, Tensor)]
            calls.inside.append(module)
            versions.append((tensors, [t._version for t in tensors], [t._version for t in parts]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module not in blocks:
            return
        calls.inside.pop()
        tensors, before, data_before = versions.pop()
        if any(t._version != version for t, version in zip(tensors, before, strict=True)):
            calls.in_place.append(module)
        # changes through `.data` do not count as versions
        written = [t._version for t in parts] != data_before
        if written or (not calls.on_data and not all(map(torch.equal, parts, copies))):
            calls.on_data.append(module)
        if module in tops and not isinstance(output, Tensor):
            calls.no_tensor.append(module)
        output = (
            output[0] if isinstance(output, tuple) and output else output
        )  # recurrent layers and attention return tuples
        if keep and isinstance(output, Tensor):
            calls.outputs.append((module, output.detach().clone()))

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


MIXES = "compute each instance's outputs from it alone (nn.GroupNorm or nn.LayerNorm in place of batch statistics)"
"""Remedy for a block that mixes instances."""


def named(backbone: nn.Module, block: nn.Module | None) -> str:
    """Return the name of a block for messages."""
    for name, module in backbone.named_modules():
        if module is block and name:
            return f"block '{name}' ({type(module).__name__}) of the backbone"
    return f"the backbone {type(backbone).__name__}"
