"""FedBN: Li et al., FedBN: Federated Learning on Non-IID Features via Local Batch Normalization (ICLR 2021)."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from flow_pl.errors import ConfigurationError
from flow_pl.kernels.functional import intercepted
from flow_pl.methods.base import Prediction
from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.models.normalization import ClientBatchNorm, statistics_of
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs, first


class FedBN(BodyAndHead):
    """Shares everything except the batch normalization layers, which every client keeps (Algorithm 1).

    For backbones with BatchNorm layers, and `model.batch_norm: local`. In a round a client trains all parameters
    together, from the received ones and its own normalization layers, and sends everything but these layers. Stateful:
    a client keeps the scales and shifts of these layers. A client that has not been sampled yet starts from the
    server's, which are never trained, so *generalized* accuracy is of little meaning.

    The paper normalizes in training by the statistics of a minibatch, and in evaluation by their running averages. Here
    an instance's outputs do not depend on other instances: a client's statistics are those of all of its training
    examples, computed in one forward pass at the start of a round or an evaluation, and constant in the steps. In
    evaluation the client's layers are trained further, on the received body, and the statistics computed once more; in
    the paper they are those of the last round.

    Args:
        personal_lr_scale: factor on the client optimizer's learning rate for the normalization layers when a client is
            evaluated; in a round everything is trained together.
    """

    shared = MappingProxyType({"global": "body"})
    private = MappingProxyType({"head": "head"})
    keeps_norms = True

    def __init__(self, personal_lr_scale: float = 1.0) -> None:
        super().__init__(1, personal_lr_scale)

    def prepare(self) -> None:
        """Separate the normalization layers: they are the groups "head" and "statistics", the rest is the "body".

        Raises:
            ConfigurationError: there are none with trainable parameters.
        """
        backbone = self.modules["global"]
        self._layers = {name: m for name, m in backbone.named_modules() if isinstance(m, ClientBatchNorm)}
        names = self.trained["global"]
        self._head = [name for name in names if name.rpartition(".")[0] in self._layers]
        self._body = [name for name in names if name not in self._head]
        if not self._head or not self._body:
            raise ConfigurationError(
                f"FedBN keeps BatchNorm layers on the clients and shares the rest, {type(backbone).__name__} has "
                f"{len(self._layers)} such layers to train: use a backbone with BatchNorm and set model.batch_norm to "
                "local, or use another method, such as FedPer."
            )

    def initialize(self, x: Inputs) -> None:
        """See `Method.initialize`; also compute statistics once.

        Raises:
            ConfigurationError: a normalization layer is not called once, with a row for each instance.
        """
        super().initialize(x)
        server = {name: p.detach() for name, p in self.modules["global"].named_parameters()}
        start = self.start({"global": {name: server[name] for name in self.trained["global"]}})
        one = first(x)
        self._measure(start, Minibatch(x, one.new_zeros(len(one)), one.new_ones(len(one), dtype=torch.bool)))

    def start(self, server: Groups) -> Groups:
        """Return the server's model, its two parts, and its statistics."""
        kept = {
            f"{name}.{key}": value.detach()
            for name, layer in self._layers.items()
            for key, value in (("running_mean", layer.running_mean), ("running_var", layer.running_var))
        }
        return {**super().start(server), "statistics": kept}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Compute the statistics, then train the whole model."""
        step = Step("model", lambda groups, minibatch: self.loss(minibatch, groups["model"], groups["statistics"]))
        return (Derive("all", self._measure), *self.train_jointly(step))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Train the client's layers on the received body, between statistics of both."""

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            return self.loss(minibatch, groups["body"], groups["head"], groups["statistics"])

        measure = Derive("all", self._measure)
        return (measure, Phase("all", (self.personal_step(Step("head", loss)),)), measure)

    def personal(self, groups: Groups) -> Parameters | None:
        """Return the server's body with the client's layers."""
        return {**groups["body"], **groups["head"], **groups["statistics"]}

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the server's body and the client's layers."""
        return Prediction(self.model.plain(x, groups["global"]), self.personalized(groups, x))

    def _measure(self, groups: Groups, examples: Minibatch) -> Groups:
        """Compute the statistics of a client's examples in every layer, each below those above it."""
        found: Parameters = {}

        def measured(name: str, layer: ClientBatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            (h,) = (*args, *kwargs.values())
            mean, var = f"{name}.running_mean", f"{name}.running_var"
            if mean in found or h.shape[0] != examples.mask.shape[0]:
                raise ConfigurationError(
                    f"block '{name}' of the backbone is called several times in a forward, or with other rows than "
                    "instances, and a client has one mean of its examples: set model.batch_norm to group or frozen."
                )
            before = groups["statistics"]
            found[mean], found[var] = statistics_of(h, examples.mask, (before[mean], before[var]))
            return layer.normalize(h, found[mean], found[var])

        with intercepted({layer: partial(measured, name, layer) for name, layer in self._layers.items()}):
            self.model.plain(examples.x, groups["body"], groups["head"])
        return {"statistics": {name: found.get(name, value) for name, value in groups["statistics"].items()}}
