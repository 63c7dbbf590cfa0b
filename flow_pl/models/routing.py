"""One call of a backbone in which each block is the mixture of its two copies, instance by instance."""

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
    """The mixtures and decisions of one forward.

    Args:
        backbone: for messages.
        blocks: names of the routed blocks.
        route: decides for each block.
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
        """Compute a block's outputs on both copies, mixed as the route says.

        Args:
            name: of the block.
            block: the block.
            first: its parameters on the global copy.
            second: its parameters on the local copy.
            args: what it is called with; the first tensor is its input [N, ...].
            kwargs: as `args`.

        Raises:
            ConfigurationError: it was called before, gets or gives no tensor, or has other rows than instances.
        """
        given = tensors_in((args, kwargs))
        if name in self._decisions or not given:
            self._refuse(name, "is called without a tensor" if not given else "is called several times in a forward")
        h, asked = given[0], []

        def decide(inputs: Tensor, on_global: Tensor, on_local: Tensor) -> Tensor:
            q = self._route(self._blocks.index(name), inputs, on_global, on_local)
            asked.append(q)
            return one_hot_routes(q) if self._hard else q

        if isinstance(block, Recurrent):
            h = block.routed(h, first, second, decide)
            self._decisions[name] = torch.stack(asked, dim=1)
            return h
        # An exported program has no shapes that depend on the instances' routes; a GPU would be waited for.
        grouped = self._hard and self._ahead and not has_client_axis(h) and not torch.compiler.is_exporting()
        grouped = grouped and h.device.type == "cpu"
        if grouped and len(given) == 1:
            h = _taken(block, (args, kwargs), first, second, decide(h, h, h)[..., 1] > 0)
        else:
            on_global, on_local = call(block, first, args, kwargs), call(block, second, args, kwargs)
            if not isinstance(on_global, Tensor):
                self._refuse(name, f"gives a {type(on_global).__name__}, not a tensor")
            q = decide(h, on_global, on_local)
            if not torch.compiler.is_exporting() and on_global.shape[:1] != q.shape[:1]:
                self._refuse(name, f"gives outputs {list(on_global.shape)} for {len(q)} instances")
            q = q.reshape(*q.shape[:-1], *[1] * (on_global.ndim - q.ndim + 1), 2)
            if self._hard:
                h = torch.where(q[..., 1] > 0, on_local, on_global)
            else:
                h = q[..., 0] * on_global + q[..., 1] * on_local
            h = h.to(_dtype(first))
        self._decisions[name] = asked[0]
        return h

    def probabilities(self) -> Tensor:
        """The probabilities of all blocks, in their order: [N, blocks, 2] or [N, T, blocks, 2].

        Raises:
            ConfigurationError: a block has not been called.
        """
        for name in self._blocks:
            if name not in self._decisions:
                self._refuse(name, "is never called in a forward")
        decisions = [self._decisions[name] for name in self._blocks]
        most = max(q.ndim for q in decisions)
        shape = max(q.shape for q in decisions if q.ndim == most)
        # a decision per instance holds for each of its tokens
        per_token = [q if q.ndim == most else q.unsqueeze(1).expand(shape) for q in decisions]
        return torch.stack(per_token, dim=-2)

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise ConfigurationError(
            f"{named(self._backbone, name)} {what}, expected a block that is called once with a tensor and gives one, "
            "with a row for each instance, so that its two copies can be mixed: name other submodules in model.blocks."
        )


def named(backbone: nn.Module, name: str) -> str:
    """How messages call a block."""
    return f"block '{name}' ({type(backbone.get_submodule(name)).__name__}) of the backbone"


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of a call's arguments, in their order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def one_hot_routes(q: Tensor) -> Tensor:
    """Route hard: 1 for the more probable branch, the global one in a tie.

    Args:
        q: probabilities [..., 2], (global, local).
    """
    local = (q[..., 1] > q[..., 0]).to(q.dtype)
    return torch.stack([1 - local, local], dim=-1)


def _dtype(parameters: Parameters) -> torch.dtype:
    """Return a block's dtype outside autocast: routing probabilities are float32, whatever its weights are."""
    return next(iter(parameters.values())).dtype


def _taken(block: nn.Module, given: Any, global_: Parameters, local: Parameters, way: Tensor) -> Tensor:
    """Compute a block's outputs for its one input h [N, ...], each by its branch: way [N] bool, True for the local."""

    def outputs(parameters: Parameters, rows: Tensor | None) -> Tensor:
        args, kwargs = given
        if rows is not None:
            args, kwargs = pytree.tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, given)
        out: Tensor = call(block, parameters, args, kwargs)
        return out

    to_local = way.nonzero().squeeze(1)
    if len(to_local) in (0, len(way)):
        return outputs(local if len(to_local) else global_, None)
    to_global = (~way).nonzero().squeeze(1)
    on_global = outputs(global_, to_global)
    merged = on_global.new_empty(len(way), *on_global.shape[1:])
    merged[to_global] = on_global
    merged[to_local] = outputs(local, to_local)
    return merged
