"""Calls of a backbone's blocks, watched."""

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
    """What the blocks of a backbone have done in one call of it.

    Attributes:
        inside: the blocks that are being called, the innermost last; after an error, those that it went through.
        outputs: of every block that has been called, in the order in which they ended; where they are kept.
        in_place: blocks that have changed an input in place, the innermost first.
        on_data: of these, those that have changed the data themselves.
        no_tensor: blocks of the first level that have given something else than a tensor.
    """

    inside: list[nn.Module] = field(default_factory=list)
    outputs: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    in_place: list[nn.Module] = field(default_factory=list)
    on_data: list[nn.Module] = field(default_factory=list)
    no_tensor: list[nn.Module] = field(default_factory=list)


@contextmanager
def watched(backbone: nn.Module, data: Inputs, keep: bool = False) -> Iterator[Calls]:
    """A context in which what blocks do is noted.

    Args:
        backbone: the blocks are the modules in it, and itself.
        data: what it is called with.
        keep: whether to keep outputs, as copies that no later block changes.
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
        # what `.data` gives does not count versions
        written = [t._version for t in parts] != data_before
        if written or (not calls.on_data and not all(map(torch.equal, parts, copies))):
            calls.on_data.append(module)
        if module in tops and not isinstance(output, Tensor):
            calls.no_tensor.append(module)
        output = output[0] if isinstance(output, tuple) and output else output  # of recurrent layers and attention
        if keep and isinstance(output, Tensor):
            calls.outputs.append((module, output.detach().clone()))

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


MIXES = "compute each instance's outputs from it alone (nn.GroupNorm or nn.LayerNorm in place of batch statistics)"
"""What to do about a block that mixes instances."""


def named(backbone: nn.Module, block: nn.Module | None) -> str:
    """How messages call a block."""
    for name, module in backbone.named_modules():
        if module is block and name:
            return f"block '{name}' ({type(module).__name__}) of the backbone"
    return f"the backbone {type(backbone).__name__}"
