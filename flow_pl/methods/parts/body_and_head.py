"""What methods that cut a model into a body and a head have in common."""

from __future__ import annotations

from torch import Tensor, nn

from flow_pl.errors import ConfigurationError
from flow_pl.methods.base import Method, Prediction
from flow_pl.tasks import Objective
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.validation import require_count


class BodyAndHead(Method):
    """A method whose clients each have a body (representation) and a head: the groups "body" and "head".

    The body is the first blocks and the embedding tables, the head the last blocks with parameters.

    Args:
        local_epochs: epochs over a client's data in a round (E).
        personal_epochs: epochs when a client is evaluated; None for `local_epochs`.
        head_blocks: how many of the last blocks with parameters are the head.
    """

    def __init__(self, local_epochs: int = 3, personal_epochs: int | None = None, head_blocks: int = 1) -> None:
        super().__init__(local_epochs, personal_epochs)
        require_count(head_blocks=head_blocks)
        self.head_blocks = head_blocks

    def bind(self, backbone: nn.Module, objective: Objective) -> dict[str, nn.Module]:
        """Bind the method; see `Method.bind`.

        Raises:
            ConfigurationError: the backbone has one block, or `head_blocks` leaves none for the body or the head.
        """
        modules = super().bind(backbone, objective)
        if len(self.model.blocks) == 1:
            raise ConfigurationError(
                f"{type(self).__name__} cuts the backbone into body and head, {type(backbone).__name__} has a single "
                "block with parameters: use a backbone of two or more, such as MLP, or another method, such as Ditto."
            )
        self._body, self._head = self.model.body_and_head(self.head_blocks)
        return modules

    def start(self, server: Groups) -> Groups:
        """The server's model, and its two parts."""
        return {**server, **self.parts(server["global"])}

    def parts(self, model: Parameters) -> Groups:
        """The body and the head of a model."""
        return {
            "body": {name: model[name] for name in self._body},
            "head": {name: model[name] for name in self._head},
        }

    def predict(self, groups: Groups, x: Tensor) -> Prediction:
        """The client's head on the client's body predicts."""
        own = self.model.plain(x, groups["body"], groups["head"])
        return Prediction(self.model.plain(x, groups["global"]), own, local=own)
