"""Published parts of a data set (training, test, ...): their clients by name, and how the parts belong together.

A client may be in several parts: its training examples in one file, its validation and test examples in others. Or a
part has clients of its own, who are never trained on.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from flow_pl.data.encodings.encoding import Columns
from flow_pl.data.store.client_store import Role
from flow_pl.errors import DataError

Part = Literal["train", "test", "validation", "heldout"]
"""Training examples; test examples; validation examples; clients that are new at the end."""

_APART = "test/"


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
        train: its examples to train or to personalize on.
        validation: its validation examples; None = the data does not say which they are.
        test: its test examples; None = the data does not say which they are.
        role: whether the client is to be trained on.
    """

    name: str
    train: RawClient
    validation: RawClient | None
    test: RawClient | None
    role: Role


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
        return _draw(f"{self.seed}/{name}") < self.client_fraction * 2**64


class Source(ABC):
    """One part of a data set, which gives each client once."""

    @abstractmethod
    def __iter__(self) -> Iterator[RawClient]:
        """The clients that have not been taken, in their order."""

    @abstractmethod
    def take(self, name: str) -> RawClient | None:
        """The client of a name, or None where the part has none."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Names of all the clients that are selected, in any order; reads no examples where it need not."""

    def drop(self, name: str) -> None:
        """Pass over the client of a name, if the part has it; reads no examples where it need not."""
        self.take(name)

    def close(self) -> None:  # noqa: B027 (not every source has something open)
        """Close the files."""


def joined(
    train: Source,
    test: Source | None,
    validation: Source | None,
    heldout: Source | None,
    same_clients: bool,
    written: Collection[str] = (),
) -> Iterator[Record]:
    """The clients of all parts.

    Args:
        train: training examples.
        test: test examples.
        validation: validation examples; a client that has no others is only evaluated on after a round.
        heldout: clients that are new at the end.
        same_clients: whether a name means the same client in all parts; otherwise the test part has clients of its own,
            who are new, and so has the validation part.
        written: names of records that are not needed, in the order in which they come here.

    Yields:
        The clients of the training part, each with its validation and test examples, and then the other ones.
    """
    for name in written:
        for source in (train, validation, heldout, test if same_clients else None):
            if source is not None:
                source.drop(name)
        if test is not None and not same_clients and name.startswith(_APART):
            test.drop(name.removeprefix(_APART))
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
        names: all of them, in any order.
        fraction: the share, at least 0 and less than 1.
        seed: seed of the draw.

    Returns:
        The names of as many as is nearest to the share, halves up, but never of all.
    """
    ranked = sorted(set(names), key=lambda name: (_draw(f"new/{seed}/{name}"), name))
    return frozenset(ranked[: min(int(len(ranked) * fraction + 0.5), len(ranked) - 1)])


def _record(train: RawClient, validation: RawClient | None, test: RawClient | None) -> Record:
    if _count(train):
        return Record(train.name, train, validation, test, "train")
    # without an example to train on it is new, and personalized on the validation examples, or else on some of the test
    given = [part for part in (validation, test) if part is not None and _count(part)]
    if not given:
        return Record(train.name, train, None, None, "train")
    return Record(train.name, given[0], None, given[1] if len(given) > 1 else None, "test")


def _of_client(source: Source | None, client: RawClient) -> RawClient | None:
    """A client's examples in another part, none where that part does not have it."""
    if source is None:
        return None
    return source.take(client.name) or client._replace(columns=dict.fromkeys(client.columns, ()))


def _count(client: RawClient) -> int:
    return min(len(column) for column in client.columns.values())


def _draw(text: str) -> int:
    """A number below 2 ** 64 that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
