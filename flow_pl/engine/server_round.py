"""The server's side of a round: sum the clients' updates into one buffer, reduce it once, make it a pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flow_pl.engine.aggregation import Aggregation, AggregationError, CohortAggregation, CohortUpdates, Mean
from flow_pl.engine.attacks import Attack
from flow_pl.engine.client_norms import scaled_weights
from flow_pl.engine.client_update import ClientUpdate
from flow_pl.engine.compression import Compression
from flow_pl.engine.privacy import GaussianMechanism
from flow_pl.errors import FlowError
from flow_pl.methods.base import Method
from flow_pl.methods.steps import Phase
from flow_pl.utils.groups import Groups


class DivergenceError(FlowError):
    """The clients' updates are not finite."""


EXTRAS = 5
"""Number of counts at the end of the buffer: half of the clients within the clipping norm minus half of the others;
attackers, their weight and that of all clients; clients whose data cannot be used."""


class ServerRound:
    """Sums the clients' updates of a round on the device, in one flat float32 buffer.

    Args:
        method: the algorithm.
        max_rejected: largest share of the clients that may be left out of a round.
        aggregation: how the updates are combined; None for their mean.
        privacy: makes the mean differentially private; None for a plain mean.
        attack: the attack whose attackers are counted; None if there is none.
        compression: compression of the updates, to count bytes.
        folder: folder where an aggregation may keep a cohort on disk.

    Attributes:
        method: the method in this round.
        any_rejected: after `finish`, whether a client of any process was left out.
        empty: after `finish`, whether no client of any process has been trained.
        unknown: after `finish`, metrics that are undefined in the round because nothing relevant was trained.
    """

    def __init__(
        self,
        method: Method,
        max_rejected: float = 0.5,
        aggregation: Aggregation | None = None,
        privacy: GaussianMechanism | None = None,
        attack: Attack | None = None,
        compression: Compression | None = None,
        folder: Path | None = None,
    ) -> None:
        self.method = method
        self._max_rejected = max_rejected
        self._aggregation = Mean() if aggregation is None else aggregation
        self._privacy = privacy
        self._attack = attack
        self._accepted: list[tuple[Tensor, Tensor]] = []
        self._unusable: list[tuple[int, str]] = []
        self.any_rejected = False
        self.empty = False
        self.unknown: list[str] = []
        self._parameters = sent_parameters(method)
        stages = [stage for stage in method.phases if isinstance(stage, Phase)]
        self._moved = tuple(dict.fromkeys(step.moves for stage in stages for step in stage.steps))
        self._sizes = [sum(p.numel() for p in group.values()) for group in self._parameters.values()]
        # deltas | clients, rejected clients, rows, examples, skipped steps | weight of each shared group
        # | for each updated group: loss, steps | counts of privacy and attacks, see EXTRAS
        device = next(method.modules["global"].parameters()).device
        every = [p for group in self._parameters.values() for p in group.values()]
        # sent once: a client's group that is the update of several of the server's groups
        sources = dict(zip(method.shared.values(), self._parameters.values(), strict=True)).values()
        sent = [p.numel() for group in sources for p in group.values()]
        self._bytes_up = 4 * sum(sent) if compression is None else compression.bytes(sent)
        self._bytes_down = 4 * sum(self._sizes)
        self._cohort: CohortUpdates | None = None
        if isinstance(self._aggregation, CohortAggregation):
            on_disk = folder if self._aggregation.storage == "disk" else None
            self._cohort = CohortUpdates(sum(self._sizes), device, on_disk)
            every = []
        size = sum(p.numel() for p in every)
        self._buffer = torch.zeros(size + 5 + len(self._sizes) + 2 * len(self._moved) + EXTRAS, device=device)
        pieces = torch.split(self._buffer[:size], [p.numel() for p in every]) if every else ()
        self._deltas = [piece.view(p.shape) for piece, p in zip(pieces, every, strict=True)]
        self._tail = self._buffer[size:-EXTRAS]
        self._extras = self._buffer[-EXTRAS:]

    @torch.no_grad()
    def add(self, update: ClientUpdate) -> Tensor | None:
        """Add a chunk of clients, except those whose update is not finite.

        Returns:
            [C] bool, False for the excluded clients; None if there is none.
        """
        accepted = None
        if not _known_to_be_finite(update):
            accepted = update.reject()
            self._accepted.append((update.client, accepted))
        self._take(update, accepted)
        statistics = update.statistics
        clients = len(update.client)
        rejected = torch.zeros_like(statistics.skipped) if accepted is None else clients - accepted.sum()
        known = self._tail.new_tensor([statistics.rows, statistics.examples])
        weights = [update.weights[name].sum()[None] for name in self._parameters]
        losses = statistics.losses(self._moved).flatten()
        counts = torch.stack([clients - rejected, rejected])
        self._tail += torch.cat([counts, known, statistics.skipped[None], *weights, losses])
        return accepted

    def _take(self, update: ClientUpdate, accepted: Tensor | None) -> None:
        """Sum the updates, or hold them for the end of the round."""
        weights = update.weights
        if self._cohort is not None:
            self._cohort.add(update.client, update.difference, next(iter(weights.values())), accepted)
        elif self._privacy is not None:
            weights, within = self._privacy.clip(update.difference, weights)
            self._extras[0] += within
        else:
            factors = self._aggregation.factors(update.difference)
            if factors is not None:
                weights = scaled_weights(weights, factors)
        if self._cohort is None:
            replace(update, weights=weights).add_to(self._deltas)
        if self._attack is not None and weights:
            attackers, influence = self._attack.members(update.client), next(iter(weights.values()))
            if accepted is not None:
                attackers = attackers & accepted
            self._extras[1:4] += torch.stack([attackers.sum(), (influence * attackers).sum(), influence.sum()])

    def reject(self, clients: Sequence[tuple[int, str]]) -> None:
        """Count clients that cannot be trained, each with the reason."""
        if clients:
            self._tail[1] += len(clients)
            self._extras[4] += len(clients)
            self._unusable += clients

    def rejected(self) -> list[tuple[int, str]]:
        """Return the indices of this process's rejected clients, and the reasons; reads from the device."""
        diverged = [client for clients, accepted in self._accepted for client in clients[~accepted].tolist()]
        return [(client, "its update is not finite") for client in diverged] + self._unusable

    @torch.no_grad()
    def finish(
        self, reduce: Callable[[Tensor], Tensor], number: int, rank: int = 0, world_size: int = 1
    ) -> dict[str, Tensor]:
        """Sum over processes, and store the pseudo-gradient (server - mean of clients) in the server's `.grad`.

        Parameters that require no gradient (running statistics) become the clients' mean at once: no server optimizer
        may scale their change. Parameters of a group that is left to some of the clients, of whom none took part, get
        no gradient: a server optimizer with memory would move them.

        Args:
            reduce: sums a tensor over processes.
            number: number of the round, for messages.
            rank: index of this process.
            world_size: number of processes.

        Returns:
            Metrics of the round by name; losses, and the share of padding, only for groups that were trained.

        Raises:
            DivergenceError: too many updates are not finite.
            AggregationError: too few clients sent updates.
        """
        size = len(self._buffer) - len(self._tail) - EXTRAS
        if self._privacy is not None:
            self._privacy.perturb(self._buffer[:size], self._extras[0])
        self._buffer = total = reduce(self._buffer)
        tail, extras = total[size:-EXTRAS], total[-EXTRAS:]
        clients, rejected, rows, examples, skipped = tail[:5]
        weights = tail[5 : 5 + len(self._sizes)].clamp_min(torch.finfo(torch.float32).tiny)
        pseudo_gradient = total[:size]
        attacks: dict[str, Tensor] = {}
        if self._cohort is not None:
            pseudo_gradient, attacks = self._combined(self._cohort, reduce, rank, world_size, number)
        elif self._privacy is not None:
            pseudo_gradient /= -self._privacy.denominator
        else:
            for piece, weight in zip(torch.split(pseudo_gradient, self._sizes) if size else (), weights, strict=False):
                piece /= -weight
        if self._privacy is None:  # which divides by the expected cohort
            self._scale_by_cohort(pseudo_gradient, clients)
        # The only read from the device in a round
        losses = tail[5 + len(self._sizes) :].view(-1, 2)
        asked = [pseudo_gradient.sum().isfinite().float(), rejected, clients, extras[0], extras[4], rows]
        finite, left_out, trained, within, unusable, computed, *counts = torch.cat(
            [torch.stack(asked), tail[5 : 5 + len(self._sizes)], losses[:, 1]]
        ).tolist()
        influence, steps = dict(zip(self._parameters, counts, strict=False)), counts[len(self._sizes) :]
        self.any_rejected, self.empty = left_out > 0, trained + left_out == 0
        if not finite or left_out > self._max_rejected * (left_out + trained):
            raise DivergenceError(
                f"round {number}: the updates of {left_out:.0f} of {left_out + trained:.0f} clients are not finite or "
                f"their data cannot be used, more than the share of {self._max_rejected} that may be left out "
                "(model.max_rejected). If their training diverged, lower the learning rate of "
                "model.loop.client_optimizer, or start from the last checkpoint with a lower one."
            )
        start = 0
        for name, p in ((name, p) for name, group in self._parameters.items() for p in group.values()):
            difference = pseudo_gradient[start : start + p.numel()].view(p.shape)
            if not p.requires_grad:
                p.sub_(difference)
            elif influence[name] or not self.method.optional(name):
                p.grad = difference
            else:
                p.grad = None
            start += p.numel()
        figures = {
            "clients": clients,
            "rejected_clients": rejected,
            "examples": examples,
            "update_norm": pseudo_gradient.norm(),
            "skipped_steps": skipped,
            # in double precision, to count bytes exactly
            "bytes_up": torch.tensor((trained + left_out - unusable) * self._bytes_up, dtype=torch.float64),
            "bytes_down": torch.tensor((trained + left_out) * self._bytes_down, dtype=torch.float64),
        }
        if self._privacy is not None:
            figures["clip_norm"] = clients.new_tensor(self._privacy.clipping.norm)
            self._privacy.close_round(within)
        if self._attack is not None:
            tiny = torch.finfo(torch.float32).tiny
            figures |= {"attackers": extras[1], "attackers_weight": extras[2] / extras[3].clamp_min(tiny), **attacks}
        if computed:
            figures["padding"] = 1 - examples / rows
        # a loss over no examples would look like the lowest to a callback that monitors it
        figures |= {
            f"{name}_loss": loss / count
            for name, (loss, count), known in zip(self._moved, losses, steps, strict=True)
            if known
        }
        self.unknown = [
            name for name in ("padding", *(f"{moved}_loss" for moved in self._moved)) if name not in figures
        ]
        return figures

    @property
    def bytes_down(self) -> int:
        """Return the bytes that a client receives in a round."""
        return self._bytes_down

    def _scale_by_cohort(self, pseudo_gradient: Tensor, clients: Tensor) -> None:
        """Scale the changes that are shares of all clients' by how many took part of those expected, in place."""
        expected = self.method.cohort_size
        if expected is None or not self.method.by_cohort:
            return
        for name, piece in zip(self._parameters, torch.split(pseudo_gradient, self._sizes), strict=True):
            if name in self.method.by_cohort:
                piece *= clients / expected

    def _combined(
        self, cohort: CohortUpdates, reduce: Callable[[Tensor], Tensor], rank: int, world_size: int, number: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the pseudo-gradient of an aggregation over a whole cohort, and metrics of the attackers' influence."""
        assert isinstance(self._aggregation, CohortAggregation)
        cohort.gathered(reduce, rank, world_size)
        if not len(cohort):
            return torch.zeros(cohort.size, device=self._buffer.device), {}
        try:
            # the round ends within a training step, whose autocast would combine updates in half precision
            with torch.autocast(self._buffer.device.type, enabled=False):
                combined = self._aggregation.combine(cohort)
        except AggregationError as error:
            raise AggregationError(f"round {number}: {error}; the last checkpoint is intact.") from error
        if self._attack is None:
            return -combined.update, {}
        attackers = self._attack.members(cohort.client)
        return -combined.update, {
            "attackers_weight": (combined.influence * attackers).sum().float(),
            "attackers_left_out": ((combined.influence == 0) & attackers).sum().float(),
        }


def _known_to_be_finite(update: ClientUpdate) -> bool:
    """Return whether all that clients send and keep is known to be finite, as it nearly always is.

    The check costs little on the CPU, but would stall another device: there it is never known, and clients are checked
    one by one.
    """
    return update.client.device.type == "cpu" and bool(update.finite())


def sent_parameters(method: Method) -> dict[str, dict[str, nn.Parameter]]:
    """Return the server's parameters that clients update, by group and name, in the order of the updates."""
    server = trained_parameters(method)
    client = method.start(server_groups(method))
    return {name: {key: server[name][key] for key in client[source]} for name, source in method.shared.items()}


def changed_parameters(method: Method) -> list[str]:
    """Return the names of the server's parameters frozen or unfrozen since the method was bound."""
    return [
        f"{group}.{name}"
        for group, module in method.modules.items()
        for name, p in module.named_parameters()
        if not getattr(module, "averaged", False) and p.requires_grad != (name in method.trained[group])
    ]


def server_groups(method: Method) -> Groups:
    """Return the trained parameters by group, detached: clients never write to them nor differentiate them."""
    return {name: {key: p.detach() for key, p in group.items()} for name, group in trained_parameters(method).items()}


def trained_parameters(method: Method) -> dict[str, dict[str, nn.Parameter]]:
    """Return the server's parameters by group and name, without frozen ones, which are in no group."""
    return {
        name: {key: method.modules[name].get_parameter(key) for key in keys} for name, keys in method.trained.items()
    }
