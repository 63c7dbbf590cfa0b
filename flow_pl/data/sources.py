"""Published parts of a data set (training, test, ...): their clients by name, and how the parts belong together.

A client may be in several parts: its training examples in one file, its test examples in another. Or a part has clients
of its own, who are never trained on.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from flow_pl.data.encoding import Columns
from flow_pl.data.store import Role
from flow_pl.errors import DataError

Part = Literal["train", "test", "validation", "heldout"]
"""Training examples; test examples; clients for validation; clients that are new at the end."""


class RawClient(NamedTuple):
    """One client's examples in one part.

    Attributes:
        name: the client's name.
        columns: its examples; none, where the columns are empty.
        source: the file they come from.
    """

    name: str
    columns: Columns
    source: str

    def checked(self) -> RawClient:
        """The same client.

        Raises:
            DataError: its columns are not of one length; the message names the file and the client.
        """
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"{self.source}: client {self.name!r} has columns of different lengths, {lengths}: mend the file."
            )
        return self


class Record(NamedTuple):
    """One client's examples in all parts.

    Attributes:
        name: the client's name, unique among all parts.
        parts: its examples to train or to personalize on, and those of its test part if it has one.
        role: whether the client is to be trained on.
        has_split: whether the data says which of the examples are for testing.
    """

    name: str
    parts: tuple[RawClient, ...]
    role: Role
    has_split: bool


@dataclass(frozen=True)
class Selection:
    """Which clients and examples are read.

    Attributes:
        columns: names of the columns.
        max_examples: number of examples of a client in a part; the first ones are read; None = all.
        client_fraction: share of the clients.
        seed: seed of the choice of the clients.
    """

    columns: tuple[str, ...]
    max_examples: int | None = None
    client_fraction: float = 1.0
    seed: int = 0

    def keeps(self, name: str) -> bool:
        """Whether a client is read: drawn by its name alone, thus the same in every part, whatever their order."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.client_fraction * 2**64


class Source(ABC):
    """One part of a data set, which gives each client once."""

    @abstractmethod
    def __iter__(self) -> Iterator[RawClient]:
        """The clients that have not been taken, in their order."""

    @abstractmethod
    def take(self, name: str) -> RawClient | None:
        """The client of a name, or None where the part has none."""

    def close(self) -> None:  # noqa: B027 (not every source has something open)
        """Close the files."""


def joined(
    train: Source, test: Source | None, validation: Source | None, heldout: Source | None, same_clients: bool
) -> Iterator[Record]:
    """The clients of all parts.

    Args:
        train: training examples.
        test: test examples.
        validation: clients that are only evaluated on after a round.
        heldout: clients that are new at the end.
        same_clients: whether a name means the same client in the training and the test part; otherwise the test part
            has clients of its own, who are new.

    Yields:
        The clients of the training part, each with its test examples, and then the other ones.
    """
    matched = test is not None and same_clients
    for client in train:
        tested = test.take(client.name) if test is not None and same_clients else None
        if tested is not None and not _count(client):  # nothing to train on: a new client
            yield Record(client.name, (tested,), "test", False)
        else:
            yield Record(client.name, (client,) if tested is None else (client, tested), "train", matched)
    others: list[tuple[Source | None, Role]] = [(validation, "validation"), (heldout, "test"), (test, "test")]
    for source, role in others:
        for client in source or ():
            apart = source is test and not same_clients
            yield Record(f"test/{client.name}" if apart else client.name, (client,), role, False)


def _count(client: RawClient) -> int:
    return min(len(column) for column in client.columns.values())
