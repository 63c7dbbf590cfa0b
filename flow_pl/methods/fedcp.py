"""FedCP: Zhang et al., FedCP: Separating Feature Information for Personalized Federated Learning (KDD 2023)."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from flow_pl.errors import ConfigurationError
from flow_pl.methods.base import Prediction
from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.methods.parts.regularizers import maximum_mean_discrepancy
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_at_least_zero

POLICY = "policy"
"""Prefix of the policy's parameters in the trained group; a backbone has no block with this name."""


class FedCP(BodyAndHead):
    """Splits the features of each instance between the server's head and the client's head by a policy (Algorithm 1).

    The policy sees the features times the client's context: the sum over the rows of its head's weights, of norm 1,
    computed at the start of a round. For each feature it gives two shares that sum to 1: one part goes through the own
    head, the other through the frozen head of w_g, and the outputs are added. Body, own head and policy are trained
    together, on the task's loss and lambda times the squared maximum mean discrepancy between the features and those of
    the received body.

    Body and policy are averaged by the server, and the mean of the own and the received head. Stateful: a client keeps
    its head; a client that has not been sampled yet has w_g's. Personalization continues training as in a round.
    The server's model alone is never trained to predict, so *generalized* accuracy is of little meaning.

    The authors' code draws the shares from a Gumbel-softmax, in evaluation too; here they are the softmax of the paper.
    Layer normalization in the policy has no parameters of its own.

    Args:
        regularization: weight of the discrepancy (lambda).
        personal_lr_scale: factor on the client optimizer's learning rate when a client is evaluated; in a round
            everything is trained together.

    Raises:
        ConfigurationError: `regularization` is negative.
    """

    shared = MappingProxyType({"global": "sent", "policy": "policy"})
    private = MappingProxyType({"head": "head"})
    models = ("global", "policy")
    needs = "head"

    def __init__(self, regularization: float = 1.0, personal_lr_scale: float = 1.0) -> None:
        super().__init__(1, personal_lr_scale)
        require_at_least_zero(regularization=regularization)
        self.regularization = regularization

    def server_modules(self) -> dict[str, nn.Module]:
        """Return the policy."""
        return {"policy": Policy()}

    def initialize(self, x: Inputs) -> None:
        """Initialize the server's lazy modules.

        Raises:
            ConfigurationError: the last block with parameters is not a linear layer on the features, so there is no
                context.
        """
        super().initialize(x)
        parameters = {name: p.detach() for name, p in self.modules["global"].named_parameters()}
        features = self.model.features(x, parameters)
        weights = [parameters[name] for name in self._head if parameters[name].ndim == 2]
        if len(weights) != 1 or weights[0].shape[-1] != features.shape[-1]:
            raise ConfigurationError(
                "FedCP takes a client's context from the weights of a linear last block, but that of "
                f"{type(self.model.backbone).__name__} is not on features {list(features.shape[1:])}: use a backbone "
                "that ends with nn.Linear, or another method, such as FedPer."
            )
        self.modules["policy"](features)

    def start(self, server: Groups) -> Groups:
        """Return the server's model and policy, the parts of the model, and a placeholder for what is sent."""
        return {**super().start(server), "sent": server["global"]}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train body, own head and policy on all the data."""
        return (Derive("all", self._join_all), Phase("all", (self._step(),)), Derive("all", self._part_all))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Do the same as in a round."""
        return (Derive("all", self._join_all), Phase("all", (self.personal_step(self._step()),)))

    def personal(self, groups: Groups) -> Parameters | None:
        """Return None: two heads and a policy predict."""
        return None

    def personalized(self, groups: Groups, x: Inputs) -> Tensor:
        """Compute the outputs of the personal model."""
        return self._outputs(groups, self.model.features(x, groups["whole"]))

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the server's model alone, and with the personal model."""
        return Prediction(self.model.plain(x, groups["global"]), self.personalized(groups, x))

    def _step(self) -> Step:
        """Create a step of everything that a client trains."""
        regularization = self.regularization  # fixed now: a traced step could not follow a change

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            features = self.model.features(minibatch.x, groups["whole"])
            received = self.model.features(minibatch.x, groups["global"])
            real = minibatch.mask.bool()
            if features.ndim > 2:
                real = self.objective.counted(minibatch.y, minibatch.mask)
            discrepancy = maximum_mean_discrepancy(features.flatten(0, -2), received.flatten(0, -2), real.flatten())
            outputs = self._outputs(groups, features)
            return self.objective.loss(outputs, minibatch.y, minibatch.mask) + regularization * discrepancy

        return Step("whole", loss)

    def _outputs(self, groups: Groups, features: Tensor) -> Tensor:
        """Sum both heads' outputs, each for its share of the features [N, ..., K]."""
        model = groups["whole"]
        seen = features * groups["context"]["vector"]
        scores = functional.linear(seen, model[f"{POLICY}.weight"], model[f"{POLICY}.bias"])
        scores = functional.layer_norm(scores, scores.shape[-1:]).relu()
        own, others = scores.reshape(*scores.shape[:-1], 2, -1).softmax(-2).to(features.dtype).unbind(-2)
        return self.model.head(features * own, model) + self.model.head(features * others, groups["global"])

    def _join_all(self, groups: Groups, examples: Minibatch) -> Groups:
        """Copy body, own head and policy into one group that steps write to; add the client's context."""
        (weight,) = (p for p in groups["head"].values() if p.ndim == 2)
        policy = {f"{POLICY}.{name}": p for name, p in groups["policy"].items()}
        model = {name: p.clone() for name, p in {**groups["body"], **groups["head"], **policy}.items()}
        return {
            "whole": model,
            "context": {"vector": functional.normalize(weight.float().sum(0), dim=0).to(weight.dtype)},
        }

    def _part_all(self, groups: Groups, examples: Minibatch) -> Groups:
        """Split the group into the parts that are kept and sent."""
        model, w_g = groups["whole"], groups["global"]
        head = {name: model[name] for name in self._head}
        sent = {name: model[name].lerp(p, 0.5) if name in head else model[name] for name, p in w_g.items()}
        return {"head": head, "sent": sent, "policy": {name: model[f"{POLICY}.{name}"] for name in groups["policy"]}}


class Policy(nn.LazyLinear):
    """Implements the policy's linear layer, two outputs per feature; becomes an `nn.Linear` on the first call."""

    cls_to_become = nn.Linear

    def __init__(self) -> None:
        super().__init__(out_features=0)

    def initialize_parameters(self, features: Tensor, *args: Any) -> None:
        """Infer the number of features K from [N, ..., K]."""
        self.out_features = 2 * features.shape[-1]
        super().initialize_parameters(features)
