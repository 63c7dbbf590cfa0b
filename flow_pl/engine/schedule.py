"""Plan which examples each client of a chunk sees at each step of a phase, and how many clients are still active."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from flow_pl.data.batch import FOLD_BIT, FOLDS, GLOBAL, LOCAL, ClientBatch, fold_size, part_sizes
from flow_pl.errors import ConfigurationError
from flow_pl.methods.steps import Minibatch, Part
from flow_pl.utils.inputs import Inputs, leaves, map_inputs, take

GATHERED_BYTES = 1 << 22
"""The examples of several steps are gathered at once, up to this size, since a gather of a few costs as much as one of
many."""


@dataclass(frozen=True)
class Schedule:
    """The minibatches of a phase.

    Attributes:
        index: [S, C, B] int64, rows of the chunk's examples flattened to [C * N, ...].
        mask: [S, C, B] bool, False where a client's last minibatch of an epoch is not full.
        active: for each step, how many clients have a minibatch. Clients come in order of decreasing size, so
            the active ones are a prefix; a client without minibatches left costs nothing.
        examples: real examples in all steps, of the sum(active) * B rows that are computed.
    """

    index: Tensor
    mask: Tensor
    active: tuple[int, ...]
    examples: int


def part_mask(batch: ClientBatch, part: Part) -> Tensor:
    """Return which training examples belong to a part: [C, N] bool."""
    if part == "all":
        return batch.train.mask
    if part in ("fold", "other_folds"):
        inside = batch.part >> FOLD_BIT == batch.round % FOLDS
        return batch.train.mask & (inside if part == "fold" else ~inside)
    return (batch.part & (LOCAL if part == "local" else GLOBAL)).bool()


def count(n: int, part: Part, number: int) -> int:
    """Return how many of a client's n training examples belong to a part in a round."""
    if part == "all":
        return n
    if part in ("fold", "other_folds"):
        fold = fold_size(n, number % FOLDS)
        return fold if part == "fold" else n - fold
    return part_sizes(n)[0 if part == "local" else 1]


def make_schedule(batch: ClientBatch, part: Part, orders: range, batch_size: int) -> Schedule:
    """Cut each client's part into minibatches, epoch by epoch, in the drawn order.

    A client starts its next epoch as soon as it has finished one, without waiting for larger clients. An epoch's last
    minibatch holds the remaining examples.

    Args:
        batch: the chunk of clients, in order of decreasing size.
        part: part of the clients' data.
        orders: which of the drawn orders, one for each epoch.
        batch_size: examples in a minibatch (B).

    Raises:
        ConfigurationError: fewer orders were drawn than are needed.
    """
    epochs = len(orders)
    if batch.order.shape[1] < orders.stop:
        raise ConfigurationError(
            f"the batch has {batch.order.shape[1]} minibatch orders of each client, expected {orders.stop}: create it "
            "with the number of FederatedLoop.orders."
        )
    C, N = batch.train.mask.shape
    device = batch.order.device
    # Sizes are known on the host, so planning reads nothing from the device.
    sizes = [count(n, part, batch.round) for n in batch.train.sizes]
    per_epoch = [-(-n // batch_size) for n in sizes]
    total = epochs * max(per_epoch, default=0)
    lengths = np.array(per_epoch, dtype=np.int64) * epochs
    active = tuple((lengths > np.arange(total)[:, None]).sum(1).tolist())

    picks = batch.order[:, orders.start : orders.stop]
    if part != "all":
        # The part's examples first, in the order drawn; the sort is stable.
        outside = ~part_mask(batch, part)[:, None].expand(C, epochs, N).gather(2, picks)
        picks = picks.gather(2, outside.byte().argsort(dim=2, stable=True))
    n = torch.tensor(sizes, device=device).view(1, C, 1)
    steps = torch.tensor(per_epoch, device=device).clamp_min(1).view(1, C, 1)
    t = torch.arange(total, device=device).view(-1, 1, 1)
    epoch = t // steps
    slot = t % steps * batch_size + torch.arange(batch_size, device=device)
    mask = (epoch < epochs) & (slot < n)
    flat = (epoch * N + slot).masked_fill(~mask, 0)
    within = picks.reshape(C, epochs * N).gather(1, flat.transpose(0, 1).reshape(C, -1)).view(C, total, batch_size)
    index = within.transpose(0, 1) + (torch.arange(C, device=device) * N).view(1, C, 1)
    return Schedule(index.contiguous(), mask, active, epochs * sum(sizes))


def minibatches(schedule: Schedule, x: Inputs, y: Tensor) -> Iterator[tuple[int, Minibatch]]:
    """Yield the number of active clients A of each step, and their minibatches [A, B, ...].

    Args:
        schedule: the steps.
        x: features of the chunk's examples [C * N, ...].
        y: their targets [C * N, ...].
    """
    batch_size = schedule.index.shape[2]
    row = sum(t[:1].nbytes for t in leaves(x))
    for active, same in groupby(range(len(schedule.active)), key=schedule.active.__getitem__):
        steps = list(same)
        together = max(1, GATHERED_BYTES // max(1, active * batch_size * row))
        for start in range(steps[0], steps[-1] + 1, together):
            index = schedule.index[start : min(start + together, steps[-1] + 1), :active]
            rows = index.reshape(-1)

            def gather(t: Tensor, rows: Tensor = rows, shape: torch.Size = index.shape) -> Tensor:
                return t.index_select(0, rows).view(*shape, *t.shape[1:])

            xs, ys = map_inputs(gather, x), gather(y)
            for i in range(len(index)):
                yield active, Minibatch(take(xs, i), ys[i], schedule.mask[start + i, :active])
