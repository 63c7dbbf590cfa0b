"""PartialFed: Sun et al., Cross-Domain Personalized Federated Learning via Partial Initialization (NeurIPS 2021)."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (what torch's own documentation calls it)

from flow_pl.methods.base import Method, Prediction
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_count, require_positive


class PartialFed(Method):
    """Starts each block of a client's round from the received or the client's own parameters (the adaptive form).

    A client learns which: two logits for each block with parameters, embedding tables too. Strategy and weights take
    turns by phases, not by minibatches, so that the choice is an initialization of the weights, as in the paper's
    title:

    1. strategy_epochs over the data train the logits; received and kept parameters are frozen. The model is, block by
       block, q * received + (1 - q) * kept, with (q, 1 - q) drawn anew at each step from the Gumbel-softmax of the
       block's logits.
    2. The client takes for each block the parameters with the larger logit; the received ones if equal.
    3. E epochs train this model.

    All of the model is sent. Stateful: a client keeps the model and the strategy. A client that has not been sampled
    yet keeps w_g, so there is nothing to choose and its personal model is that of FedAvg-FT.

    Args:
        strategy_epochs: epochs of training the strategy, before those on the weights.
        temperature: temperature of the Gumbel-softmax; the lower, the closer a draw is to a hard choice.
        strategy_lr_scale: factor on the client optimizer's learning rate for the strategy.
        personal_lr_scale: factor on that rate for the weights when a client is evaluated; not used in a round.

    Raises:
        ConfigurationError: a number is not positive.
    """

    shared = MappingProxyType({"global": "model"})
    private = MappingProxyType({"kept": "model", "strategy": "strategy"})

    def __init__(
        self,
        strategy_epochs: int = 1,
        temperature: float = 1.0,
        strategy_lr_scale: float = 1.0,
        personal_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(personal_lr_scale)
        require_count(strategy_epochs=strategy_epochs)
        require_positive(temperature=temperature, strategy_lr_scale=strategy_lr_scale)
        self.strategy_epochs = strategy_epochs
        self.temperature = temperature
        self.strategy_lr_scale = strategy_lr_scale

    def prepare(self) -> None:
        """Number the blocks, in the order of their parameters; others are grouped by the first part of their names."""
        numbers: dict[str, int] = {}
        self._blocks: dict[str, int] = {}
        for name in self.trained["global"]:
            block = next((b for b in self.model.blocks if name.startswith(f"{b}.")), name.partition(".")[0])
            self._blocks[name] = numbers.setdefault(block, len(numbers))

    def start(self, server: Groups) -> Groups:
        """Return w_g three times: as received, as kept and as the model to train; and a neutral strategy."""
        w_g = server["global"]
        logits = next(iter(w_g.values())).new_zeros(len(set(self._blocks.values())), 2)
        return {**server, "kept": w_g, "model": w_g, "strategy": {"logits": logits}}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train the strategy, choose, and train the weights chosen."""
        return self._stages(self.train_step("model"))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Do the same as in a round, without keeping anything."""
        return self._stages(self.personal_step(self.train_step("model")))

    def personal(self, groups: Groups) -> Parameters | None:
        """Return the client's model, the same for all instances."""
        return groups["model"]

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the client's model, the same for all instances."""
        personal = self.personalized(groups, x)
        return Prediction(self.model.plain(x, groups["global"]), personal, local=personal)

    def _stages(self, step: Step) -> tuple[Phase | Derive, ...]:
        strategy = Phase("all", (self._strategy_step(),), self.strategy_epochs)
        return (strategy, Derive("all", self._assemble), Phase("all", (step,)))

    def _strategy_step(self) -> Step:
        """Create a step on the loss of the mixture with respect to the logits."""
        # fixed now: a traced step could not follow a change
        temperature, blocks = self.temperature, self._blocks

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            received, kept = groups["global"], groups["kept"]
            q = F.gumbel_softmax(groups["strategy"]["logits"], temperature)[:, 0]
            mixture = {key: kept[key].lerp(received[key], q[i]) for key, i in blocks.items()}
            return self.loss(minibatch, mixture)

        return Step("strategy", loss, self.strategy_lr_scale)

    def _assemble(self, groups: Groups, examples: Minibatch) -> Groups:
        """Assemble the model block by block from the received or the kept parameters."""
        received, kept, logits = groups["global"], groups["kept"], groups["strategy"]["logits"]
        take = logits[:, 0] >= logits[:, 1]
        return {"model": {key: torch.where(take[i], received[key], kept[key]) for key, i in self._blocks.items()}}
