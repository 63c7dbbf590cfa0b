"""The vocabulary of a method: steps on minibatches, phases of epochs, and groups computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from flow_pl.errors import ConfigurationError
from flow_pl.utils.groups import Groups, OptimizerFactory
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_choice, require_count, require_positive

Part = Literal["all", "local", "global", "fold", "other_folds"]
"""Shares of a client's training data: all, two fixed random halves, or one of four folds, which changes from round to
round, and the three others."""


class Minibatch(NamedTuple):
    """Holds examples of one client.

    Attributes:
        x: features [B, ...]; a mapping of tensors for several by name.
        y: targets [B, ...].
        mask: [B] bool, False in the padding.
    """

    x: Inputs
    y: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """Describes one optimizer step on a minibatch; it may be traced, so the objective must not change.

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
    """Describes epochs over a part of a client's training data, with the same steps, in order, on every minibatch.

    The loop decides how often and in which order a client's examples are visited, so that all methods train alike.

    Attributes:
        part: part of the data.
        steps: the steps taken on each minibatch; every step has its own optimizer, new in each phase, and a step
            listed several times is taken as often, with one optimizer.
        epochs: passes over the data, if the method sets them; None for the loop's budget, `local_epochs` in a round
            and `personal_epochs` in personalization; "personal" for `personal_epochs` in a round, too.
        examples: a group with a row for each training example, created by a `Derive`: its `x` [N, ...] and `y` [N, ...]
            replace the training data in the minibatches, and the group is removed after the phase. None for the
            training data themselves.

    Raises:
        ConfigurationError: the part does not exist, there is no epoch, or a step is not one.
    """

    part: Part
    steps: tuple[Step, ...]
    epochs: int | Literal["personal"] | None = None
    examples: str | None = None

    def __post_init__(self) -> None:
        """Reject phases that the loop could not run."""
        require_choice(get_args(Part), **{"part of a Phase": self.part})
        if self.epochs is not None and self.epochs != "personal":
            require_count(**{"epochs of a Phase": self.epochs})
        if not isinstance(self.steps, tuple) or not all(isinstance(step, Step) for step in self.steps):
            raise ConfigurationError(f"steps of a Phase are {self.steps!r}, expected a tuple of Steps.")


@dataclass(frozen=True, eq=False)
class Derive:
    """Computes groups once from a part of a client's training data, without gradients.

    Attributes:
        part: part of the data.
        compute: maps (groups, examples) to new or replaced groups.

    Raises:
        ConfigurationError: there is no such part.
    """

    part: Part
    compute: Callable[[Groups, Minibatch], Groups]

    def __post_init__(self) -> None:
        """Reject an unknown part."""
        require_choice(get_args(Part), **{"part of a Derive": self.part})
