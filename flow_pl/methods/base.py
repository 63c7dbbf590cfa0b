"""Defines a federated algorithm: groups of parameters, phases over a client's data, and steps on every minibatch.

A method is written for ONE client and does not depend on Lightning, devices or the client axis: the federated loop
vectorizes its functions over clients and passes it one client's tensors.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from flow_pl.errors import ConfigurationError, brief
from flow_pl.methods.group_names import check_groups
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.models.normalization import ClientBatchNorm
from flow_pl.models.routed import RoutedModel
from flow_pl.tasks import Objective
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_positive

M = TypeVar("M", bound="Method")


@dataclass(frozen=True)
class Prediction:
    """Holds the outputs of one client's models on its instances [N, ...].

    Attributes:
        generalized: outputs of the server's model.
        personalized: outputs of the client's personalized model.
        local: outputs of the client's local model, to compare and mix with the server's; None if there is none, or
            if the server's model is not trained, which makes both pointless.
        memory: outputs for the vote of the client's stored examples, if that is a third expert.
        routes: [N, blocks] bool, True where an instance was routed to (or leans to) the local block; [N, T, blocks] if
            blocks are routed per token.
        local_probability: the router's probabilities of the local blocks, in the shape of `routes`.
    """

    generalized: Tensor
    personalized: Tensor
    local: Tensor | None = None
    memory: Tensor | None = None
    routes: Tensor | None = None
    local_probability: Tensor | None = None


class Method(ABC):
    """A federated algorithm.

    Subclasses define what a client does in a round (`training`) and how it gets its personalized model
    (`personalization`), and predict with the resulting groups. The budget (epochs, batch size, optimizer) belongs to
    the loop. docs/concepts.md defines the symbols w_g, w_l, w_p and psi.

    Args:
        personal_lr_scale: factor on the client optimizer's learning rate for the steps that train the personal model,
            if the method has one; see `personal_step`.

    Attributes:
        shared: what clients send and the server averages: maps a group of the server to the client's group that updates
            it. The client's group may hold only some of the server's parameters; the others stay unchanged.
        private: what a client keeps between rounds: maps a group it starts a round with to the group whose value at the
            end of the round it keeps. A method without such groups is stateless. The values that `start` returns for
            these groups are for clients that have not been sampled.
        participation: name of a group with one scalar for each group of the server, a factor on the client's weight in
            the server's mean of that group (0 excludes the client); None if it is 1 for all.
        always: groups of the server whose mean every client takes part in, although `participation` is set.
        phases: what `training` returned when the method was bound.
        personal_phases: what `personalization` returned when the method was bound.
        modules: the server's modules by group.
        lazy_seeds: seeds of the backbone's lazy modules, and of those of the method's own modules.
        trained: names of the trained parameters of each group of the server. Frozen ones (`requires_grad` is False) are
            in no group: all clients use the server's, which never change.
        models: groups of the server that generalized predictions need.
        scratch: groups that are needed for personalization but not by the personalized model.
        training_only: attributes that no prediction needs.
        needs: what the method computes with the backbone: only its "outputs" (or blocks, which it routes), the
            "features" that its last block gets, or also the outputs of that block, the "head", for other features.
        keeps_norms: whether clients keep the layers that `batch_norm: local` creates.
        block_names: names of the backbone's blocks if they are not chosen automatically.
        budget: names of arguments that set how much or how fast the method trains beside the loop's settings, if their
            ending does not say so (epochs, steps, rounds, lr, lr_scale); for tables that compare methods.
        cohort_share: expected share of the seen clients in a round's cohort; 1 until a fit begins, which creates the
            phases again if it differs.
        cohort_size: expected number of clients in a round's cohort; None until the data are known.
        by_cohort: groups of the server whose change is a share of all clients': their mean change is scaled by the
            number of clients that took part / `cohort_size`.
    """

    shared: Mapping[str, str] = MappingProxyType({"global": "global"})
    private: Mapping[str, str] = MappingProxyType({})
    participation: ClassVar[str | None] = None
    always: ClassVar[tuple[str, ...]] = ()
    models: Sequence[str] = ("global",)
    scratch: ClassVar[tuple[str, ...]] = ()
    training_only: ClassVar[tuple[str, ...]] = ("phases", "personal_phases")
    needs: Literal["outputs", "features", "head"] = "outputs"
    keeps_norms: ClassVar[bool] = False
    budget: ClassVar[tuple[str, ...]] = ()
    cohort_share: float = 1.0
    cohort_size: int | None = None
    by_cohort: ClassVar[tuple[str, ...]] = ()
    block_names: Sequence[str] | None
    phases: tuple[Phase | Derive, ...]
    personal_phases: tuple[Phase | Derive, ...]
    model: RoutedModel
    objective: Objective
    modules: dict[str, nn.Module]
    lazy_seeds: tuple[int, int]
    trained: dict[str, tuple[str, ...]]

    def __init__(self, personal_lr_scale: float = 1.0) -> None:
        require_positive(personal_lr_scale=personal_lr_scale)
        self.personal_lr_scale = personal_lr_scale

    def __init_subclass__(cls) -> None:
        """Reset the shortcuts in a subclass that overrides `predict`: the inherited ones would serve another model."""
        super().__init_subclass__()
        if "predict" in vars(cls):
            for shortcut in ("personal", "personalized"):
                if shortcut not in vars(cls):
                    setattr(cls, shortcut, getattr(Method, shortcut))

    def bind(self: M, backbone: nn.Module, objective: Objective, blocks: Sequence[str] | None = None) -> M:
        """Return a copy of the method for a backbone and a task; the method itself is unchanged and can be bound again.

        Args:
            backbone: the server's model.
            objective: the task.
            blocks: names of the backbone's submodules that are its blocks; None to choose them.

        Returns:
            The bound copy. Its `modules` are the server's; the FederatedModule owns their parameters.

        Raises:
            ConfigurationError: the method cannot work with this backbone or task, or names an unknown group.
        """
        bound = copy.copy(self)
        bound.block_names = blocks
        kept = [name for name, layer in backbone.named_modules() if isinstance(layer, ClientBatchNorm)]
        if kept and not self.keeps_norms:
            raise ConfigurationError(
                f"batch_norm is local, but clients of {type(self).__name__} do not keep normalization layers (block "
                f"'{kept[0]}' of the backbone): use FedBN, or set model.batch_norm to group or frozen."
            )
        bound.model = RoutedModel(backbone, blocks)
        bound.objective = objective
        # Lazy modules are initialized later, when the data is known. The backbone's seed is drawn before the method's
        # own modules draw anything, so that w_g has the same start under every method.
        with torch.random.fork_rng(devices=[]):
            seed = int(torch.randint(2**31, ()))
        bound.modules = {"global": backbone, **bound.server_modules()}
        bound.lazy_seeds = (seed, int(torch.randint(2**31, ())))
        bound.plan()
        return bound

    def plan(self) -> None:
        """Set up what depends on which parameters are frozen; called by `bind`, and again when that changes.

        Raises:
            ConfigurationError: as in `bind`.
        """
        self.trained = {name: trained_names(module) for name, module in self.modules.items()}
        self.model = RoutedModel(self.modules["global"], self.block_names)
        self.prepare()
        self._create_phases()
        check_groups(self)

    def set_cohort_share(self, share: float) -> None:
        """Set `cohort_share`, and create the phases again if it changes: `training` may have read the old one.

        Args:
            share: expected share of the seen clients in a round's cohort.
        """
        if share != self.cohort_share:
            self.cohort_share = share
            self._create_phases()

    def _create_phases(self) -> None:
        self.phases = _stages(self.training(), f"{type(self).__name__}.training")
        self.personal_phases = _stages(self.personalization(), f"{type(self).__name__}.personalization")

    def prepare(self) -> None:  # noqa: B027  # most methods have nothing to prepare
        """Bind a method's own parts to `model` and `objective`, before its phases are created.

        Create parts with state here: `bind` copies the method shallowly, without its parts.

        Raises:
            ConfigurationError: the method cannot work with this backbone or task.
        """

    def __getstate__(self) -> dict[str, Any]:
        """Return everything except the phases, whose steps refer to this method: a deep copy creates its own."""
        return {name: value for name, value in vars(self).items() if name not in ("phases", "personal_phases")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Create the phases again if the method is bound."""
        self.__dict__.update(state)
        if "modules" in state:
            self.prepare()
            self._create_phases()

    def in_round(self, number: int, server: Groups) -> Method:
        """Return the method for a round of training: this one, unless the first rounds use another.

        Args:
            number: number of the round, from 0.
            server: the server's groups at its start, the same in every process and after a resume.
        """
        return self

    @property
    def route_names(self) -> list[str]:
        """Return the routed blocks' names, in the order of `Prediction.routes`; empty if the method does not route."""
        return []

    def server_modules(self) -> dict[str, nn.Module]:
        """Return the server's modules besides the backbone, by group (Flow's router)."""
        return {}

    def initialize(self, x: Inputs) -> None:
        """Initialize the server's lazy modules by a forward pass on instances x [N, ...].

        Raises:
            ConfigurationError: the method needs the head separately, but the backbone does not end with its last block.
        """
        self.model.initialize(x)
        if self.needs == "head":
            self.model.require_head(type(self).__name__)
        if self.needs != "outputs" and self.model.chosen:
            self.model.features(x, dict(self.modules["global"].named_parameters()))

    def start(self, server: Groups) -> Groups:
        """Return the groups that a client without state, or not yet sampled, starts a round with.

        They may alias the server's groups, which are never written to.
        """
        return dict(server)

    def initial_state(self, server: Groups) -> Groups:
        """Return the initial state of a client that has not been sampled."""
        start = self.start(server)
        return {name: start[name] for name in self.private}

    def optional(self, group: str) -> bool:
        """Return whether a client may leave a group of the server to others; see `participation` and `always`."""
        return self.participation is not None and group not in self.always

    def personal(self, groups: Groups) -> Parameters | None:
        """Return the backbone parameters that are the personalized model; None if it combines several models.

        A subclass that overrides `predict` inherits neither this nor `personalized`.
        """
        return None

    def personalized(self, groups: Groups, x: Inputs) -> Tensor:
        """Compute the outputs of the personalized model alone, for serving it."""
        personal = self.personal(groups)
        return self.predict(groups, x).personalized if personal is None else self.model.plain(x, personal)

    def generalized(self, groups: Groups, x: Inputs) -> Tensor:
        """Compute the outputs of the server's model alone, from the groups of `models`."""
        return self.model.plain(x, groups["global"])

    @abstractmethod
    def training(self) -> tuple[Phase | Derive, ...]:
        """Return what a sampled client does in a round."""

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Return the phases that make a client's personalized model from the server's groups; () if there are none."""
        return ()

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Compute the outputs for one client's instances x [N, ...], in evaluation mode.

        `groups["global"]` is the server's model, untouched. Without a personal model, personalized = generalized.
        """
        outputs = self.model.plain(x, groups["global"])
        return Prediction(outputs, outputs)

    def local_probability(self, groups: Groups, x: Inputs) -> Tensor | None:
        """Compute the router's probabilities of the local blocks for one client's instances, as `predict` does.

        Also called in training: a method whose `predict` needs more than a round leaves must override it.
        """
        return self.predict(groups, x).local_probability

    def loss(self, minibatch: Minibatch, *parameters: Parameters) -> Tensor:
        """Compute the task's loss of the backbone with the union of parameter groups; later groups take precedence."""
        return self.objective.loss(self.model.plain(minibatch.x, *parameters), minibatch.y, minibatch.mask)

    def train_step(self, group: str) -> Step:
        """Return a step on the task's loss of the backbone under `group` (over the global embedding tables)."""
        return Step(group, lambda groups, minibatch: self.loss(minibatch, groups["global"], groups[group]))

    def personal_step(self, step: Step) -> Step:
        """Scale a step that trains the personal model by `personal_lr_scale`, on top of its own factor."""
        return replace(step, lr_scale=step.lr_scale * self.personal_lr_scale)


def _stages(stages: Any, source: str) -> tuple[Phase | Derive, ...]:
    """Return phases as a tuple.

    Raises:
        ConfigurationError: they are something else; a tuple of one needs a comma.
    """
    if not isinstance(stages, tuple | list) or not all(isinstance(stage, Phase | Derive) for stage in stages):
        raise ConfigurationError(
            f"{source} returns {brief(repr(stages))}, expected a tuple of Phase and Derive, such as (Phase(...),)."
        )
    return tuple(stages)


def trained_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the trainable parameters and of those that the server averages without an optimizer.

    The latter are all parameters of a module whose attribute `averaged` is true (such as running statistics).
    """
    averaged = getattr(module, "averaged", False)
    return tuple(name for name, p in module.named_parameters() if p.requires_grad or averaged)
