"""Defines a federated algorithm: groups of parameters, phases over a client's data, and steps on every minibatch.

A method is written for ONE client. It knows nothing of Lightning, of devices or of the client axis: the federated
loop vectorises its functions over clients and passes it one client's tensors.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from flow_pl.errors import ConfigurationError
from flow_pl.models.normalization import ClientBatchNorm
from flow_pl.models.routed import RoutedModel
from flow_pl.tasks import Objective
from flow_pl.utils.groups import Groups, OptimizerFactory, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_choice, require_count, require_positive

if TYPE_CHECKING:
    from typing_extensions import Self

Part = Literal["all", "local", "global"]
M = TypeVar("M", bound="Method")


class Minibatch(NamedTuple):
    """Examples of one client.

    Attributes:
        x: features [B, ...]; a mapping of tensors where they are several by name.
        y: targets [B, ...].
        mask: [B] bool, False in the padding.
    """

    x: Inputs
    y: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step on a minibatch. It may be traced: what the objective reads must not change afterwards.

    Attributes:
        moves: the group that is updated; every other group is frozen.
        objective: maps (groups, minibatch) to a scalar, whose gradient updates the group.
        lr_scale: factor on the client optimizer's learning rate.
        bounds: smallest and largest value that the group may take; it is clamped after each step.
        optimizer: creates the step's optimizer; None for the client optimizer.

    Raises:
        ConfigurationError: `lr_scale` is not positive, or the bounds are not in order.
    """

    moves: str
    objective: Callable[[Groups, Minibatch], Tensor]
    lr_scale: float = 1.0
    bounds: tuple[float, float] | None = None
    optimizer: OptimizerFactory | None = None

    def __post_init__(self) -> None:
        """Reject invalid settings."""
        require_positive(**{f"lr_scale of the step of '{self.moves}'": self.lr_scale})
        if self.bounds is not None and not self.bounds[0] <= self.bounds[1]:
            raise ConfigurationError(
                f"bounds of the step of '{self.moves}' are {self.bounds}, expected the smaller value first."
            )


