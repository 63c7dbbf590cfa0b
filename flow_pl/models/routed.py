"""The dynamic personalized model w_p: two copies of each block, mixed per instance (Panchal et al., NeurIPS 2023).

Everything here is functional and written for ONE client: parameters are passed in as groups, so that the federated
loop can vectorize over clients and differentiate with respect to a single group. docs/concepts.md defines the symbols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from flow_pl.errors import ConfigurationError
from flow_pl.kernels.functional import call, intercepted
from flow_pl.models.blocks import automatic_blocks, check_parameters, is_chain, named_blocks, trained
from flow_pl.models.routers import Route
from flow_pl.models.routing import Routing, named, one_hot_routes, tensors_in
from flow_pl.utils.groups import Parameters
from flow_pl.utils.inputs import Inputs

__all__ = ["RoutedModel", "one_hot_routes"]


class RoutedModel:
    """Evaluates a backbone with two copies of each block: a global and a local branch.

    Owns no parameters. The backbone never mentions global, local or router: its blocks are submodules, and a block's
    second copy is computed where the backbone calls it, inside any control flow. Modules outside of blocks,
    such as activations, are applied once, after the mixture; their parameters belong to the global group alone, as
    embedding tables do. Frozen parameters (`requires_grad` is False) are in no group; both branches use the backbone's.

    Args:
        backbone: any module that returns a tensor.
        blocks: names of the submodules to route; None to choose them by `flow_pl.models.blocks.automatic_blocks`.

    Attributes:
        blocks: names of the blocks.
        local_names: names of the parameters that have a local copy.
        chosen: whether the blocks are not simply the children of a plain Sequential.

    Raises:
        ConfigurationError: a name is not that of a block, parameters are shared or none is trained, or a layer keeps
            running statistics.
    """

    def __init__(self, backbone: nn.Module, blocks: Sequence[str] | None = None) -> None:
        check_parameters(backbone)
        self.backbone = backbone
        self.blocks = automatic_blocks(backbone) if blocks is None else named_blocks(backbone, blocks)
        self.chosen = not is_chain(backbone) or self.blocks != automatic_blocks(backbone)
        parts = self.blocks
        if not self.chosen:
            # not named_children, which skips a block that occurs twice, such as an activation used everywhere
            parts = [name for name, block in backbone._modules.items() if block is not None]
        self._parts = {name: backbone.get_submodule(name) for name in parts}
        self._names = {name: trained(part) for name, part in self._parts.items()}
        self._trained = trained(backbone)
        # a module that is itself a single block: everything
        local = [f"{block}.{key}" for block in self.blocks for key in self._names[block]]
        self.local_names = local or self._trained
        if not self._trained or not (self.blocks or self.chosen):
            raise ConfigurationError(
                f"the backbone {type(backbone).__name__} has no block with trainable parameters, beside embedding "
                "tables and what is frozen (requires_grad=False): give it one."
            )
        self._ends: bool | None = None

    def local_copy(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """Return the parameters that have a local copy: those of the blocks."""
        return {name: parameters[name] for name in self.local_names}

    def block_modules(self, user: str) -> list[nn.Module]:
        """Return the blocks.

        Args:
            user: name of the method or module that needs them, for the message.

        Raises:
            ConfigurationError: there are none.
        """
        if not self.blocks:
            raise ConfigurationError(
                f"{user} needs blocks, and the backbone {type(self.backbone).__name__} has no submodule with "
                "parameters that could be one: put its layers into modules, or use a method without, such as FedAvg."
            )
        return [self._parts[name] for name in self.blocks]

    def initialize(self, x: Inputs) -> None:
        """Call the backbone on instances, which initializes lazy modules; check whether it ends with its last block."""
        if not self.chosen or not self.blocks:
            self.backbone(x)
            return
        calls: list[tuple[bool, Any]] = []

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append((len(args) == 1 and not kwargs and isinstance(args[0], Tensor), output))

        hook = self._parts[self.blocks[-1]].register_forward_hook(leave, with_kwargs=True)
        try:
            outputs = self.backbone(x)
        finally:
            hook.remove()
        self._ends = len(calls) == 1 and calls[0][0] and calls[0][1] is outputs

    def plain(self, x: Inputs, *groups: Parameters) -> Tensor:
        """Compute the backbone's outputs with the union of parameter groups; later groups take precedence."""
        merged = groups[0] if len(groups) == 1 else {k: v for group in groups for k, v in group.items()}
        outputs: Tensor = call(self.backbone, merged, (x,))
        return outputs

    def body_and_head(self, head_blocks: int | Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the parameter names of the representation (embedding tables too) and of the head.

        Args:
            head_blocks: number of last blocks that form the head, or names of its submodules.

        Raises:
            ConfigurationError: a name is not that of a submodule, or nothing would be left for the body.
        """
        kind = type(self.backbone).__name__
        if isinstance(head_blocks, int):
            most = len(self.blocks) - 1
            if not 1 <= head_blocks <= most:
                raise ConfigurationError(
                    f"head_blocks is {head_blocks}, expected 1 to {most}: {kind} has "
                    f"{len(self.blocks)} blocks with parameters, and body and head need at least one each."
                )
            names = self.blocks[-head_blocks:]
        else:
            names = named_blocks(self.backbone, head_blocks, "head_blocks")
        head = [f"{name}.{key}" for name in names for key in trained(self.backbone.get_submodule(name))]
        body = [name for name in self._trained if name not in head]
        if not body:
            raise ConfigurationError(
                f"head_blocks names all trainable parameters of {kind} ({', '.join(names)}), but the body needs "
                "some: name fewer."
            )
        return body, head

    def features(self, x: Inputs, *groups: Parameters) -> Tensor:
        """Compute the input of the last block: the representation, [N, ...] or [N, T, ...].

        Raises:
            ConfigurationError: the backbone does not call its last block once with a tensor.
        """
        merged = {k: v for group in groups for k, v in group.items()}
        if self.chosen:
            return self._captured(x, {key: merged[key] for key in self._trained if key in merged})
        h: Any = x
        for name, block in self._parts.items():
            if name == self.blocks[-1]:
                break
            h = call(block, {key: merged[f"{name}.{key}"] for key in self._names[name]}, (h,))
        features: Tensor = h
        return features

    def _captured(self, x: Inputs, parameters: Parameters) -> Tensor:
        (*_, last) = self.block_modules("a representation")
        found: list[list[Tensor]] = []

        def capture(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found.append(tensors_in((args, kwargs)))
            return last.forward(*args, **kwargs)

        with intercepted({last: capture}):
            call(self.backbone, parameters, (x,))
        if len(found) != 1 or not found[0]:
            raise ConfigurationError(
                f"{named(self.backbone, self.blocks[-1])}, the last of model.blocks, is called {len(found)} times "
                "in a forward, expected once with a tensor, the representation: let model.blocks end with a module "
                "that is."
            )
        return found[0][0]

    def head(self, features: Tensor, *groups: Parameters) -> Tensor:
        """Compute the backbone's outputs from `features`: the last block with parameters and the modules after it.

        Raises:
            ConfigurationError: the last block's output is not the backbone's.
        """
        merged = {k: v for group in groups for k, v in group.items()}
        if self.chosen and self._ends is False:
            self.require_head("a method")
        names = list(self._parts)
        h = features
        for name in names[names.index(self.blocks[-1]) :]:
            h = call(self._parts[name], {key: merged[f"{name}.{key}"] for key in self._names[name]}, (h,))
        return h

    def require_head(self, user: str) -> None:
        """Check that the backbone's outputs are those of its last block, which `initialize` finds out.

        Args:
            user: name of the method or module that needs it, for the message.

        Raises:
            ConfigurationError: it does not.
        """
        if self.chosen and not self._ends:
            last = named(self.backbone, self.blocks[-1]) if self.blocks else "no block"
            raise ConfigurationError(
                f"{user} computes outputs from features by the head alone, but {last}, the last of model.blocks, "
                f"is not the end of {type(self.backbone).__name__}: expected one that is called once with one "
                "tensor, and whose output is the backbone's. Name it last in model.blocks, or use another method, such "
                "as FedPer."
            )

    def routed(
        self,
        x: Inputs,
        global_: Parameters,
        local: Parameters,
        route: Route,
        *,
        hard: bool = False,
        ahead: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Compute the dynamic model: h <- q_global * B_global(h) + q_local * B_local(h), before the non-linearity.

        Recurrent blocks mix their state (h, c) at every time step, and both branches continue from the mixture.

        Args:
            x: instances [N, ...].
            global_: parameters of the global copy.
            local: parameters of the local copy (routed blocks only).
            route: returns the probabilities of both branches for each block.
            hard: whether to take the more probable branch instead of mixing by the probabilities.
            ahead: whether the route is known before the block's outputs. Hard routing then computes only the branch
                that an instance is routed to, except under vmap, where instances cannot be grouped by route, and on a
                GPU, which would have to synchronize.

        Returns:
            The outputs, and the probabilities [N, blocks, 2] or, where blocks are routed per token, [N, T, blocks, 2].

        Raises:
            ConfigurationError: the backbone does not call each block once, or a block returns no tensor.
        """
        routing = Routing(self.backbone, self.blocks, route, hard, ahead)

        def copies(name: str) -> tuple[nn.Module, Parameters, Parameters]:
            keys = self._names[name]
            first, second = ({k: group[f"{name}.{k}"] for k in keys} for group in (global_, local))
            return self._parts[name], first, second

        if self.chosen:
            handlers = {self._parts[name]: partial(routing.mixed, name, *copies(name)) for name in self.blocks}
            with intercepted(handlers):
                outputs: Tensor = call(self.backbone, global_, (x,))
            return outputs, routing.probabilities()
        h: Any = x
        for name, block in self._parts.items():
            if name in self.blocks:
                h = routing.mixed(name, *copies(name), (h,), {})
            elif self._names[name]:
                h = call(block, {k: global_[f"{name}.{k}"] for k in self._names[name]}, (h,))
            else:
                h = block(h)
        return h, routing.probabilities()
