"""Call a backbone with each block replaced by the mixture of its two copies, instance by instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flow_pl.errors import ConfigurationError
from flow_pl.kernels.functional import call
from flow_pl.models.recurrent import Recurrent, has_client_axis
from flow_pl.models.routers import Route
from flow_pl.utils.groups import Parameters


class Routing:
    """Mixes the copies of each block in one forward pass, and records the decisions.

    Args:
        backbone: the backbone, for messages.
        blocks: names of the routed blocks.
        route: returns the probabilities of both branches for each block.
        hard: see `RoutedModel.routed`.
        ahead: see `RoutedModel.routed`.
    """

    def __init__(self, backbone: nn.Module, blocks: Sequence[str], route: Route, hard: bool, ahead: bool) -> None:
        self._backbone = backbone
        self._blocks = blocks
        self._route = route
        self._hard = hard
        self._ahead = ahead
        self._decisions: dict[str, Tensor] = {}

    def mixed(
        self,
        name: str,
        block: nn.Module,
        first: Parameters,
        second: Parameters,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Compute a block's outputs on both copies, mixed by the route.

        Args:
            name: name of the block.
            block: the block.
            first: parameters of the global copy.
            second: parameters of the local copy.
            args: positional arguments of the call; the first tensor is the block's input [N, ...].
            kwargs: keyword arguments of the call.

        Raises:
            ConfigurationError: it was called before, gets or returns no tensor, or has not one row per instance.
        """
        given = tensors_in((args, kwargs))
        if name in self._decisions or not given:
            self._refuse(name, "is called several times in a forward pass" if given else "is called without a tensor")
        h, asked = given[0], []

        def decide(inputs: Tensor, on_global: Tensor, on_local: Tensor) -> Tensor:
            q = self._route(self._blocks.index(name), inputs, on_global, on_local)
            asked.append(q)
            return one_hot_routes(q) if self._hard else q

        if isinstance(block, Recurrent):
            h = block.routed(h, first, second, decide)
            self._decisions[name] = torch.stack(asked, dim=1)
            return h
        # An exported program has no shapes that depend on routes; a GPU would have to synchronize.
        grouped = self._hard and self._ahead and not has_client_axis(h) and not torch.compiler.is_exporting()
        grouped = grouped and h.device.type == "cpu"
        if grouped and len(given) == 1:
            h = _taken(block, (args, kwargs), first, second, decide(h, h, h)[..., 1] > 0)
        else:
            on_global, on_local = call(block, first, args, kwargs), call(block, second, args, kwargs)
            if not isinstance(on_global, Tensor):
                self._refuse(name, f"returns a {type(on_global).__name__}, not a tensor")
            q = decide(h, on_global, on_local)
            if not torch.compiler.is_exporting() and on_global.shape[:1] != q.shape[:1]:
                self._refuse(name, f"returns outputs of shape {list(on_global.shape)} for {len(q)} instances")
            q = q.reshape(*q.shape[:-1], *[1] * (on_global.ndim - q.ndim + 1), 2)
            if self._hard:
                h = torch.where(q[..., 1] > 0, on_local, on_global)
            else:
                to_global, to_local = q.unbind(-1)  # one gradient for both
                h = to_global * on_global + to_local * on_local
            h = h.to(_dtype(first))
        self._decisions[name] = asked[0]
        return h

    def probabilities(self) -> Tensor:
        """Return the probabilities of all blocks, in order: [N, blocks, 2] or [N, T, blocks, 2].

        Raises:
            ConfigurationError: a block has not been called.
        """
        for name in self._blocks:
            if name not in self._decisions:
                self._refuse(name, "is never called in a forward pass")
        decisions = [self._decisions[name] for name in self._blocks]
        most = max(q.ndim for q in decisions)
        shape = max(q.shape for q in decisions if q.ndim == most)
        # a decision per instance applies to all of its tokens
        per_token = [q if q.ndim == most else q.unsqueeze(1).expand(shape) for q in decisions]
        return torch.stack(per_token, dim=-2)

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise ConfigurationError(
            f"{named(self._backbone, name)} {what}, expected a block that is called once with a tensor and returns "
            "one, with a row for each instance, so that its two copies can be mixed: name other submodules in "
            "model.blocks."
        )


def named(backbone: nn.Module, name: str) -> str:
    """Name a block for messages."""
    return f"block '{name}' ({type(backbone.get_submodule(name)).__name__}) of the backbone"


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in a call's arguments, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def one_hot_routes(q: Tensor) -> Tensor:
    """Compute hard routes: 1 for the more probable branch, the global one in a tie.

    Args:
        q: [..., 2] probabilities (global, local).
    """
    local = (q[..., 1] > q[..., 0]).to(q.dtype)
    return torch.stack([1 - local, local], dim=-1)


def _dtype(parameters: Parameters) -> torch.dtype:
    """Return a block's dtype outside autocast: routing probabilities are float32, whatever the weights are."""
    return next(iter(parameters.values())).dtype


def _taken(block: nn.Module, given: Any, global_: Parameters, local: Parameters, is_local: Tensor) -> Tensor:
    """Compute a block's outputs for its only input h [N, ...], each by the branch taken: is_local [N] bool."""

    def outputs(parameters: Parameters, rows: Tensor | None) -> Tensor:
        args, kwargs = given
        if rows is not None:
            args, kwargs = pytree.tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, given)
        out: Tensor = call(block, parameters, args, kwargs)
        return out

    to_local = is_local.nonzero().squeeze(1)
    if len(to_local) in (0, len(is_local)):
        return outputs(local if len(to_local) else global_, None)
    to_global = (~is_local).nonzero().squeeze(1)
    on_global = outputs(global_, to_global)
    merged = on_global.new_empty(len(is_local), *on_global.shape[1:])
    merged[to_global] = on_global
    merged[to_local] = outputs(local, to_local)
    return merged
