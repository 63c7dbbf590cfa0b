"""pFedMe: Dinh, Tran, Nguyen, Personalized Federated Learning with Moreau Envelopes (NeurIPS 2020)."""

from __future__ import annotations

from torch import Tensor

from flow_pl.methods.base import Method, Prediction
from flow_pl.methods.parts.regularizers import half_squared_distance
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_count, require_positive


class PFedMe(Method):
    """Trains w_g to be close to the clients' personal models, by descending their Moreau envelopes.

    Algorithm 1: on every minibatch the personal model theta takes K steps on f(theta) + lambda/2 ||theta - w||^2,
    which solve the inner problem approximately, and then w one step, w <- w - eta lambda (w - theta). In a round theta
    starts from w_g and carries over from minibatch to minibatch. Stateless: theta starts again from w_g; in evaluation
    with w = w_g, which stays fixed.

    Both models take the client optimizer's steps, each at its own learning rate; with plain SGD these are the
    paper's. The server's mixing beta, w_g <- (1 - beta) w_g + beta * mean of clients, is the learning rate of the
    server optimizer (SGD); the paper's mean is that of the loop's `weighting: uniform`.

    The paper uses lambda = 15 (MNIST) and plain SGD. The defaults suit small minibatches and momentum: a large lambda
    holds theta so close to w that it reflects little but its last minibatch.

    Args:
        regularization: weight of the distance of theta to w (lambda).
        inner_steps: steps of theta on each minibatch (K; published: 5).
        personal_lr_scale: factor on the client optimizer's learning rate for theta; by 1 / K theta moves on a minibatch
            about as far as in one step of FedAvg.
        global_lr_scale: factor on it for w (eta).
    """

    def __init__(
        self,
        regularization: float = 1.0,
        inner_steps: int = 5,
        personal_lr_scale: float = 0.2,
        global_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(personal_lr_scale)
        require_count(inner_steps=inner_steps)
        require_positive(regularization=regularization, global_lr_scale=global_lr_scale)
        self.regularization = regularization
        self.inner_steps = inner_steps
        self.global_lr_scale = global_lr_scale

    def start(self, server: Groups) -> Groups:
        """Return w_g, and theta initialized from it."""
        return {**server, "personal": server["global"]}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Take K steps of theta and one of w on every minibatch."""
        return (Phase("all", (*self._inner_steps(), self._global_step())),)

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Take the steps of theta only."""
        return (Phase("all", self._inner_steps()),)

    def personal(self, groups: Groups) -> Parameters | None:
        """Return the personal model, theta."""
        return groups["personal"]

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the personal model."""
        personal = self.personalized(groups, x)
        return Prediction(self.model.plain(x, groups["global"]), personal, local=personal)

    def _inner_steps(self) -> tuple[Step, ...]:
        """Repeat a step K times, with one optimizer, on f(theta) + lambda / 2 * ||theta - w||^2."""
        regularization = self.regularization  # fixed now: a traced step could not follow a change

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            distance = half_squared_distance(groups["personal"], groups["global"])
            return self.loss(minibatch, groups["personal"]) + regularization * distance

        return (self.personal_step(Step("personal", loss)),) * self.inner_steps

    def _global_step(self) -> Step:
        """Create a step on lambda / 2 * ||w - theta||^2, whose gradient is lambda (w - theta)."""
        regularization = self.regularization

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            return regularization * half_squared_distance(groups["global"], groups["personal"])

        return Step("global", loss, self.global_lr_scale)
