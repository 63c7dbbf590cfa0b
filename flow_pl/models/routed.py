"""The dynamic personalized model w_p: two copies of each block, mixed per instance (Panchal et al., NeurIPS 2023).

Everything here is written for ONE client and is functional: parameters are passed in as groups, so that the federated
loop can vectorise over clients and differentiate with respect to a single group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flow_pl.errors import ConfigurationError
from flow_pl.kernels.functional import call
from flow_pl.models.recurrent import Recurrent, has_client_axis
from flow_pl.models.routers import Route
from flow_pl.utils.groups import Parameters


class RoutedModel:
    """Evaluates a backbone whose blocks exist twice: a global and a local branch.

    Owns no parameters. The backbone never mentions global, local or router: its children are the blocks, in order.
    A child with parameters is routed; a child without any (activation, pooling, dropout) is applied once, after the
    mixture. Embedding tables are not routed: they belong to the global group alone. Frozen parameters
    (`requires_grad` is False) are ignored: they are in no group, and both branches use the backbone's own.

    Args:
        backbone: a `torch.nn.Sequential`; nested modules are one block each.

    Raises:
        ConfigurationError: the backbone is not a plain Sequential, shares parameters, has nothing to route, or keeps
            running statistics.
    """

    def __init__(self, backbone: nn.Module) -> None:
        if not isinstance(backbone, nn.Sequential):
            raise ConfigurationError(
                f"the backbone is a {type(backbone).__name__}, expected a torch.nn.Sequential whose children are the "
                "blocks to route: derive it from nn.Sequential."
            )
        if type(backbone).forward is not nn.Sequential.forward or backbone._parameters:
            raise ConfigurationError(
                f"the backbone {type(backbone).__name__} has a forward or parameters of its own, expected what "
                "nn.Sequential does, block after block: move them into a block."
            )
        names = [name for name, _ in backbone.named_parameters(remove_duplicate=False)]
        if len(names) != len(list(backbone.parameters())):
            shared = sorted(set(names) - {name for name, _ in backbone.named_parameters()})
            raise ConfigurationError(
                f"the backbone {type(backbone).__name__} uses a parameter twice ({', '.join(shared)}), expected every "
                "block to have its own, or there is nothing to route between."
            )
        for name, module in backbone.named_modules():
            if getattr(module, "track_running_stats", False):
                raise ConfigurationError(
                    f"block '{name}' of the backbone is a {type(module).__name__} with running statistics, which many "
                    "clients trained side by side cannot share: use nn.GroupNorm."
                )
        self.backbone = backbone
        # not named_children, which skips a block that occurs twice (one activation for all, say)
        self._blocks = {name: block for name, block in backbone._modules.items() if block is not None}
        self._names = {
            name: [key for key, p in block.named_parameters() if p.requires_grad]
            for name, block in self._blocks.items()
        }
        self.blocks = [
            name for name, block in self._blocks.items() if self._names[name] and not isinstance(block, nn.Embedding)
        ]
        if not self.blocks:
            raise ConfigurationError(
                f"the backbone {type(backbone).__name__} has no block with parameters to train, beside embedding "
                "tables and what is frozen (requires_grad=False): give it one."
            )
        self.local_names = [f"{block}.{key}" for block in self.blocks for key in self._names[block]]

    def local_copy(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """Return the parameters that have a local copy: all but the embedding tables."""
        return {name: parameters[name] for name in self.local_names}

    def plain(self, x: Tensor, *groups: Parameters) -> Tensor:
        """Compute the backbone's outputs under the union of parameter groups; later ones win."""
        merged = groups[0] if len(groups) == 1 else {k: v for group in groups for k, v in group.items()}
        outputs: Tensor = call(self.backbone, merged, (x,))
        return outputs

    def body_and_head(self, head_blocks: int) -> tuple[list[str], list[str]]:
        """Return the parameter names of the representation (embedding tables too) and of the last blocks.

        Args:
            head_blocks: how many of the last blocks with parameters are the head.

        Raises:
            ConfigurationError: no block would be left for the body.
        """
        most = len(self.blocks) - 1
        if not 1 <= head_blocks <= most:
            raise ConfigurationError(
                f"head_blocks is {head_blocks}, expected 1 to {most}: {type(self.backbone).__name__} has "
                f"{len(self.blocks)} blocks with parameters, and body and head need at least one each."
            )
        head = [f"{block}.{key}" for block in self.blocks[-head_blocks:] for key in self._names[block]]
        body = [f"{block}.{key}" for block, keys in self._names.items() for key in keys]
        return [name for name in body if name not in head], head

    def features(self, x: Tensor, *groups: Parameters) -> Tensor:
        """Compute the input of the last block with parameters: the representation, [N, ...] or [N, T, ...]."""
        merged = {k: v for group in groups for k, v in group.items()}
        h = x
        for name, block in self._blocks.items():
            if name == self.blocks[-1]:
                break
            h = call(block, {key: merged[f"{name}.{key}"] for key in self._names[name]}, (h,))
        return h

    def head(self, features: Tensor, *groups: Parameters) -> Tensor:
        """Compute the backbone's outputs from `features`: the last block with parameters and those after it."""
        merged = {k: v for group in groups for k, v in group.items()}
        names = list(self._blocks)
        h = features
        for name in names[names.index(self.blocks[-1]) :]:
            h = call(self._blocks[name], {key: merged[f"{name}.{key}"] for key in self._names[name]}, (h,))
        return h

    def routed(
        self,
        x: Tensor,
        global_: Parameters,
        local: Parameters,
        route: Route,
        *,
        hard: bool = False,
        ahead: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The dynamic model: h <- q_global * B_global(h) + q_local * B_local(h), before the non-linearity.

        Recurrent blocks mix their state (h, c) at every time step, and both branches continue from the mixture.

        Args:
            x: instances [N, ...].
            global_: parameters of the global copy.
            local: parameters of the local copy (routed blocks only).
            route: decides for each block.
            hard: whether to take the more probable branch instead of mixing by the probabilities.
            ahead: whether the route is known before the block's outputs. Then hard routing computes, for each
                instance, only the branch it is routed to, unless many clients are vectorised: their instances
                cannot be grouped by route.

        Returns:
            The outputs, and the probabilities [N, blocks, 2] or, where blocks are routed per token, [N, T, blocks, 2].
        """
        h = x
        decisions: list[Tensor] = []

        def decide(inputs: Tensor, on_global: Tensor, on_local: Tensor) -> Tensor:
            q = route(len(decisions), inputs, on_global, on_local)
            asked.append(q)
            return one_hot_routes(q) if hard else q

        for name, block in self._blocks.items():
            names = self._names[name]
            if not names:
                h = block(h)
                continue
            first = {k: global_[f"{name}.{k}"] for k in names}
            if name not in self.blocks:
                h = call(block, first, (h,))
                continue
            second = {k: local[f"{name}.{k}"] for k in names}
            asked: list[Tensor] = []
            if isinstance(block, Recurrent):
                h = block.routed(h, first, second, decide)
                decisions.append(torch.stack(asked, dim=1))
            else:
                # an exported program has no shapes that depend on the instances' routes
                if hard and ahead and not has_client_axis(h) and not torch.compiler.is_exporting():
                    h = _taken(block, h, first, second, decide(h, h, h)[..., 1] > 0)
                else:
                    on_global, on_local = call(block, first, (h,)), call(block, second, (h,))
                    q = decide(h, on_global, on_local)
                    q = q.reshape(*q.shape[:-1], *[1] * (on_global.ndim - q.ndim + 1), 2)
                    if hard:
                        h = torch.where(q[..., 1] > 0, on_local, on_global)
                    else:
                        h = q[..., 0] * on_global + q[..., 1] * on_local
                    h = h.to(_dtype(first))
                decisions.append(asked[0])
        most = max(q.ndim for q in decisions)
        shape = max(q.shape for q in decisions if q.ndim == most)
        # a decision per instance holds for each of its tokens
        per_token = [q if q.ndim == most else q.unsqueeze(1).expand(shape) for q in decisions]
        return h, torch.stack(per_token, dim=-2)


def _dtype(parameters: Parameters) -> torch.dtype:
    """Return a block's dtype outside autocast: routing probabilities are float32, whatever its weights are."""
    return next(iter(parameters.values())).dtype


def _taken(block: nn.Module, h: Tensor, global_: Parameters, local: Parameters, way: Tensor) -> Tensor:
    """Compute a block's outputs for inputs h [N, ...], each by its branch: way [N] bool, True for the local."""
    to_local = way.nonzero().squeeze(1)
    if len(to_local) in (0, len(h)):
        outputs: Tensor = call(block, local if len(to_local) else global_, (h,))
        return outputs
    to_global = (~way).nonzero().squeeze(1)
    on_global = call(block, global_, (h[to_global],))
    outputs = on_global.new_empty(len(h), *on_global.shape[1:])
    outputs[to_global] = on_global
    outputs[to_local] = call(block, local, (h[to_local],))
    return outputs


def one_hot_routes(q: Tensor) -> Tensor:
    """Route hard: 1 for the more probable branch, the global one in a tie.

    Args:
        q: probabilities [..., 2], (global, local).
    """
    local = (q[..., 1] > q[..., 0]).to(q.dtype)
    return torch.stack([1 - local, local], dim=-1)
