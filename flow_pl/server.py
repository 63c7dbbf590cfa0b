"""The server's side of a round: the clients' updates summed into one buffer, reduced once, made a pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flow_pl.errors import FlowError
from flow_pl.loop import ClientUpdate
from flow_pl.methods.base import Method, Phase
from flow_pl.routing import Groups


class DivergenceError(FlowError):
    """The clients' updates are not finite."""


class ServerRound:
    """Sums what clients send in a round, on the device, in one flat buffer of float32.

    Args:
        method: the algorithm.
    """

    def __init__(self, method: Method) -> None:
        self._parameters = [p for name in method.shared for p in method.modules[name].parameters()]
        stages = [stage for stage in method.phases if isinstance(stage, Phase)]
        self._moved = tuple(dict.fromkeys(step.moves for stage in stages for step in stage.steps))
        sizes = [p.numel() for p in self._parameters]
        # deltas | weight, clients, rows, examples, skipped steps | for each group that moves: loss, steps
        device = next(method.modules["global"].parameters()).device
        self._buffer = torch.zeros(sum(sizes) + 5 + 2 * len(self._moved), device=device)
        pieces = torch.split(self._buffer[: sum(sizes)], sizes) if sizes else ()
        self._deltas = [piece.view(p.shape) for piece, p in zip(pieces, self._parameters, strict=True)]
        self._tail = self._buffer[sum(sizes) :]

    @torch.no_grad()
    def add(self, update: ClientUpdate, clients: int) -> None:
        """Add a chunk of clients."""
        update.add_to(self._deltas)
        statistics = update.statistics
        known = self._tail.new_tensor([clients, statistics.rows, statistics.examples])
        parts = (update.weights.sum()[None], known, statistics.skipped[None], statistics.losses(self._moved).flatten())
        self._tail += torch.cat(parts)

    @torch.no_grad()
    def finish(self, reduce: Callable[[Tensor], Tensor], number: int) -> dict[str, Tensor]:
        """Sum over processes, and leave the pseudo-gradient (server - mean of clients) in the server's `.grad`.

        Args:
            reduce: sums a tensor over processes.
            number: of the round, for messages.

        Returns:
            Figures of the round by name.

        Raises:
            DivergenceError: an update is not finite.
        """
        self._buffer = total = reduce(self._buffer)
        size = len(total) - len(self._tail)
        tail = total[size:]
        weight, clients, rows, examples, skipped = tail[:5]
        pseudo_gradient = total[:size] / -weight.clamp_min(torch.finfo(torch.float32).tiny)
        # The only question to the device in a round.
        if not bool(torch.isfinite(pseudo_gradient.sum())):
            raise DivergenceError(
                f"round {number}: the clients' updates are not finite, their training diverged: lower the learning "
                "rate of model.loop.client_optimizer, or start from the last checkpoint with a lower one."
            )
        start = 0
        for p in self._parameters:
            p.grad = pseudo_gradient[start : start + p.numel()].view(p.shape)
            start += p.numel()
        figures = {
            "clients": clients,
            "examples": examples,
            "padding": 1 - examples / rows.clamp_min(1),
            "update_norm": pseudo_gradient.norm(),
            "skipped_steps": skipped,
        }
        for name, (loss, steps) in zip(self._moved, tail[5:].view(-1, 2), strict=True):
            figures[f"{name}_loss"] = loss / steps.clamp_min(1)
        return figures


def server_groups(method: Method) -> Groups:
    """The server's parameters by group, as plain tensors: clients never write them nor take gradients of them."""
    return {name: {key: p.detach() for key, p in module.named_parameters()} for name, module in method.modules.items()}
