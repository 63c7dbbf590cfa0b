"""Models to predict with: a trained method and its weights as a module of its own."""

from __future__ import annotations

import keyword
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flow_pl.engine.server_round import server_groups
from flow_pl.methods.base import Method
from flow_pl.methods.predictor import predictor
from flow_pl.module import FederatedModule
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs

if TYPE_CHECKING:
    from typing_extensions import Self


SINGLE = "model"
"""Name of the group of a model with a single set of the backbone's parameters."""


class ServedModel(nn.Module):
    """Wraps a predictor as a standalone module: its weights are buffers, copied from the source model.

    So it can be moved, converted, copied, pickled and saved like any module, and later training does not change it. It
    always predicts in evaluation mode, even after `train()`, so without dropout.

    Args:
        method: method of the run, bound to its backbone.
        groups: the parameter groups to predict with.
    """

    def __init__(self, method: Method, groups: Groups) -> None:
        super().__init__()
        self.method = predictor(method)
        self.blocks = nn.ModuleList(self.method.modules.values())  # without weights, for their buffers
        self.groups = _Buffers({f"{name}.{key}": p for name, group in groups.items() for key, p in group.items()})
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; its blocks stay in evaluation mode."""
        super().train(mode)
        self.blocks.eval()
        return self

    def weights(self) -> Parameters:
        """Return all tensors by name: those of a single model by the backbone's names, others as group.name."""
        groups = self.tensors()
        if len(groups) == 1:
            ((_, weights),) = groups.items()
            return {**dict(self.method.modules["global"].named_buffers()), **weights}
        found = {f"{name}.{key}": p for name, group in groups.items() for key, p in group.items()}
        for name, block in self.method.modules.items():
            if name in groups:
                found |= {f"{name}.{key}": p for key, p in block.named_buffers()}
        return found

    def tensors(self) -> Groups:
        """Return the parameter groups by name."""
        groups: Groups = {}
        for name, tensor in self.groups.tensors().items():
            group, _, key = name.partition(".")
            groups.setdefault(group, {})[key] = tensor
        return groups


class PersonalModel(ServedModel):
    """Predicts for one client; created by `personalize`.

    Args:
        method: method of the run, bound to its backbone.
        groups: the client's parameter groups, personalized.
    """

    def __init__(self, method: Method, groups: Groups) -> None:
        personal = method.personal(groups)
        needed = {name: group for name, group in groups.items() if name not in method.scratch}
        super().__init__(method, needed if personal is None else {SINGLE: personal})

    def forward(self, x: Inputs) -> Tensor:
        """Compute outputs for instances x [N, ...], as the backbone does: [N, classes] or [N, T, tokens].

        With hard routing, each instance passes through only one copy of a block (Flow with `routing: hard`).
        """
        groups = self.tensors()
        if SINGLE in groups:
            return self.method.model.plain(x, groups[SINGLE])
        return self.method.personalized(groups, x)


class ServerModel(ServedModel):
    """Predicts with the method's generalized model.

    Args:
        module: trained module, for instance from a checkpoint.
    """

    def __init__(self, module: FederatedModule) -> None:
        server = server_groups(module.method)
        super().__init__(module.method, {name: server[name] for name in module.method.models})

    def forward(self, x: Inputs) -> Tensor:
        """Compute outputs for instances x [N, ...], as the backbone does: [N, classes] or [N, T, tokens]."""
        return self.method.generalized(self.tensors(), x)


class _Buffers(nn.Module):
    """Holds tensors by dotted names, as buffers of nested modules.

    A name reserved by Python or torch ("global") gets a trailing underscore, so that it can be an attribute.
    """

    def __init__(self, tensors: Parameters) -> None:
        super().__init__()
        self._names: dict[str, str] = {}
        below: dict[str, Parameters] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                below.setdefault(first, {})[rest] = tensor
            else:
                copied = tensor.detach().clone(memory_format=torch.contiguous_format)
                self.register_buffer(self._attribute(first), copied)
        for first, inner in below.items():
            self.add_module(self._attribute(first), _Buffers(inner))

    def _attribute(self, name: str) -> str:
        attribute = name
        while keyword.iskeyword(attribute) or hasattr(self, attribute):
            attribute += "_"
        self._names[attribute] = name
        return attribute

    def tensors(self) -> Parameters:
        """Return the tensors by their dotted names."""
        found = {self._names[name]: tensor for name, tensor in self.named_buffers(recurse=False)}
        for name, inner in self.named_children():
            assert isinstance(inner, _Buffers)
            found |= {f"{self._names[name]}.{rest}": tensor for rest, tensor in inner.tensors().items()}
        return found
