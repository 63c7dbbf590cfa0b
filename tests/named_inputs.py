"""Clients whose instances are a mapping (token ids and their mask), and a backbone that takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from flow_pl.data.batch import ClientBatch, Examples
from tests.support import CLASSES, chunk

TOKENS, LENGTH = 11, 4

Inputs = dict[str, Tensor]


class MaskedMean(nn.Module):
    """Embeds tokens and averages over those that the mask has: NaN for an instance with an empty mask."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Inputs) -> Tensor:
        mask = x["attention_mask"].to(torch.float32)
        hidden = self.linear(self.table(x["input_ids"])).tanh()
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def encoder(seed: int = 0) -> nn.Sequential:
    """A backbone that takes the mapping."""
    torch.manual_seed(seed)
    return nn.Sequential(MaskedMean(), nn.Tanh(), nn.Linear(5, CLASSES))


def tokens(sizes: Sequence[int], seed: int, longest: int) -> Inputs:
    """Instances [C, N, ...] by name; in the padding every client's first one is repeated."""
    random = np.random.default_rng(seed)
    ids = torch.from_numpy(random.integers(1, TOKENS, (len(sizes), longest, LENGTH)))
    mask = torch.arange(LENGTH) < torch.from_numpy(random.integers(1, LENGTH + 1, (len(sizes), longest, 1)))
    for i, size in enumerate(sizes):
        ids[i, size:], mask[i, size:] = ids[i, 0].clone(), mask[i, 0].clone()
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def named_chunk(sizes: Sequence[int], epochs: int = 2, seed: int = 0) -> ClientBatch:
    """As `tests.support.chunk`, with instances that are a mapping."""
    batch = chunk(sizes, epochs, seed)

    def named(examples: Examples, seed: int) -> Examples:
        return replace(examples, x=tokens(examples.sizes, seed, examples.mask.shape[1]))

    assert batch.heldout is not None
    return replace(batch, train=named(batch.train, seed), heldout=named(batch.heldout, seed + 1))


def write_npz(path: str, clients: int = 6, seed: int = 0, **changed: np.ndarray) -> str:
    """A file of clients, each with its own number of sentences; the label is told by the mean token."""
    random = np.random.default_rng(seed)
    sizes = random.integers(8, 20, clients)
    rows = int(sizes.sum())
    lengths = random.integers(1, LENGTH + 1, (rows, 1))
    mask = np.arange(LENGTH) < lengths
    ids = random.integers(1, TOKENS, (rows, LENGTH)) * mask
    y = np.digitize(ids.sum(1) / mask.sum(1), [4.5, 6.5])
    arrays = {"ids": ids, "mask": mask, "y": y, "client": np.repeat(np.arange(clients), sizes)}
    np.savez(path, **{**arrays, **changed})
    return path