@dataclass(frozen=True, eq=False)
class Phase:
    """Epochs over a part of a client's training data, with the same steps, in order, on every minibatch.

    The loop decides how often and in which order a client's examples are visited, so that all methods train alike.

    Attributes:
        part: which share of the data.
        steps: the steps taken on each minibatch; every step has its own optimizer, fresh in each phase, and a step
            listed several times is taken as often, with one optimizer.
        epochs: passes over the data, if the method sets them; None for the loop's budget, `local_epochs` in a round
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
        """Reject what the loop could not run."""
        require_choice(get_args(Part), **{"part of a Phase": self.part})
        if self.epochs is not None and self.epochs != "personal":
            require_count(**{"epochs of a Phase": self.epochs})
        if not isinstance(self.steps, tuple) or not all(isinstance(step, Step) for step in self.steps):
            raise ConfigurationError(f"steps of a Phase are {self.steps!r}, expected a tuple of Steps.")


@dataclass(frozen=True, eq=False)
class Derive:
    """Computes groups once from a part of a client's training data, without gradients.

    Attributes:
        part: which share of the data.
        compute: maps (groups, examples) to new or replaced groups.

    Raises:
        ConfigurationError: there is no such part.
    """

    part: Part
    compute: Callable[[Groups, Minibatch], Groups]

    def __post_init__(self) -> None:
        """Reject an unknown part."""
        require_choice(get_args(Part), **{"part of a Derive": self.part})


@dataclass(frozen=True)
class Prediction:
    """Holds the outputs of one client's models on its instances [N, ...].

    Attributes:
        generalized: outputs of the server's model.
        personalized: outputs of the client's personalized model.
        local: outputs of the client's local model, to compare and mix with the server's; None if there is none, or
            if the server's model is not trained, which makes both pointless.
        memory: outputs for the vote of the client's stored examples, if that is a third expert.
        routes: [N, blocks] bool, True where an instance was routed to (or leans to) the local block.
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

    Subclasses define what a client does in a round (`training`) and how its personalized model is made
    (`personalization`), and predict with the resulting groups. The budget (epochs, batch size, optimizer) is the
    loop's.

    Args:
        personal_lr_scale: factor on the client optimizer's learning rate for the steps that train the personal model,
            if the method has one; see `personal_step`.

    Attributes:
        shared: what clients send and the server averages: maps a group of the server to the client's group that is its
            update. The client's group may hold only some of the server's parameters; the others stay unchanged.
        private: what a client keeps from one round to the next: maps a group it starts a round with to the group whose
            value at the end of the round it keeps. A method without any is stateless. What `start` returns for these
            groups is for clients that have not been sampled yet.
        participation: name of a group with one scalar for each group of the server, a factor on the client's weight in
            the server's mean of that group (0 excludes the client); None if it is 1 for all.
        phases: what `training` returned when the method was bound.
        personal_phases: what `personalization` returned when the method was bound.
        modules: the server's modules by group.
        lazy_seeds: of the lazy modules of the backbone, and of those of the method's own modules.
        trained: for each group of the server the names of its parameters that are trained. Frozen ones
            (`requires_grad` is False) are in no group: all clients use the server's, which never change.
        models: the groups of the server that the generalized predictions need.
        scratch: groups that are needed for personalization but not by the personalized model.
        training_only: attributes that no prediction needs.
        needs: what the method computes by the backbone: its "outputs" alone (or blocks, which it routes), the
            "features" that its last block gets, or also the outputs of that block, the "head", for other features.
        keeps_norms: whether clients keep the layers that `batch_norm: local` makes.
        block_names: names of the backbone's blocks, where they are not chosen automatically.
        cohort_share: expected share of the seen clients in a round's cohort; 1 until the data are known.
    """

    shared: Mapping[str, str] = MappingProxyType({"global": "global"})
    private: Mapping[str, str] = MappingProxyType({})
    participation: ClassVar[str | None] = None
    models: Sequence[str] = ("global",)
    scratch: ClassVar[tuple[str, ...]] = ()
    training_only: ClassVar[tuple[str, ...]] = ("phases", "personal_phases")
    needs: Literal["outputs", "features", "head"] = "outputs"
    keeps_norms: ClassVar[bool] = False
    cohort_share: float = 1.0
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
        # own modules draw anything, so that w_g starts alike under every method.
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
        self.phases = tuple(self.training())
        self.personal_phases = tuple(self.personalization())
        check_groups(self)

    def prepare(self) -> None:  # noqa: B027  # most methods have nothing to prepare
        """Bind a method's own parts to `model` and `objective`, before its phases are created.

        Create parts with state anew here: `bind` copies the method shallowly, not its parts.

        Raises:
            ConfigurationError: the method cannot work with this backbone or task.
        """

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the phases, whose steps refer to this very method: a deep copy creates its own."""
        return {name: value for name, value in vars(self).items() if name not in ("phases", "personal_phases")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Create the phases anew if the method is bound."""
        self.__dict__.update(state)
        if "modules" in state:
            self.prepare()
            self.phases, self.personal_phases = tuple(self.training()), tuple(self.personalization())

    def in_round(self, number: int) -> Method:
        """Return the method for a round of training: this one, unless the first rounds use another."""
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
            ConfigurationError: the method needs the head alone, and the backbone does not end with its last block.
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
        """Return the initial state of a client that has not been sampled yet."""
        start = self.start(server)
        return {name: start[name] for name in self.private}

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

    def predictor(self) -> Self:
        """Return a copy that predicts with the groups it is given and holds no weights; it can be copied and pickled.

        Buffers of its modules are copies.
        """
        other = copy.copy(self)
        for name in self.training_only:
            vars(other).pop(name, None)
        # stand-ins without data, since a block may read a weight's shape; copying all weights would be wasteful.
        # What is frozen is in no group, and no training changes it: one copy serves all.
        stand_ins = {
            id(p): p.detach() if name not in self.trained[group] else p.detach().to("meta")
            for group, whole in self.modules.items()
            for name, p in whole.named_parameters()
        }
        other = copy.deepcopy(other, stand_ins)
        for module in (part for whole in other.modules.values() for part in whole.modules()):
            frozen = {name: p for name, p in module._parameters.items() if p is not None and not p.is_meta}
            for name, stand_in in module._parameters.items():
                if name not in frozen:
                    # as a plain attribute: a meta parameter could not be moved to a device
                    vars(module)[name] = stand_in
            module._parameters.clear()
            for name, p in frozen.items():
                module.register_buffer(name, p)
            module.training = False
        return other

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
        """Compute the task's loss of the backbone under the union of parameter groups; later ones win."""
        return self.objective.loss(self.model.plain(minibatch.x, *parameters), minibatch.y, minibatch.mask)

    def train_step(self, group: str) -> Step:
        """Return a step on the task's loss of the backbone under `group` (over the global embedding tables)."""
        return Step(group, lambda groups, minibatch: self.loss(minibatch, groups["global"], groups[group]))

    def personal_step(self, step: Step) -> Step:
        """Scale a step that trains the personal model by `personal_lr_scale`, on top of its own factor."""
        return replace(step, lr_scale=step.lr_scale * self.personal_lr_scale)


def trained_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the trainable parameters and of those that the server averages without an optimizer.

    The latter are all parameters of a module whose attribute `averaged` is true (running statistics, say).
    """
    averaged = getattr(module, "averaged", False)
    return tuple(name for name, p in module.named_parameters() if p.requires_grad or averaged)


def check_groups(method: Method) -> None:
    """Check that every group that a bound method names exists.

    What a `Derive` creates is known only once it runs, so nothing is checked from there on.

    Raises:
        ConfigurationError: a group does not exist; names the choices.
    """
    parameters = {group: dict(module.named_parameters()) for group, module in method.modules.items()}
    if any(isinstance(p, nn.UninitializedParameter) for group in parameters.values() for p in group.values()):
        return  # a client's first groups are known only once the data is
    server = {group: {key: parameters[group][key].detach() for key in keys} for group, keys in method.trained.items()}
    name = type(method).__name__
    try:
        known = tuple(method.start(server))
    except KeyError as error:
        (key,) = error.args or ("",)
        if not any(key in parameters for parameters in server.values()):  # it is no parameter that is missing
            require_group(server, f"{name}.start reads", str(key))
        raise
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


@contextmanager
def naming_missing_groups(method: Method, groups: Mapping[str, Any]) -> Iterator[None]:
    """A context in which a group that a method reads and that does not exist is named, with the choices.

    Args:
        method: its steps, its `Derive`s or its `predict` are called here.
        groups: the client's groups, as they are when the error occurs.

    Raises:
        ConfigurationError: a group does not exist.
    """
    try:
        yield
    except KeyError as error:
        (key,) = error.args or ("",)
        parameters = (name for module in method.modules.values() for name, _ in module.named_parameters())
        if isinstance(key, str) and key not in parameters:  # else a parameter is missing, which is no misspelling
            require_group(groups, f"{type(method).__name__} reads", key)
        raise


def require_group(choices: Iterable[str], where: str, group: str) -> None:
    """Check that a group is among the choices.

    Raises:
        ConfigurationError: it is not.
    """
    choices = list(choices)
    if group not in choices:
        raise ConfigurationError(f"{where} the group '{group}', expected {' or '.join(map(repr, choices))}.")
