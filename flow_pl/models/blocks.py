"""Choose the blocks of a backbone: the submodules of which a routing method has two copies."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from flow_pl.errors import ConfigurationError

Blocks = Sequence[str] | Literal["auto"]
"""Names of submodules, as in `nn.Module.named_modules`, or "auto"."""

CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""Modules that hold others and are never called."""

LISTED = 12
"""Largest number of names that a message lists."""


def is_chain(backbone: nn.Module) -> bool:
    """Return whether a backbone is a plain `nn.Sequential`, which calls block after block and does nothing else."""
    plain = isinstance(backbone, nn.Sequential) and type(backbone).forward is nn.Sequential.forward
    return plain and not backbone._parameters


def trained(module: nn.Module) -> list[str]:
    """Return the names of a module's trainable parameters."""
    return [name for name, p in module.named_parameters() if p.requires_grad]


def check_parameters(backbone: nn.Module) -> None:
    """Check that clients side by side can have parameters of their own.

    Raises:
        ConfigurationError: a trainable parameter is used twice, or a layer keeps running statistics.
    """
    kind = type(backbone).__name__
    names = [name for name, p in backbone.named_parameters(remove_duplicate=False) if p.requires_grad]
    if len(names) != len(trained(backbone)):
        shared = sorted(set(names) - set(trained(backbone)))
        raise ConfigurationError(
            f"the backbone {kind} uses a parameter twice ({', '.join(shared)}), expected every "
            "block to have its own, since each is routed separately."
        )
    for name, module in backbone.named_modules():
        if getattr(module, "track_running_stats", False):
            remedy = "use nn.GroupNorm, or track_running_stats=False"
            if isinstance(module, _BatchNorm):
                remedy = (
                    "set model.batch_norm to group (GroupNorm with the same weights), frozen (its statistics as "
                    "constants) or local (kept by each client, with the method FedBN), or use nn.GroupNorm"
                )
            raise ConfigurationError(
                f"block '{name}' of the backbone is a {type(module).__name__} with running statistics, which many "
                f"clients trained side by side cannot share: {remedy}."
            )


def automatic_blocks(backbone: nn.Module) -> list[str]:
    """Choose the blocks of a backbone, in the order in which its modules are defined.

    The children with trainable parameters are the blocks. A list of layers is replaced by its items: a `ModuleList`,
    or a `Sequential` of layers of one class, with submodules of their own, that has no such Sequential as a sibling. So
    each layer of a transformer is a block, and so is each stage of a residual network, whose stages are siblings. A
    module that holds such a list is opened too, and so is the only child of a wrapper. Modules that hold embedding
    tables are not blocks.

    Args:
        backbone: any module.
    """
    if is_chain(backbone):
        children = {name: child for name, child in backbone._modules.items() if child is not None}
        return [n for n, child in children.items() if trained(child) and not isinstance(child, nn.Embedding)]
    inside = list(backbone.named_children())
    if len(inside) == 1:
        only, wrapped = inside[0]
        inner = automatic_blocks(wrapped)
        if inner:
            return [f"{only}.{block}" for block in inner]
    return list(_opened(backbone, ""))


def _opened(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        if not trained(child):
            continue
        if isinstance(child, CONTAINERS) or _is_depth(child, module) or _holds_list(child):
            yield from _opened(child, f"{prefix}{name}.")
        elif not _is_embedding(child):
            yield f"{prefix}{name}"


def _is_depth(child: nn.Module, parent: nn.Module) -> bool:
    """Return whether a Sequential is the list of its parent's layers, rather than one stage of several."""
    kind = _layer_class(child)
    beside = sum(_layer_class(other) is kind for other in parent.children())
    return kind is not None and beside == 1 and len(child._modules) > 1


def _layer_class(module: nn.Module) -> type | None:
    """Return the class of a Sequential's layers if they have the same class and submodules of their own."""
    layers = list(module.children()) if is_chain(module) else []
    same = len({type(layer) for layer in layers}) == 1
    return type(layers[0]) if same and all(any(layer.children()) and trained(layer) for layer in layers) else None


def _holds_list(module: nn.Module) -> bool:
    """Return whether a module, not a list itself, has a list of layers as a child, or a child that has one."""
    if isinstance(module, nn.Sequential):
        return False
    several = (c for c in module.children() if isinstance(c, nn.ModuleList) and len(c) > 1 and trained(c))
    return any(True for _ in several) or any(_is_depth(c, module) or _holds_list(c) for c in module.children())


def _is_embedding(module: nn.Module) -> bool:
    tables = (nn.Embedding, nn.EmbeddingBag)
    return isinstance(module, tables) or any(isinstance(child, tables) for child in module.children())


def named_blocks(backbone: nn.Module, names: Sequence[str], setting: str = "blocks") -> list[str]:
    """Check names of blocks.

    Args:
        backbone: any module.
        names: names of submodules.
        setting: name of the setting, for messages.

    Raises:
        ConfigurationError: a name is not that of a submodule, or of one that is never called, has nothing to train, or
            is inside another.
    """
    modules, kind = dict(backbone.named_modules()), type(backbone).__name__
    if isinstance(names, str) or not names:
        raise ConfigurationError(f"{setting} is {names!r}, expected a list of names of submodules of {kind}, or auto.")
    for name in names:
        if not name or name not in modules:
            raise ConfigurationError(
                f"{setting} names '{name}', which is not a submodule of {kind}: {suggestion(modules, name)}."
            )
        module = modules[name]
        if isinstance(module, CONTAINERS):
            items = ", ".join(f"{name}.{item}" for item, _ in module.named_children())
            raise ConfigurationError(
                f"{setting} names '{name}' of {kind}, a {type(module).__name__}, which is never called itself: name "
                f"what it holds ({items})."
            )
        if isinstance(module, nn.Embedding):
            raise ConfigurationError(
                f"{setting} names '{name}' of {kind}, an embedding table; tables are shared and not routed: leave it "
                "out."
            )
        if not trained(module):
            raise ConfigurationError(
                f"{setting} names '{name}' of {kind}, which has no parameters to train: name modules that have some."
            )
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ConfigurationError(
                f"{setting} names '{name}' of {kind}, which is inside '{outer}', named too: name one of them."
            )
        if list(names).count(name) > 1:
            raise ConfigurationError(f"{setting} names '{name}' of {kind} twice: name it once.")
    return list(names)


def suggestion(modules: dict[str, nn.Module], name: str) -> str:
    """Return a message's suggestion for an unknown name.

    Args:
        modules: known modules by name.
        name: the unknown name.
    """
    near = difflib.get_close_matches(name, [known for known in modules if known], 3)
    if near:
        return f"the closest names are {', '.join(map(repr, near))}"
    known = [f"'{known}'" for known, module in modules.items() if known and trained(module)]
    return f"it has {', '.join(known[:LISTED])}{' ...' if len(known) > LISTED else ''}"
