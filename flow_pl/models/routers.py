"""Routers: choose the global or the local branch of each block for each instance (Panchal et al., NeurIPS 2023).

A router is functional and written for one client: its parameters are passed in, so that the loop can vectorize it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flow_pl.errors import ConfigurationError
from flow_pl.kernels.functional import call
from flow_pl.models.dropout import Dropout
from flow_pl.models.pooling import is_tokens
from flow_pl.models.recurrent import Recurrent
from flow_pl.utils.groups import Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_counts, require_fraction, require_some

if TYPE_CHECKING:
    from flow_pl.models.routed import RoutedModel

Route = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Maps (index of the routed block, its inputs, its outputs on the global and on the local copy) to probabilities
[..., 2], (global, local), that sum to 1. Recurrent blocks call it at every time step, with that step's tensors."""


class Router(nn.Module, ABC):
    """Decides, for every instance and routed block, between the global and the local parameters.

    A router is created from the routed blocks of a backbone, in order.

    Attributes:
        sees_outputs: whether it decides by the outputs of both copies of a block. If not, a block that is routed hard
            need not compute the branch that is not taken.
    """

    sees_outputs = True

    def look(self, model: RoutedModel, parameters: Parameters, x: Inputs) -> Inputs:
        """Return what the router decides by [N, ...]: the instances themselves.

        Args:
            model: the backbone and its blocks.
            parameters: parameters of w_g.
            x: instances [N, ...].
        """
        return x

    @abstractmethod
    def bind(self, parameters: dict[str, Tensor] | None, x: Inputs) -> Route:
        """Return the route of instances through the blocks.

        Args:
            parameters: parameters of the router; None for the module's own.
            x: [N, ...] what the router decides by, from `look`.
        """

    def call(self, parameters: dict[str, Tensor] | None, *args: Any) -> Any:
        """Call `forward` with the given parameters."""
        return self(*args) if parameters is None else call(self, parameters, args)


class InstanceRouter(Router):
    """An MLP over the flattened instance with one early exit per routed block.

    Exit i is a softmax over the two branches on hidden layer i. Blocks beyond the last hidden layer share its exit;
    with fewer blocks than layers, the exits are on the last layers. Inputs must be quantities, such as pixels; for
    token ids, use `FeatureRouter`.

    Args:
        blocks: the routed blocks, given by the method.
        hidden: widths of the hidden layers (published for EMNIST: 350, 150, 50).
        dropout: share of hidden units dropped in training; none in evaluation (published: 0.3).
    """

    sees_outputs = False

    def __init__(
        self, blocks: Sequence[nn.Module], hidden: Sequence[int] = (350, 150, 50), dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.exits = _EarlyExits(len(blocks), hidden, dropout)

    def bind(self, parameters: dict[str, Tensor] | None, x: Inputs) -> Route:
        """Decide for all blocks from the instance alone."""
        q: Tensor = self.call(parameters, x)
        branches = q.unbind(1)  # one gradient for all blocks
        return lambda block, inputs, on_global, on_local: branches[block]

    def look(self, model: RoutedModel, parameters: Parameters, x: Inputs) -> Tensor:
        """Return the instances [N, ...].

        Raises:
            ConfigurationError: they are token ids, or several tensors by name.
        """
        if isinstance(x, dict) or is_tokens(x):
            raise ConfigurationError(
                f"the router is {type(self).__name__}, which treats numbers as quantities, but instances are "
                "token ids or several tensors: use FeatureRouter, which decides by features of the backbone."
            )
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Compute probabilities [N, blocks, 2] for instances x [N, ...]."""
        h = x.flatten(1)
        probabilities: Tensor = self.exits(h if h.is_floating_point() else h.float())
        return probabilities


class SequenceRouter(Router):
    """Routes recurrent backbones: by an MLP at every step of a cell, and one with early exits for the blocks after it.

    The cell's MLP sees [input of the step, global h, local h], and with `cell_state` also both c. The MLP for the later
    blocks sees the concatenated global and local outputs of the first of them, per token.

    Args:
        blocks: the routed blocks, given by the method.
        hidden: widths for a cell (published for Stack Overflow: 500, 250, 100, 50).
        hidden_behind: widths for the blocks after the last cell (published: 75, 30, 10).
        cell_state: whether the cell's MLP sees c too (published for Shakespeare).
        dropout: share of hidden units dropped in training (published: 0.3).

    Raises:
        ConfigurationError: no block is recurrent, or a recurrent block follows one that is not.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        hidden: Sequence[int] = (500, 250, 100, 50),
        hidden_behind: Sequence[int] = (75, 30, 10),
        cell_state: bool = False,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        recurrent = [isinstance(block, Recurrent) for block in blocks]
        self._cells = sum(recurrent)
        if not self._cells or recurrent != sorted(recurrent, reverse=True):
            raise ConfigurationError(
                "SequenceRouter routes recurrent blocks followed by others, the backbone's are "
                f"{[type(block).__name__ for block in blocks]}: use InstanceRouter, or another backbone."
            )
        self.cell_state = cell_state
        self.cells = nn.ModuleList([_EarlyExits(1, hidden, dropout) for _ in range(self._cells)])
        self.behind = _EarlyExits(max(1, len(blocks) - self._cells), hidden_behind, dropout, "hidden_behind")

    def bind(self, parameters: dict[str, Tensor] | None, x: Inputs) -> Route:
        """Decide per token: at every step of a cell, and once for the blocks after it."""
        decided: list[Tensor] = []

        def route(block: int, inputs: Tensor, on_global: Tensor, on_local: Tensor) -> Tensor:
            if block < self._cells:
                states = [on_global, on_local]
                if not self.cell_state:
                    states = [state.chunk(2, dim=-1)[0] for state in states]  # only h
                q: Tensor = self.call(parameters, block, torch.cat([inputs, *states], dim=-1))
                return q[..., 0, :]
            if not decided:
                decided.append(self.call(parameters, block, torch.cat([on_global, on_local], dim=-1)))
            return decided[0][..., block - self._cells, :]

        return route

    def forward(self, block: int, features: Tensor) -> Tensor:
        """Compute probabilities [..., exits, 2] for features [..., F] of a cell's step or the first later block."""
        exits = self.cells[block] if block < self._cells else self.behind
        probabilities: Tensor = exits(features)
        return probabilities


class _EarlyExits(nn.Module):
    """An MLP with exits on its hidden layers, each a softmax over two branches: [..., F] to [..., exits, 2]."""

    def __init__(self, exits: int, hidden: Sequence[int], dropout: float, setting: str = "hidden") -> None:
        super().__init__()
        require_counts(**{f"the router's {setting}": hidden})
        require_some(**{f"the router's {setting}": hidden})
        require_fraction(**{"the router's dropout": dropout})
        # The first layer takes its width from the first instance, in FederatedModule.setup.
        self.layers = nn.ModuleList([nn.LazyLinear(hidden[0]), *(nn.Linear(a, b) for a, b in pairwise(hidden))])
        self.dropout = Dropout(dropout)
        skip = max(0, len(hidden) - exits)
        self._layers_of_exits = [min(i + skip, len(hidden) - 1) for i in range(exits)]
        self.heads = nn.ModuleList([nn.Linear(hidden[layer], 2) for layer in self._layers_of_exits])

    def forward(self, h: Tensor) -> Tensor:
        outputs = []
        for layer in self.layers:
            h = self.dropout(layer(h).relu())
            outputs.append(h)
        logits = [head(outputs[layer]) for head, layer in zip(self.heads, self._layers_of_exits, strict=True)]
        return torch.stack(logits, dim=-2).float().softmax(-1)
