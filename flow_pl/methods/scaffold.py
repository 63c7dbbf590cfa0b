"""SCAFFOLD: Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning (ICML 2020)."""

from __future__ import annotations

import copy
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from flow_pl.kernels.functional import differentiable
from flow_pl.methods.fedavg import FedAvg
from flow_pl.methods.parts.pieces import pieces
from flow_pl.methods.per_fedavg import INNER_SCALE
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs


class Scaffold(FedAvg):
    """Corrects each FedAvg step for the difference of the client's gradient from the mean (Algorithm 1).

    A step follows g(w) + c - c_i. The client's control c_i is its gradient at the w_g that it last received (Option I,
    which holds with any client optimizer; Option II takes it from the steps of plain SGD). The server's control c is
    the mean of the clients': with N seen clients of whom S took part, c <- c + |S| / N * mean of (c_i new - c_i old).
    The server averages it directly, whatever its optimizer. All controls start at zero. If a task's loss is a sum, a
    control is the gradient of the mean over all targets, and a step is corrected by that times the targets of its
    minibatch.

    Sends w and the change of its control, twice FedAvg's bytes. Stateful: a client keeps its control. There is no
    personal model. A round costs one more pass over the client's data.
    """

    shared = MappingProxyType({"global": "global", "control": "sent"})
    private = MappingProxyType({"own": "new"})
    by_cohort: ClassVar[tuple[str, ...]] = ("control",)

    def __init__(self) -> None:
        super().__init__()

    def server_modules(self) -> dict[str, nn.Module]:
        """Return the server's control: a value for each parameter, in a module of the backbone's shape."""
        control = copy.deepcopy(self.model.backbone)
        control.averaged = True  # type: ignore[assignment]  # no optimizer: see `trained_names`
        for p in control.parameters():
            p.requires_grad = False  # not requires_grad_, which lazy parameters refuse
            if not isinstance(p, nn.UninitializedParameter):
                nn.init.zeros_(p)
        return {"control": control}

    def prepare(self) -> None:
        """Create a control for each trained parameter, and none for a frozen one."""
        self.trained["control"] = self.trained["global"]

    def initialize(self, x: Inputs) -> None:
        """Initialize lazy modules of the backbone and of the control; the control stays zero."""
        super().initialize(x)
        control = self.modules["control"]
        lazy = [p for p in control.parameters() if isinstance(p, nn.UninitializedParameter)]
        control(x)
        for p in lazy:
            nn.init.zeros_(p)

    def start(self, server: Groups) -> Groups:
        """Return w_g, to be trained and as received, the server's control and a client's own control, zero."""
        own = {name: torch.zeros_like(p) for name, p in server["global"].items()}
        sent = {name: server["control"][name] for name in own}
        return {**server, "received": server["global"], "own": own, "new": own, "sent": sent}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Compute the new control, then train on all the data with the correction of the old one."""

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            w, received, c, own = (groups[name] for name in ("global", "received", "control", "own"))
            terms = [((p - received[name]) * (c[name] - own[name])).float().sum() for name, p in w.items()]
            weight = self.objective.loss_weight(minibatch.y, minibatch.mask)
            return self.loss(minibatch, w) + weight * torch.stack(terms).sum()

        return (Derive("all", self._controls), Phase("all", (Step("global", loss),)))

    def _controls(self, groups: Groups, examples: Minibatch) -> Groups:
        """Compute the client's new control, and the server's control that results from it."""
        new, old, c = self._gradient(groups["received"], examples), groups["own"], groups["control"]
        sent = {name: c[name] + self.cohort_share * (p - old[name]) for name, p in new.items()}
        return {"new": new, "sent": sent}

    def _gradient(self, w: Parameters, examples: Minibatch) -> Parameters:
        """Compute the gradient of the mean loss of all examples, in evaluation mode."""
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in w.items()}
        counts = [self.objective.in_loss(piece.y, piece.mask).float().sum() for piece in pieces(examples)]
        whole = torch.stack(counts).sum().clamp_min(1.0)
        for piece, count in zip(pieces(examples), counts, strict=True):
            # enabled, or oneDNN's LSTM keeps nothing for the gradient
            with torch.enable_grad(), differentiable(self.modules.values()):
                loss, pull_back = torch.func.vjp(lambda v, piece=piece: self.loss(piece, v), w)  # type: ignore[misc]
            gradient = pull_back(torch.full_like(loss, INNER_SCALE))[0]
            # of the sum over the piece's targets, whatever the task's loss is
            share = count / self.objective.loss_weight(piece.y, piece.mask).clamp_min(1.0) / whole / INNER_SCALE
            total = {name: p + gradient[name].float() * share for name, p in total.items()}
        return {name: p.to(w[name].dtype) for name, p in total.items()}
