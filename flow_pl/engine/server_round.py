"""The server's side of a round: the clients' updates summed into one buffer, reduced once, made a pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flow_pl.engine.loop import ClientUpdate
from flow_pl.errors import FlowError
from flow_pl.methods.base import Method, Phase
from flow_pl.utils.groups import Groups


class DivergenceError(FlowError):
    """The clients' updates are not finite."""


class ServerRound:
    """Sums what clients send in a round, on the device, in one flat buffer of float32.

    Args:
        method: the algorithm.
        max_rejected: largest share of the clients that may be left out of a round.

    Attributes:
        any_rejected: after `finish`, whether a client of any process was left out.
    """

    def __init__(self, method: Method, max_rejected: float = 0.5) -> None:
        self._max_rejected = max_rejected
        self._accepted: list[tuple[Tensor, Tensor]] = []
        self._unusable: list[tuple[int, str]] = []
        self.any_rejected = False
        self._parameters = sent_parameters(method)
        stages = [stage for stage in method.phases if isinstance(stage, Phase)]
        self._moved = tuple(dict.fromkeys(step.moves for stage in stages for step in stage.steps))
        self._sizes = [sum(p.numel() for p in group.values()) for group in self._parameters.values()]
        # deltas | clients, rejected clients, rows, examples, skipped steps | weight of each shared group
        # | for each group that moves: loss, steps
        device = next(method.modules["global"].parameters()).device
        size = sum(self._sizes)
        self._buffer = torch.zeros(size + 5 + len(self._sizes) + 2 * len(self._moved), device=device)
        every = [p for group in self._parameters.values() for p in group.values()]
        pieces = torch.split(self._buffer[:size], [p.numel() for p in every]) if every else ()
        self._deltas = [piece.view(p.shape) for piece, p in zip(pieces, every, strict=True)]
        self._tail = self._buffer[size:]

    @torch.no_grad()
    def add(self, update: ClientUpdate) -> Tensor | None:
        """Add a chunk of clients, but for those whose update is not finite.

        Returns:
            [C] bool, False for the clients that are left out; None where none is.
        """
        accepted = None
        if not _known_to_be_finite(update):
            accepted = update.reject()
            self._accepted.append((update.client, accepted))
        update.add_to(self._deltas)
        statistics = update.statistics
        clients = len(update.client)
        rejected = torch.zeros_like(statistics.skipped) if accepted is None else clients - accepted.sum()
        known = self._tail.new_tensor([statistics.rows, statistics.examples])
        weights = [update.weights[name].sum()[None] for name in self._parameters]
        losses = statistics.losses(self._moved).flatten()
        counts = torch.stack([clients - rejected, rejected])
        self._tail += torch.cat([counts, known, statistics.skipped[None], *weights, losses])
        return accepted

    def reject(self, clients: Sequence[tuple[int, str]]) -> None:
        """Count clients that cannot be trained, each with the reason."""
        if clients:
            self._tail[1] += len(clients)
            self._unusable += clients

    def rejected(self) -> list[tuple[int, str]]:
        """The clients of this process that were left out, as indices, and the reasons; asks the device."""
        diverged = [client for clients, accepted in self._accepted for client in clients[~accepted].tolist()]
        return [(client, "its update is not finite") for client in diverged] + self._unusable

    @torch.no_grad()
    def finish(self, reduce: Callable[[Tensor], Tensor], number: int) -> dict[str, Tensor]:
        """Sum over processes, and leave the pseudo-gradient (server - mean of clients) in the server's `.grad`.

        Args:
            reduce: sums a tensor over processes.
            number: of the round, for messages.

        Returns:
            Figures of the round by name.

        Raises:
            DivergenceError: too many updates are not finite.
        """
        self._buffer = total = reduce(self._buffer)
        size = len(total) - len(self._tail)
        tail = total[size:]
        clients, rejected, rows, examples, skipped = tail[:5]
        weights = tail[5 : 5 + len(self._sizes)].clamp_min(torch.finfo(torch.float32).tiny)
        pseudo_gradient = total[:size]
        for piece, weight in zip(torch.split(pseudo_gradient, self._sizes) if size else (), weights, strict=False):
            piece /= -weight
        # The only question to the device in a round.
        finite, left_out, trained = torch.stack([pseudo_gradient.sum().isfinite().float(), rejected, clients]).tolist()
        self.any_rejected = left_out > 0
        if not finite or left_out > self._max_rejected * (left_out + trained):
            raise DivergenceError(
                f"round {number}: the updates of {left_out:.0f} of {left_out + trained:.0f} clients are not finite or "
                f"their data cannot be used, more than the share of {self._max_rejected} that may be left out "
                "(model.max_rejected). If their training diverged, lower the learning rate of "
                "model.loop.client_optimizer, or start from the last checkpoint with a lower one."
            )
        start = 0
        for p in (p for group in self._parameters.values() for p in group.values()):
            p.grad = pseudo_gradient[start : start + p.numel()].view(p.shape)
            start += p.numel()
        figures = {
            "clients": clients,
            "rejected_clients": rejected,
            "examples": examples,
            "padding": 1 - examples / rows.clamp_min(1),
            "update_norm": pseudo_gradient.norm(),
            "skipped_steps": skipped,
        }
        for name, (loss, steps) in zip(self._moved, tail[5 + len(self._sizes) :].view(-1, 2), strict=True):
            figures[f"{name}_loss"] = loss / steps.clamp_min(1)
        return figures


def _known_to_be_finite(update: ClientUpdate) -> bool:
    """Whether all that clients send and keep is known to be finite, as it nearly always is.

    To ask for that costs little on the CPU, and would make another device wait: there it is never known, and clients
    are looked at one by one.
    """
    return update.client.device.type == "cpu" and bool(update.finite())


def sent_parameters(method: Method) -> dict[str, dict[str, nn.Parameter]]:
    """The server's parameters that clients send an update of, by group and name, in the order of the updates."""
    server = {name: dict(method.modules[name].named_parameters()) for name in method.modules}
    client = method.start(server_groups(method))
    return {name: {key: server[name][key] for key in client[source]} for name, source in method.shared.items()}


def server_groups(method: Method) -> Groups:
    """The server's parameters by group, as plain tensors: clients never write them nor take gradients of them."""
    return {name: {key: p.detach() for key, p in module.named_parameters()} for name, module in method.modules.items()}
