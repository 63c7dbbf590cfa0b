"""The dynamic personalized model w_p: two copies of each block, mixed per instance (Panchal et al., NeurIPS 2023).

Everything here is written for ONE client and is functional: parameters come in as groups, so that the federated
loop can vectorise over clients and take gradients of one group alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flow_pl.errors import ConfigurationError, require_fraction, require_positive

Parameters = dict[str, Tensor]
"""Parameters of one copy of a module by name."""
Groups = dict[str, Parameters]
"""Parameter groups by name: "global" (w_g), "local" (w_l), "router" (psi), ...."""


class Router(nn.Module):
    """Decides, for every instance and routed block, between the global and the local parameters.

    `forward` maps instances [N, ...] to probabilities [N, blocks, 2], (global, local), which sum to 1.
    """


class InstanceRouter(Router):
    """An MLP over the flattened instance with one early exit per routed block.

    Exit i is a 2-way softmax on hidden layer i; blocks beyond the last hidden layer share it, and where there are
    fewer blocks than layers the exits sit on the last ones.

    Args:
        blocks: number of routed blocks, given by the method.
        hidden: widths of the hidden layers (published for EMNIST: 350, 150, 50).
        dropout: share of hidden units dropped in training; none in evaluation (published: 0.3).
    """

    def __init__(self, blocks: int, hidden: Sequence[int] = (350, 150, 50), dropout: float = 0.3) -> None:
        super().__init__()
        if not hidden:
            raise ConfigurationError("the router's hidden is empty, expected at least one width, e.g. [64].")
        require_positive(**{f"the router's hidden[{i}]": width for i, width in enumerate(hidden)})
        require_fraction(**{"the router's dropout": dropout})
        # The first layer takes its width from the first instance it sees, in FederatedModule.setup.
        first = nn.LazyLinear(hidden[0])
        rest = [nn.Linear(a, b) for a, b in pairwise(hidden)]
        self.layers = nn.ModuleList([first, *rest])
        self.dropout = nn.Dropout(dropout)
        skip = max(0, len(hidden) - blocks)
        self._exit_of_layer = [min(i + skip, len(hidden) - 1) for i in range(blocks)]
        self.exits = nn.ModuleList([nn.Linear(hidden[layer], 2) for layer in self._exit_of_layer])

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities [N, blocks, 2] for instances x [N, ...]."""
        h = x.flatten(1)
        if not h.is_floating_point():
            h = h.float()
        hidden = []
        for layer in self.layers:
            h = self.dropout(layer(h).relu())
            hidden.append(h)
        logits = [head(hidden[layer]) for head, layer in zip(self.exits, self._exit_of_layer, strict=True)]
        return torch.stack(logits, dim=1).float().softmax(-1)


class RoutedModel:
    """A backbone whose blocks exist twice, global and local.

    Owns no parameters. The backbone never mentions global, local or router: its children are the blocks, in order.
    A child with parameters is routed; a child without any (activation, pooling, dropout) is applied once, behind the
    mixture. Embedding tables are not routed: they belong to the global group alone.

    Args:
        backbone: a `torch.nn.Sequential`; nested modules are one block each.

    Raises:
        ConfigurationError: the backbone is not a Sequential, has nothing to route, or keeps running statistics.
    """

    def __init__(self, backbone: nn.Module) -> None:
        if not isinstance(backbone, nn.Sequential):
            raise ConfigurationError(
                f"the backbone is a {type(backbone).__name__}, expected a torch.nn.Sequential whose children are the "
                "blocks to route: derive it from nn.Sequential."
            )
        for name, module in backbone.named_modules():
            if getattr(module, "track_running_stats", False):
                raise ConfigurationError(
                    f"block '{name}' of the backbone is a {type(module).__name__} with running statistics, which many "
                    "clients trained side by side cannot share: use nn.GroupNorm."
                )
        self.backbone = backbone
        self._names = {name: [key for key, _ in block.named_parameters()] for name, block in backbone.named_children()}
        self.blocks = [
            name
            for name, block in backbone.named_children()
            if self._names[name] and not isinstance(block, nn.Embedding)
        ]
        if not self.blocks:
            raise ConfigurationError(f"the backbone {type(backbone).__name__} has no block with parameters to train.")
        self.local_names = [f"{block}.{key}" for block in self.blocks for key in self._names[block]]

    def local_copy(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """The part of a model's parameters that has a local copy: all but the embedding tables."""
        return {name: parameters[name] for name in self.local_names}

    def plain(self, x: Tensor, *groups: Parameters) -> Tensor:
        """The backbone's outputs under the union of parameter groups; later ones win."""
        merged = groups[0] if len(groups) == 1 else {k: v for group in groups for k, v in group.items()}
        outputs: Tensor = functional_call(self.backbone, merged, (x,))
        return outputs

    def routed(self, x: Tensor, global_: Parameters, local: Parameters, q: Tensor) -> Tensor:
        """The dynamic model's outputs: h <- q_global * B_global(h) + q_local * B_local(h), before the non-linearity.

        Args:
            x: instances [N, ...].
            global_: parameters of the global copy.
            local: parameters of the local copy (routed blocks only).
            q: probabilities or one-hot choices [N, blocks, 2], (global, local).
        """
        h = x
        routed = 0
        for name, block in self.backbone.named_children():
            names = self._names[name]
            if not names:
                h = block(h)
                continue
            on_global = functional_call(block, {k: global_[f"{name}.{k}"] for k in names}, (h,))
            if name not in self.blocks:
                h = on_global
                continue
            on_local = functional_call(block, {k: local[f"{name}.{k}"] for k in names}, (h,))
            share = q[:, routed].reshape(len(q), 2, *[1] * (on_global.ndim - 1))
            h = share[:, 0] * on_global + share[:, 1] * on_local
            routed += 1
        return h


def one_hot_routes(q: Tensor) -> Tensor:
    """Hard routing: 1 for the more probable way of each instance and block, global where both are equal.

    Args:
        q: probabilities [N, blocks, 2].
    """
    local = (q[..., 1] > q[..., 0]).to(q.dtype)
    return torch.stack([1 - local, local], dim=-1)


def routing_regularizer(
    q: Tensor, mask: Tensor, epsilon: float, encourage: Literal["local", "global"] = "local"
) -> Tensor:
    """Mean over real instances and routed blocks of -log(q^2 + eps).

    Keeps the router from collapsing onto the other path.

    Args:
        q: probabilities [N, blocks, 2], (global, local).
        mask: [N], 1 where the instance is real.
        epsilon: floor inside the logarithm (published: 1e-6).
        encourage: which probability is pushed up.
    """
    chosen = q[..., 1 if encourage == "local" else 0]
    per_instance = -(chosen.square() + epsilon).log().mean(-1)
    weight = mask.to(per_instance.dtype)
    return (per_instance * weight).sum() / weight.sum().clamp_min(1.0)
