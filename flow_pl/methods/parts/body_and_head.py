"""The common base of methods that split a model into a body and a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from flow_pl.errors import ConfigurationError
from flow_pl.methods.base import Method, Prediction
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_count, require_some


class BodyAndHead(Method):
    """Gives each client a body (representation) and a head: the groups "body" and "head".

    The head is the last blocks with parameters, or those that are named; the body is the rest.

    Args:
        head_blocks: how many of the last blocks are the head, or the names of the submodules that are.
        personal_lr_scale: see `Method`.
    """

    server_is_trained: ClassVar[bool] = False
    """Whether the server's model is trained as a whole, so that mixtures with it make sense."""

    def __init__(self, head_blocks: int | Sequence[str] = 1, personal_lr_scale: float = 1.0) -> None:
        super().__init__(personal_lr_scale)
        if isinstance(head_blocks, Sequence):
            require_some(head_blocks=head_blocks)
        else:
            require_count(head_blocks=head_blocks)
        self.head_blocks = head_blocks

    def prepare(self) -> None:
        """Split the backbone.

        Raises:
            ConfigurationError: the backbone has one block, or `head_blocks` leaves none for the body or the head.
        """
        if len(self.model.block_modules(type(self).__name__)) == 1 and self.head_blocks == 1:
            backbone = type(self.model.backbone).__name__
            raise ConfigurationError(
                f"{type(self).__name__} splits the backbone into body and head, but {backbone} has a single "
                "block with parameters: use a backbone of two or more, such as MLP, or another method, such as Ditto."
            )
        self._body, self._head = self.model.body_and_head(self.head_blocks)

    def start(self, server: Groups) -> Groups:
        """Return the server's model, and its two parts."""
        return {**server, **self.parts(server["global"])}

    def parts(self, model: Parameters) -> Groups:
        """Return the body and the head of a model."""
        return {
            "body": {name: model[name] for name in self._body},
            "head": {name: model[name] for name in self._head},
        }

    def personal(self, groups: Groups) -> Parameters | None:
        """Return the client's head on the client's body."""
        return {**groups["body"], **groups["head"]}

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the client's head on the client's body."""
        own = self.personalized(groups, x)
        return Prediction(self.model.plain(x, groups["global"]), own, local=own if self.server_is_trained else None)

    def train_jointly(self, step: Step) -> tuple[Phase | Derive, ...]:
        """Train body and head in the same steps, as one group.

        Args:
            step: a step on the group "model", which joins both; see `Method.train_step`.
        """
        return (Derive("all", _join), Phase("all", (step,)), Derive("all", self._part))

    def _part(self, groups: Groups, examples: Minibatch) -> Groups:
        return self.parts(groups["model"])


def _join(groups: Groups, examples: Minibatch) -> Groups:
    """Copy body and head into one group, since steps write to it."""
    return {"model": {name: p.clone() for name, p in {**groups["body"], **groups["head"]}.items()}}
