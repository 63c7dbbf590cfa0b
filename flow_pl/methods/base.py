"""What a federated algorithm is: groups of parameters, phases over a client's data, and steps on every minibatch.

A method is written for ONE client. It knows nothing of Lightning, of devices or of the client axis: the federated
loop vectorises its functions over clients and hands it one client's tensors.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from flow_pl.errors import ConfigurationError
from flow_pl.models.routed import RoutedModel
from flow_pl.tasks import Objective
from flow_pl.utils.groups import Groups, OptimizerFactory, Parameters
from flow_pl.utils.validation import require_choice, require_count, require_positive

if TYPE_CHECKING:
    from typing_extensions import Self

Part = Literal["all", "local", "global"]
M = TypeVar("M", bound="Method")


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

    Raises:
        ConfigurationError: `lr_scale` is not positive, or the bounds are not in order.
    """

    moves: str
    objective: Callable[[Groups, Minibatch], Tensor]
    lr_scale: float = 1.0
    bounds: tuple[float, float] | None = None
    optimizer: OptimizerFactory | None = None

    def __post_init__(self) -> None:
        """Refuse what no step can be made with."""
        require_positive(**{f"lr_scale of the step of '{self.moves}'": self.lr_scale})
        if self.bounds is not None and not self.bounds[0] <= self.bounds[1]:
            raise ConfigurationError(
                f"bounds of the step of '{self.moves}' are {self.bounds}, expected the smaller value first."
            )


@dataclass(frozen=True, eq=False)
class Phase:
    """Epochs over a part of a client's training data, with the same steps, in order, on every minibatch.

    How often and in which order a client's examples are visited is the loop's business: what is compared trains alike.

    Attributes:
        part: which share of the data.
        steps: what is done on each minibatch; every step has an optimizer of its own, fresh in each phase, and one
            that stands there several times is taken as often, with one optimizer.
        epochs: passes over it, where that is the method's own; None for the loop's budget, `local_epochs` in a round
            and `personal_epochs` in personalization; "personal" for `personal_epochs` in a round, too.
        examples: a group with a row for each training example, made by a `Derive`: its `x` [N, ...] and `y` [N, ...]
            take the place of the training data in the minibatches, and the group is gone after the phase. None for the
            training data themselves.

    Raises:
        ConfigurationError: there is no such part, no epoch, or something else than steps.
    """

    part: Part
    steps: tuple[Step, ...]
    epochs: int | Literal["personal"] | None = None
    examples: str | None = None

    def __post_init__(self) -> None:
        """Refuse what the loop could not run."""
        require_choice(get_args(Part), **{"part of a Phase": self.part})
        if self.epochs is not None and self.epochs != "personal":
            require_count(**{"epochs of a Phase": self.epochs})
        if not isinstance(self.steps, tuple) or not all(isinstance(step, Step) for step in self.steps):
            raise ConfigurationError(f"steps of a Phase are {self.steps!r}, expected a tuple of Steps.")


@dataclass(frozen=True, eq=False)
class Derive:
    """Groups computed once from a part of a client's training data, without gradients.

    Attributes:
        part: which share of the data.
        compute: maps (groups, examples) to new or replaced groups.

    Raises:
        ConfigurationError: there is no such part.
    """

    part: Part
    compute: Callable[[Groups, Minibatch], Groups]

    def __post_init__(self) -> None:
        """Refuse a part that there is not."""
        require_choice(get_args(Part), **{"part of a Derive": self.part})


@dataclass(frozen=True)
class Prediction:
    """Outputs of one client's models on its instances [N, ...].

    Attributes:
        generalized: of the server's model.
        personalized: of the client's personalized model.
        local: of a model of the client's own, to be compared and mixed with the server's; None where there is none, or
            where the server's is not trained, which makes both pointless.
        memory: of the vote of the client's stored examples, where that is an expert beside the two.
        routes: [N, blocks] bool, True where an instance went through (or leans to) the local block.
        local_probability: in the shape of `routes`, the router's probabilities of the local blocks.
    """

    generalized: Tensor
    personalized: Tensor
    local: Tensor | None = None
    memory: Tensor | None = None
    routes: Tensor | None = None
    local_probability: Tensor | None = None


