"""Flow: Panchal et al., Per-Instance Personalized Federated Learning Through Dynamic Routing (NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from flow_pl.errors import ConfigurationError
from flow_pl.methods.base import Method, Prediction
from flow_pl.methods.parts.pieces import pieces
from flow_pl.methods.parts.regularizers import routing_regularizer
from flow_pl.methods.steps import Derive, Minibatch, Part, Phase, Step
from flow_pl.models.fitting_router import fitting_router
from flow_pl.models.routed import one_hot_routes
from flow_pl.models.routers import Route, Router
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs, described, first
from flow_pl.utils.validation import require_at_least_zero, require_choice, require_positive


class Flow(Method):
    """Trains on each client a local model w_l, a router psi between it and w_g, and w_g itself.

    Sends w_g and the router. Stateless. The defaults suit clients with few examples; the published
    settings are `split: parts`, `encourage: local`, `routing: hard` and a `regularization` of 0.01 (EMNIST) or 0.001.

    Args:
        regularization: weight of the routing regularizer (lambda); 0 for none.
        encourage: the branch that the regularizer favours. "local" keeps the router from collapsing onto the better
            trained global branch; "global" suits a router trained on data that the local model has seen.
        split: how the data are divided between the models. "parts" (published): one half trains the local model, the
            other the router and w_g. "none": everything is trained on all the data. "cross": the router is trained on
            one half against a local model that saw only the other, w_g on all the data (exactly as FedAvg), and the
            local model that predicts on all the data.
        routing: how the personalized model mixes in evaluation: "hard" takes the more probable branch, "soft" mixes by
            the probabilities, as in training.
        route_by: "instance", or "client" for one route per client, decided by the mean of the client's instances.
        train_global: "own" trains w_g on its own outputs; "routed" trains it through the personalized model.
        adapt_router: whether the router is trained when a client is personalized.
        router: creates the router from the routed blocks; by default a SequenceRouter for recurrent blocks, a
            FeatureRouter for a backbone with an embedding table, and an InstanceRouter for others.
        router_lr_scale: factor on the client optimizer's learning rate for the router.
        personal_lr_scale: factor on the client optimizer's learning rate for the local model.
    """

    shared = MappingProxyType({"global": "global", "router": "router"})
    scratch: ClassVar[tuple[str, ...]] = ("probe",)
    training_only: ClassVar[tuple[str, ...]] = (*Method.training_only, "make_router")

    def __init__(
        self,
        regularization: float = 0.1,
        encourage: Literal["local", "global"] = "global",
        split: Literal["parts", "none", "cross"] = "none",
        routing: Literal["hard", "soft"] = "soft",
        route_by: Literal["instance", "client"] = "instance",
        train_global: Literal["own", "routed"] = "own",
        adapt_router: bool = True,
        router: Callable[[Sequence[nn.Module]], Router] = fitting_router,
        router_lr_scale: float = 1.0,
        personal_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(personal_lr_scale)
        require_positive(router_lr_scale=router_lr_scale)
        require_at_least_zero(regularization=regularization)
        require_choice(("local", "global"), encourage=encourage)
        require_choice(("parts", "none", "cross"), split=split)
        require_choice(("hard", "soft"), routing=routing)
        require_choice(("instance", "client"), route_by=route_by)
        require_choice(("own", "routed"), train_global=train_global)
        self.regularization = regularization
        self.encourage: Literal["local", "global"] = encourage
        self.split = split
        self.routing = routing
        self.route_by = route_by
        self.train_global = train_global
        self.adapt_router = adapt_router
        self.make_router = router
        self.router_lr_scale = router_lr_scale

    @property
    def route_names(self) -> list[str]:
        """Return the names of the routed blocks."""
        return self.model.blocks

    def server_modules(self) -> dict[str, nn.Module]:
        """Return the router, which the server averages like w_g."""
        blocks, make = self.model.block_modules(type(self).__name__), self.make_router
        self.router = make(blocks, self.model.backbone) if make is fitting_router else make(blocks)
        self._routed_blocks = self.model.blocks
        return {"router": self.router}

    def prepare(self) -> None:
        """Check the router.

        Raises:
            ConfigurationError: `route_by` is "client" with a router that decides by the blocks' outputs for an
                instance, or the router does not fit the blocks.
        """
        if self._routed_blocks != self.model.blocks:
            raise ConfigurationError(
                f"the router was created for the blocks {self._routed_blocks}, but those that are not frozen are "
                f"{self.model.blocks}: freeze parameters (requires_grad=False) before the FederatedModule is created."
            )
        if self.route_by == "client" and self.router.sees_outputs:
            raise ConfigurationError(
                f"route_by is 'client', but {type(self.router).__name__} decides by the outputs of the blocks, which "
                "only instances have: set route_by to 'instance', or use FeatureRouter."
            )

    def initialize(self, x: Inputs) -> None:
        """Route the instances once with the server's parameters, which initializes lazy modules."""
        super().initialize(x)
        w_g: Parameters = dict(self.model.backbone.named_parameters())
        seen = self.router.look(self.model, w_g, x)
        if self.route_by == "client":
            _one_tensor(seen)
        self.model.routed(x, w_g, self.model.local_copy(w_g), self.router.bind(None, seen))

    def start(self, server: Groups) -> Groups:
        """Return w_g and psi, a local model initialized from w_g, and for `cross` a probe trained on half the data."""
        local = self.model.local_copy(server["global"])
        return {**server, "local": local, **({"probe": dict(local)} if self.split == "cross" else {})}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Run Algorithm 1: train the local model, then the router and w_g in turn on every minibatch."""
        first, second = self._parts()
        move_global = self.train_step("global") if self.train_global == "own" else self._routed_step("global")
        local = Phase(first, (self._local_step(self._opponent),))
        if self.split != "cross":
            both = Phase(second, (self._routed_step("router"), move_global))
            return (*self._client_features(), local, both)
        router = Phase(second, (self._routed_step("router"),))
        return (*self._client_features(), local, router, Phase("all", (move_global,)))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Train the local model and the router, w_g fixed; for `cross`, then a local model on all the data."""
        first, second = self._parts()
        local = Phase(first, (self._local_step(self._opponent),))
        router = Phase(second, (self._routed_step("router"),))
        whole = Phase("all", (self._local_step("local"),))
        if self.split == "cross":
            stages = ((local, router) if self.adapt_router else ()) + (whole,)
        else:
            stages = (local, router) if self.adapt_router else (local,)
        return (*self._client_features(), *stages)

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with w_g, the routed model and the local model."""
        personalized, q = self._routed(groups, x)
        return Prediction(
            generalized=self.model.plain(x, groups["global"]),
            personalized=personalized,
            local=self.model.plain(x, groups["global"], groups["local"]),
            routes=one_hot_routes(q)[..., 1].bool(),
            local_probability=q[..., 1],
        )

    def personal(self, groups: Groups) -> Parameters | None:
        """Return None: every instance takes its own route through two models."""
        return None

    def personalized(self, groups: Groups, x: Inputs) -> Tensor:
        """Compute the outputs of the routed model alone."""
        return self._routed(groups, x)[0]

    def local_probability(self, groups: Groups, x: Inputs) -> Tensor:
        """See `Method.local_probability`."""
        return self._routed(groups, x)[1][..., 1]

    def _routed(self, groups: Groups, x: Inputs) -> tuple[Tensor, Tensor]:
        """Compute the routed model's outputs in evaluation, and its routing probabilities."""
        route, hard = self._route(groups, x), self.routing == "hard"
        ahead = not self.router.sees_outputs
        return self.model.routed(x, groups["global"], groups["local"], route, hard=hard, ahead=ahead)

    @property
    def _opponent(self) -> str:
        """Return the local model that the router is trained against."""
        return "probe" if self.split == "cross" else "local"

    def _parts(self) -> tuple[Part, Part]:
        """Return the parts of the data for the local model and the router (zeta_l, zeta_g)."""
        return ("all", "all") if self.split == "none" else ("local", "global")

    def _local_step(self, group: str) -> Step:
        """Create a step of a local model on its own outputs."""
        return self.personal_step(self.train_step(group))

    def _routed_step(self, moves: str) -> Step:
        """Create a step on f(w_p) with soft routing and a local model; for the router, with its regularizer."""
        # Fixed when the method is bound: a traced step could not follow a change.
        opponent, encourage = self._opponent, self.encourage
        regularization = self.regularization if moves == "router" else 0.0

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            route = self._route(groups, minibatch.x)
            outputs, q = self.model.routed(minibatch.x, groups["global"], groups[opponent], route)
            task = self.objective.loss(outputs, minibatch.y, minibatch.mask)
            if not regularization:
                return task
            decided = self.objective.decided(minibatch.y, minibatch.mask, q.shape[:-2])
            regularizer = routing_regularizer(q, decided, encourage=encourage)
            return task + regularization * regularizer

        return Step(moves, loss, self.router_lr_scale if moves == "router" else 1.0)

    def _route(self, groups: Groups, x: Inputs) -> Route:
        """Route the instances x [N, ...]."""
        if self.route_by == "instance":
            return self.router.bind(groups["router"], self.router.look(self.model, groups["global"], x))
        one = self.router.bind(groups["router"], groups["features"]["mean"].unsqueeze(0))
        return lambda block, *tensors: one(block, *tensors).expand(first(x).shape[0], 2)

    def _client_features(self) -> tuple[Derive, ...]:
        """Compute the mean of the client's features, if routing is per client."""

        def mean(groups: Groups, examples: Minibatch) -> Groups:
            weight = examples.mask.float()
            looks = [self.router.look(self.model, groups["global"], piece.x) for piece in pieces(examples)]
            seen = torch.cat([_one_tensor(look) for look in looks]).float()
            total = (seen * weight.reshape(-1, *[1] * (seen.ndim - 1))).sum(0)
            return {"features": {"mean": total / weight.sum().clamp_min(1.0)}}

        return (Derive("all", mean),) if self.route_by == "client" else ()


def _one_tensor(look: Inputs) -> Tensor:
    if isinstance(look, dict):
        raise ConfigurationError(
            f"route_by is client, which routes by the mean instance, but the router sees several features by "
            f"name ({described(look)}), which have none: set it to instance, or use FeatureRouter."
        )
    return look
