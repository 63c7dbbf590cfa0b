"""Read the published parts of a data set (training, test, ...) by client, and join them.

A client may be in several parts: its training examples in one file, its validation and test examples in others. A part
may also have its own clients, which are not trained on.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from flow_pl.data.encodings.values import Columns
from flow_pl.data.store.client_store import Role
from flow_pl.errors import DataError

Part = Literal["train", "test", "validation", "heldout"]
"""Training examples; test examples; validation examples; clients that are tested as new clients."""

_APART = "test/"


class RawClient(NamedTuple):
    """Holds one client's examples in one part.

    Attributes:
        name: name of the client.
        columns: examples of the client; empty columns for none.
        source: file of the examples.
    """

    name: str
    columns: Columns
    source: str

    def checked(self) -> RawClient:
        """Check the client and return it.

        Raises:
            DataError: its columns have different lengths; the message names the file and the client.
        """
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"{self.source}: client {self.name!r} has columns of different lengths, {lengths}: correct the file."
            )
        return self


class Record(NamedTuple):
    """Holds one client's examples in all parts.

    Attributes:
        name: name of the client, unique among all parts.
        train: its examples to train or to personalize on.
        validation: its validation examples; None = the data does not specify them.
        test: its test examples; None = the data does not specify them.
        role: whether the client is trained on.
    """

    name: str
    train: RawClient
    validation: RawClient | None
    test: RawClient | None
    role: Role


@dataclass(frozen=True)
class Selection:
    """Selects the clients and examples to read.

    Attributes:
        columns: names of the columns.
        max_examples: largest number of examples of a client in a part, taken from the start; None = all.
        client_fraction: share of the clients.
        seed: seed of the choice of the clients.
    """

    columns: tuple[str, ...]
    max_examples: int | None = None
    client_fraction: float = 1.0
    seed: int = 0

    def keeps(self, name: str) -> bool:
        """Return whether to read a client, drawn by its name alone: the same in every part, in any order."""
        return _draw(f"{self.seed}/{name}") < self.client_fraction * 2**64


class Source(ABC):
    """Reads one part of a data set; each client can be taken once."""

    @abstractmethod
    def __iter__(self) -> Iterator[RawClient]:
        """Yield the clients that have not been taken, in order."""

    @abstractmethod
    def take(self, name: str) -> RawClient | None:
        """Return a client by name; None if the part lacks it."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Return the names of all selected clients, in any order; reads no examples unless it must."""

    def close(self) -> None:  # noqa: B027 (not every source has something open)
        """Close the files."""


def joined(
    train: Source,
    test: Source | None,
    validation: Source | None,
    heldout: Source | None,
    same_clients: bool,
) -> Iterator[Record]:
    """Join the clients of all parts.

    Args:
        train: training examples.
        test: test examples.
        validation: validation examples; a client without other examples is only evaluated on after rounds.
        heldout: clients that are tested as new clients.
        same_clients: whether a name means the same client in all parts; otherwise the test and validation parts have
            their own clients, which are new.

    Yields:
        The clients of the training part, each with its validation and test examples, and then the others.
    """
    matched = (validation, test) if same_clients else (None, None)
    for client in train:
        yield _record(client, *(_of_client(source, client) for source in matched))
    rest: list[tuple[Source | None, Role]] = [(validation, "validation"), (heldout, "test"), (test, "test")]
    for source, role in rest:
        for client in source or ():
            apart = source is test and not same_clients
            yield Record(f"{_APART}{client.name}" if apart else client.name, client, None, None, role)


def new_clients(names: Iterable[str], fraction: float, seed: int) -> frozenset[str]:
    """Draw a share of the clients by their names.

    Args:
        names: names of all clients, in any order.
        fraction: share to draw, at least 0 and less than 1.
        seed: seed of the draw.

    Returns:
        The names drawn; their number is the share, rounded half up, but never all.
    """
    ranked = sorted(set(names), key=lambda name: (_draw(f"new/{seed}/{name}"), name))
    return frozenset(ranked[: min(int(len(ranked) * fraction + 0.5), len(ranked) - 1)])


def _record(train: RawClient, validation: RawClient | None, test: RawClient | None) -> Record:
    if _count(train):
        return Record(train.name, train, validation, test, "train")
    # without training examples it is new, and personalized on validation examples, or else on some test examples
    given = [part for part in (validation, test) if part is not None and _count(part)]
    if not given:
        return Record(train.name, train, None, None, "train")
    return Record(train.name, given[0], None, given[1] if len(given) > 1 else None, "test")


def _of_client(source: Source | None, client: RawClient) -> RawClient | None:
    """Return a client's examples in another part; none if the part lacks it."""
    if source is None:
        return None
    return source.take(client.name) or client._replace(columns=dict.fromkeys(client.columns, ()))


def _count(client: RawClient) -> int:
    return min(len(column) for column in client.columns.values())


def _draw(text: str) -> int:
    """Draw a number below 2 ** 64 that depends only on a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