class Method(ABC):
    """A federated algorithm.

    Subclasses say what a client does in a round (`training`) and what makes its personalized model
    (`personalization`), and predict with the groups that result. Its budget (epochs, batch size, optimizer) is the
    loop's.

    Args:
        personal_lr_scale: factor on the client optimizer's learning rate for the steps that make the personal model,
            of a method that has one; see `personal_step`.

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
        trained: for each group of the server the names of its parameters that are trained. Frozen ones
            (`requires_grad` is False) are in no group: all clients use the server's, which never move.
        models: the groups of the server that its own predictions need.
        scratch: groups that personalization needs and the personalized model does not.
        training_only: attributes that no prediction needs.
        cohort_share: expected share of the seen clients in a round's cohort; 1 until the data are known.
    """

    shared: Mapping[str, str] = MappingProxyType({"global": "global"})
    private: Mapping[str, str] = MappingProxyType({})
    participation: ClassVar[str | None] = None
    models: Sequence[str] = ("global",)
    scratch: ClassVar[tuple[str, ...]] = ()
    training_only: ClassVar[tuple[str, ...]] = ("phases", "personal_phases")
    cohort_share: float = 1.0
    phases: tuple[Phase | Derive, ...]
    personal_phases: tuple[Phase | Derive, ...]
    model: RoutedModel
    objective: Objective
    modules: dict[str, nn.Module]
    lazy_seed: int
    trained: dict[str, tuple[str, ...]]

    def __init__(self, personal_lr_scale: float = 1.0) -> None:
        require_positive(personal_lr_scale=personal_lr_scale)
        self.personal_lr_scale = personal_lr_scale

    def __init_subclass__(cls) -> None:
        """Let `predict` decide where a subclass overrides it: what it inherits would serve another model."""
        super().__init_subclass__()
        if "predict" in vars(cls):
            for shortcut in ("personal", "personalized"):
                if shortcut not in vars(cls):
                    setattr(cls, shortcut, getattr(Method, shortcut))

    def bind(self: M, backbone: nn.Module, objective: Objective) -> M:
        """A copy of the method for a backbone and a task; the method itself stays as it is, and can be bound again.

        Returns:
            The bound copy. Its `modules` are the server's; the FederatedModule owns their parameters.

        Raises:
            ConfigurationError: the method cannot work with this backbone or task, or names a group that there is not.
        """
        bound = copy.copy(self)
        bound.model = RoutedModel(backbone)
        bound.objective = objective
        bound.modules = {"global": backbone, **bound.server_modules()}
        # Lazy modules are initialised later, when the data is known: by a seed of now, not by whatever was drawn since.
        bound.lazy_seed = int(torch.randint(2**31, ()))
        bound.plan()
        return bound

    def plan(self) -> None:
        """Set what depends on which parameters are frozen; for a bound method, when it is bound and when that changes.

        Raises:
            ConfigurationError: as `bind`.
        """
        self.trained = {name: trained_names(module) for name, module in self.modules.items()}
        self.model = RoutedModel(self.modules["global"])
        self.prepare()
        self.phases = tuple(self.training())
        self.personal_phases = tuple(self.personalization())
        check_groups(self)

    def prepare(self) -> None:  # noqa: B027  # most methods have no such parts
        """Bind a method's own parts to `model` and `objective`, before its phases are made.

        What has a state must be made anew here: `bind` copies the method alone, not its parts.

        Raises:
            ConfigurationError: the method cannot work with this backbone or task.
        """

    def __getstate__(self) -> dict[str, Any]:
        """All but the phases, whose steps refer to this very method: a deep copy makes its own."""
        return {name: value for name, value in vars(self).items() if name not in ("phases", "personal_phases")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the phases anew, where the method is bound."""
        self.__dict__.update(state)
        if "modules" in state:
            self.prepare()
            self.phases, self.personal_phases = tuple(self.training()), tuple(self.personalization())

    def in_round(self, number: int) -> Method:
        """The method of a round of training: this one, unless its first rounds are another's."""
        return self

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

    def personal(self, groups: Groups) -> Parameters | None:
        """The backbone's parameters that alone are the personalized model; None where it is made of several models.

        A subclass with a `predict` of its own does not inherit it, nor `personalized`.
        """
        return None

    def personalized(self, groups: Groups, x: Tensor) -> Tensor:
        """Outputs of the personalized model alone, for serving it."""
        personal = self.personal(groups)
        return self.predict(groups, x).personalized if personal is None else self.model.plain(x, personal)

    def generalized(self, groups: Groups, x: Tensor) -> Tensor:
        """Outputs of the server's model alone, from the groups of `models`."""
        return self.model.plain(x, groups["global"])

    def predictor(self) -> Self:
        """A copy that predicts with the groups it is given, and holds no weights; it can be copied and pickled.

        Buffers of its modules are copies.
        """
        other = copy.copy(self)
        for name in self.training_only:
            vars(other).pop(name, None)
        # stand-ins without data, for a block may ask for a weight's shape; else all weights would be copied
        stand_ins = {id(p): p.detach().to("meta") for m in self.modules.values() for p in m.parameters()}
        other = copy.deepcopy(other, stand_ins)
        for module in (part for whole in other.modules.values() for part in whole.modules()):
            for name, stand_in in module._parameters.items():
                vars(module)[name] = stand_in  # as no parameter, or it could not be moved
            module._parameters.clear()
            module.training = False
        return other

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

    def local_probability(self, groups: Groups, x: Tensor) -> Tensor | None:
        """The router's probabilities of the local blocks for one client's instances, of `predict` and in its shape.

        Asked for in training too, where a method that needs more for `predict` than a round leaves must override it.
        """
        return self.predict(groups, x).local_probability

    def loss(self, minibatch: Minibatch, *parameters: Parameters) -> Tensor:
        """The task's loss of the backbone under the union of parameter groups; later ones win."""
        return self.objective.loss(self.model.plain(minibatch.x, *parameters), minibatch.y, minibatch.mask)

    def train_step(self, group: str) -> Step:
        """A step on the task's loss of the backbone under `group` (over the global embedding tables)."""
        return Step(group, lambda groups, minibatch: self.loss(minibatch, groups["global"], groups[group]))

    def personal_step(self, step: Step) -> Step:
        """A step that makes the personal model: with `personal_lr_scale` on top of its own factor."""
        return replace(step, lr_scale=step.lr_scale * self.personal_lr_scale)


def trained_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that are not frozen, and of those that the server averages without an optimizer.

    The latter are all of a module with an attribute `averaged` that is true (running statistics, say).
    """
    averaged = getattr(module, "averaged", False)
    return tuple(name for name, p in module.named_parameters() if p.requires_grad or averaged)


def check_groups(method: Method) -> None:
    """Check that what a bound method says of its groups by name is there.

    What a `Derive` makes is not known before it is run: from there on, `flow_pl.checks.check_stages` knows.

    Raises:
        ConfigurationError: a group is not there; names the choices.
    """
    parameters = {group: dict(module.named_parameters()) for group, module in method.modules.items()}
    if any(isinstance(p, nn.UninitializedParameter) for group in parameters.values() for p in group.values()):
        return  # what a client starts with is known once the data is
    server = {group: {key: parameters[group][key].detach() for key in keys} for group, keys in method.trained.items()}
    name, known = type(method).__name__, tuple(method.start(server))
    for setting, groups, choices in (
        ("shared, of the server,", method.shared, tuple(method.modules)),
        ("private, at the start,", method.private, known),
    ):
        for group in groups:
            require_group(choices, f"{name}.{setting} names", group)
    for stages in (method.phases, method.personal_phases):
        made = list(known)
        for stage in stages:
            if isinstance(stage, Derive):
                break
            for step in stage.steps:
                require_group(made, f"a step of {name} moves", step.moves)
    if not any(isinstance(stage, Derive) for stage in method.phases):
        for setting, groups in (("shared", method.shared), ("private", method.private)):
            for group in groups.values():
                require_group(known, f"{name}.{setting} names", group)
        if method.participation is not None:
            require_group(known, f"{name}.participation names", method.participation)


def require_group(choices: Iterable[str], where: str, group: str) -> None:
    """Check that a group is among some.

    Raises:
        ConfigurationError: it is not.
    """
    choices = list(choices)
    if group not in choices:
        raise ConfigurationError(f"{where} the group '{group}', expected {' or '.join(map(repr, choices))}.")
