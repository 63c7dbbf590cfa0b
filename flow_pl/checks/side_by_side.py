"""Check that a backbone can be trained, and that clients side by side get the same results as alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.func import vmap

from flow_pl.checks.block_calls import Calls, named, watched
from flow_pl.engine.client_draws import ClientDraws
from flow_pl.errors import ConfigurationError, brief
from flow_pl.kernels.functional import training_mode
from flow_pl.kernels.linear import REPLACED, ClientLinears
from flow_pl.methods.base import Method
from flow_pl.utils.counter_rng import step_keys
from flow_pl.utils.groups import Parameters
from flow_pl.utils.inputs import Inputs, map_inputs
from flow_pl.utils.unit_stream import UnitStream, UnitTable, drawing_from

CLIENTS = 2


def check_clients(
    method: Method, x: Inputs, outputs: Tensor, in_place: Sequence[nn.Module], side_by_side: bool
) -> None:
    """Compute gradients and outputs of two clients, each alone and both side by side, as the loop does.

    Args:
        method: the method, bound to a backbone.
        x: instances [3, ...]; each client gets two of them.
        outputs: outputs [3, ...] of the backbone for them.
        in_place: blocks that change their inputs in place, to be named in errors.
        side_by_side: whether several clients are trained or evaluated at once.

    Raises:
        ConfigurationError: there is no gradient, or clients get other results side by side than alone.
    """
    trial = _Trial(method, x, outputs, in_place)
    modules = list(method.modules.values())
    with training_mode(modules, True), torch.enable_grad():
        alone = trial.gradients_alone()
        if side_by_side:
            trial.compare_gradients(trial.gradients_together(), alone)
    if side_by_side:
        with training_mode(modules, False), torch.no_grad():
            trial.compare_outputs()


class _Trial:
    """Two clients with their own weights and instances."""

    def __init__(self, method: Method, x: Inputs, outputs: Tensor, in_place: Sequence[nn.Module]) -> None:
        self.model, self.backbone, self.in_place = method.model, method.modules["global"], in_place
        parameters = dict(self.backbone.named_parameters())
        self.names = method.trained["global"]
        self.weights = [torch.stack([p.detach(), p.detach() * 0.9]) for p in (parameters[n] for n in self.names)]
        self.x = map_inputs(lambda t: torch.stack([t[:-1], t[1:]]), x)
        self.keys = step_keys(torch.arange(1, CLIENTS + 1, device=outputs.device), 0, 1)[0]
        shape = outputs[: outputs.shape[0] - 1].shape
        generator = torch.Generator().manual_seed(0)
        self.directions = torch.randn(shape, generator=generator).to(outputs.device)

    def loss(self, weights: Sequence[Tensor], x: Inputs, stream: UnitStream, draws: ClientDraws) -> Tensor:
        """Project the outputs onto a random direction, for a generic gradient."""
        with drawing_from(stream), draws:
            outputs = self.model.plain(x, self.parameters(weights))
            return (outputs.float() * self.directions).sum()

    def parameters(self, weights: Sequence[Tensor]) -> Parameters:
        return dict(zip(self.names, weights, strict=True))

    def _of_client(self, i: int) -> Inputs:
        """Return a copy of a client's instances."""
        return map_inputs(lambda t: t[i].clone(), self.x)

    def gradients_alone(self) -> list[list[Tensor]]:
        """Compute the gradients of each client by autograd."""
        found = []
        for i in range(CLIENTS):
            leaves, x = [w[i].clone().requires_grad_() for w in self.weights], self._of_client(i)
            stream = UnitStream(self.keys[i], UnitTable())
            with watched(self.backbone, x) as calls:
                try:
                    loss = self.loss(leaves, x, stream, ClientDraws(stream))
                    found.append(list(torch.autograd.grad(loss, leaves, materialize_grads=True)))
                except Exception as error:  # a block may raise anything
                    raise ConfigurationError(
                        f"{named(self.backbone, self._culprit(calls))} cannot be trained ({brief(error)}): "
                        f"{self._remedy('make its outputs differentiable by using torch operations')}."
                    ) from error
            for name, grad in zip(self.names, found[-1], strict=True):
                if grad.layout != torch.strided:
                    block = self._owner(name)
                    raise ConfigurationError(
                        f"{named(self.backbone, block)} has sparse gradients, which the clients' optimizers do not "
                        "accept: set sparse=False."
                    )
        return found

    def gradients_together(self) -> list[Tensor]:
        """Compute the gradients [2, ...] of both clients as the engine does."""
        leaves = [w.clone().requires_grad_() for w in self.weights]

        def loss(key: Tensor, weights: list[Tensor], x: Inputs) -> Tensor:
            stream = UnitStream(key, units)
            return self.loss(weights, x, stream, ClientDraws(stream, REPLACED))

        units = UnitTable()
        with watched(self.backbone, self.x) as calls:
            try:
                total = vmap(loss)(self.keys, leaves, self.x).sum()
                return list(torch.autograd.grad(total, leaves, materialize_grads=True))
            except Exception as error:  # a block may raise anything
                raise self._not_together(self._culprit(calls), error) from error

    def compare_gradients(self, together: Sequence[Tensor], alone: Sequence[Sequence[Tensor]]) -> None:
        """Report the block nearest to the outputs whose gradients differ."""
        noise = 1e-5 * max(float(g.norm()) for grads in alone for g in grads)
        for k in reversed(range(len(self.names))):
            for i in range(CLIENTS):
                expected, found = alone[i][k], together[k][i]
                if not bool(expected.isfinite().all()):
                    continue
                if not float((found - expected).norm()) <= 1e-2 * float(expected.norm()) + noise:
                    raise ConfigurationError(
                        f"{named(self.backbone, self._owner(self.names[k]))} has different gradients of "
                        f"'{self.names[k].rpartition('.')[2]}' beside other clients than alone: set data.chunk_size to "
                        "1, or use another layer."
                    )

    def compare_outputs(self) -> None:
        """Compare the outputs in evaluation mode, as `map_clients` computes them."""
        with watched(self.backbone, self.x) as calls, ExitStack() as stack:
            stack.enter_context(ClientLinears())
            try:
                together = vmap(lambda weights, x: self.model.plain(x, self.parameters(weights)))(self.weights, self.x)
            except Exception as error:  # a block may raise anything
                raise self._not_together(self._culprit(calls), error) from error
        for i in range(CLIENTS):
            alone = self.model.plain(self._of_client(i), self.parameters([w[i] for w in self.weights]))
            size = float(alone.float().abs().max()) if alone.numel() else 0.0
            if not torch.allclose(together[i].float(), alone.float(), 1e-3, 1e-3 * size + 1e-5, equal_nan=True):
                raise ConfigurationError(
                    f"the backbone {type(self.backbone).__name__} has different outputs for a client beside others "
                    "than alone, in evaluation: set data.chunk_size to 1, or use other layers."
                )

    def _owner(self, name: str) -> nn.Module:
        return self.backbone.get_submodule(name.rpartition(".")[0])

    def _culprit(self, calls: Calls) -> nn.Module | None:
        if calls.inside:
            return calls.inside[-1]
        return self.in_place[0] if self.in_place else None  # the error is in the backward pass

    def _remedy(self, other: str) -> str:
        if not self.in_place:
            return other
        changing = set(self.in_place)
        names = [f"'{name}'" for name, module in self.backbone.named_modules() if module in changing and name]
        return f"let {' and '.join(names)} change nothing in place (inplace=False), or {other}"

    def _not_together(self, block: nn.Module | None, error: Exception) -> ConfigurationError:
        other = "use another layer"
        if isinstance(block, nn.RNNBase | nn.RNNCellBase):
            other = "use flow_pl.models.LSTM, which supports many clients"
        return ConfigurationError(
            f"{named(self.backbone, block)} cannot be run for several clients side by side ({brief(error)}): set "
            f"data.chunk_size to 1, or {other}."
        )
