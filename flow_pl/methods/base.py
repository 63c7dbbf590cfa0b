"""What a federated algorithm is: groups of parameters, phases over a client's data, and steps on every minibatch.

A method is written for ONE client. It knows nothing of Lightning, of devices or of the client axis: the federated
loop vectorises its functions over clients and hands it one client's tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flow_pl.models.routed import RoutedModel
from flow_pl.tasks import Objective
from flow_pl.utils.groups import Groups, OptimizerFactory, Parameters
from flow_pl.utils.validation import given, require_count

Part = Literal["all", "local", "global"]


class Minibatch(NamedTuple):
    """Examples of one client.

    Attributes:
        x: features [B, ...].
        y: targets [B, ...].
        mask: [B] bool, False in the padding.
    """

    x: Tensor
    y: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step on a minibatch. It may be traced: what the objective reads must not change once it is made.

    Attributes:
        moves: the group that moves; every other one is frozen.
        objective: maps (groups, minibatch) to a scalar, whose gradient moves the group.
        lr_scale: factor on the client optimizer's learning rate.
        bounds: smallest and largest value that the group may take; it is clamped after each step.
        optimizer: makes the step's optimizer; None for the client optimizer.
    """

    moves: str
    objective: Callable[[Groups, Minibatch], Tensor]
    lr_scale: float = 1.0
    bounds: tuple[float, float] | None = None
    optimizer: OptimizerFactory | None = None


@dataclass(frozen=True, eq=False)
class Phase:
    """Epochs over a part of a client's training data, with the same steps, in order, on every minibatch.

    Epoch e of a phase visits its examples in the order e that was drawn for the client, whatever the phase, so that
    methods that make the same steps see the same minibatches.

    Attributes:
        part: which share of the data.
        epochs: passes over it.
        steps: what is done on each minibatch; every step has an optimizer of its own, fresh in each phase, and one
            that stands there several times is taken as often, with one optimizer.
        first_order: the order of the first epoch, for a phase that must not follow another one's minibatches.
    """

    part: Part
    epochs: int
    steps: tuple[Step, ...]
    first_order: int = 0


@dataclass(frozen=True, eq=False)
class Derive:
    """Groups computed once from a part of a client's training data, without gradients.

    Attributes:
        part: which share of the data.
        compute: maps (groups, examples) to new or replaced groups.
    """

    part: Part
    compute: Callable[[Groups, Minibatch], Groups]


@dataclass(frozen=True)
class Prediction:
    """Outputs of one client's models on its instances [N, ...].

    Attributes:
        generalized: of the server's model.
        personalized: of the client's personalized model.
        local: of the client's local model, where the method has one beside the personalized one (for the oracle).
        routes: [N, blocks] bool, True where an instance went through (or leans to) the local block.
        local_probability: in the shape of `routes`, the router's probabilities of the local blocks.
    """

    generalized: Tensor
    personalized: Tensor
    local: Tensor | None = None
    routes: Tensor | None = None
    local_probability: Tensor | None = None


class Method(ABC):
    """A federated algorithm.

    Subclasses say what a client does in a round (`training`) and what makes its personalized model
    (`personalization`), and predict with the groups that result.

    Args:
        local_epochs: epochs over a client's data in a round (E).
        personal_epochs: epochs when a client is personalized for evaluation; None for `local_epochs`.

    Attributes:
        shared: what clients send and the server averages: for a group of the server, the client's group that is its
            update. The client's may hold some of the server's parameters only; the others stay as they are.
        private: what a client keeps from one round to the next: for a group it starts a round with, the group whose
            value at the end of the round it keeps. A method without any is stateless. What `start` returns for these
            groups is for clients that have not been sampled yet.
        participation: name of a group with one scalar for each group of the server, a factor on the client's weight in
            the server's mean of that group (0: the client has no part in it); None where it is 1 for all.
        phases: what `training` returned when the method was bound.
        personal_phases: what `personalization` returned then.
        modules: the server's modules by group.
    """

    shared: Mapping[str, str] = MappingProxyType({"global": "global"})
    private: Mapping[str, str] = MappingProxyType({})
    participation: ClassVar[str | None] = None
    phases: tuple[Phase | Derive, ...]
    personal_phases: tuple[Phase | Derive, ...]

    def __init__(self, local_epochs: int = 3, personal_epochs: int | None = None) -> None:
        require_count(local_epochs=local_epochs, **given(personal_epochs=personal_epochs))
        self.local_epochs = local_epochs
        self.personal_epochs = local_epochs if personal_epochs is None else personal_epochs

    def bind(self, backbone: nn.Module, objective: Objective) -> dict[str, nn.Module]:
        """Bind the method to a backbone and a task. Called once, by the FederatedModule.

        Returns:
            The server's modules by group; the FederatedModule owns their parameters.
        """
        self.model = RoutedModel(backbone)
        self.objective = objective
        self.modules = {"global": backbone, **self.server_modules()}
        # Lazy modules are initialised later, when the data is known: by a seed of now, not by whatever was drawn since.
        self.lazy_seed = int(torch.randint(2**31, ()))
        self.phases = self.training()
        self.personal_phases = self.personalization()
        return self.modules

    @property
    def epochs(self) -> int:
        """How many minibatch orders a client needs."""
        stages = (*self.phases, *self.personal_phases)
        return max([1, *(stage.first_order + stage.epochs for stage in stages if isinstance(stage, Phase))])

    @property
    def route_names(self) -> list[str]:
        """Names of the routed blocks, in the order of `Prediction.routes`; empty for a method that does not route."""
        return []

    def server_modules(self) -> dict[str, nn.Module]:
        """Modules of the server beside the backbone, by group (Flow's router)."""
        return {}

    def initialize(self, x: Tensor) -> None:
        """Give lazy modules of the server their shapes, by instances x [N, ...]."""
        self.modules["global"](x)

    def start(self, server: Groups) -> Groups:
        """The groups at the start of a round of a client that keeps nothing or has not been sampled yet.

        They may alias the server's, which are never written.
        """
        return dict(server)

    def initial_state(self, server: Groups) -> Groups:
        """What a client that has not been sampled yet has in the groups that clients keep."""
        start = self.start(server)
        return {name: start[name] for name in self.private}

    def personalized(self, groups: Groups, x: Tensor) -> Tensor:
        """Outputs of the personalized model alone, for serving it."""
        return self.predict(groups, x).personalized

    @abstractmethod
    def training(self) -> tuple[Phase | Derive, ...]:
        """What a sampled client does in a round."""

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """What makes a client's personalized model from the server's groups; nothing where there is none."""
        return ()

    def predict(self, groups: Groups, x: Tensor) -> Prediction:
        """Outputs for one client's instances x [N, ...], in evaluation mode.

        `groups["global"]` is the server's model, untouched. Without a personal model, personalized = generalized.
        """
        outputs = self.model.plain(x, groups["global"])
        return Prediction(outputs, outputs)

    def loss(self, minibatch: Minibatch, *parameters: Parameters) -> Tensor:
        """The task's loss of the backbone under the union of parameter groups; later ones win."""
        return self.objective.loss(self.model.plain(minibatch.x, *parameters), minibatch.y, minibatch.mask)

    def train_step(self, group: str) -> Step:
        """A step on the task's loss of the backbone under `group` (over the global embedding tables)."""
        return Step(group, lambda groups, minibatch: self.loss(minibatch, groups["global"], groups[group]))
