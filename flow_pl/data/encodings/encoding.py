"""Encode a client's published examples as rows of numbers; one class per kind of example.

An encoding knows its columns but not files; a reader knows files but not the meaning of their columns. Any reader works
with any encoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray
from torch import Tensor

from flow_pl.data.encodings.values import Columns
from flow_pl.data.encodings.vocabulary import Vocabulary
from flow_pl.data.store.features import Features

Vocabularies = Mapping[str, Vocabulary]
"""Vocabularies by their names in an encoding."""


class Rows(NamedTuple):
    """Holds a client's examples as stored.

    Attributes:
        x: [n, ...] features, or several by name; the number of rows may differ from that of the examples.
        y: [n] or [n, ...] targets.
    """

    x: Features
    y: NDArray[Any]


class VocabularySource(NamedTuple):
    """Describes where a vocabulary comes from.

    Attributes:
        size: largest number of tokens.
        characters: the tokens, each a character; None = not known in advance.
        path: file of the tokens, see `read_tokens`; None = no file. Without both, the tokens are the most frequent ones
            of the training clients.
    """

    size: int
    characters: str | None = None
    path: str | None = None

    @property
    def is_counted(self) -> bool:
        """Return whether the tokens are counted over the training clients."""
        return self.path is None and self.characters is None


class Encoding(ABC):
    """Turns examples into rows; the settings of a subclass are its public attributes, of JSON types."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns to read."""

    @abstractmethod
    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Turn one client's examples into rows.

        Args:
            columns: the examples, at least one.
            vocabularies: the vocabularies that `vocabularies` asks for, by name.

        Returns:
            The rows, of the same shape and type for every client.

        Raises:
            UnusableError: there is no row.
            DataError: the examples do not suit the encoding.
        """

    def can_be_learned_from(self, rows: Rows) -> bool:
        """Return whether a client's training rows hold more than unknown tokens."""
        return True

    def options(self) -> dict[str, Any]:
        """Return everything that the rows depend on, as JSON types."""
        return {"encoding": type(self).__name__, **vars(self)}

    def vocabularies(self) -> dict[str, VocabularySource]:
        """Return the sources of the necessary vocabularies, by name."""
        return {}

    def tokens(self, columns: Columns) -> Iterable[tuple[str, Iterable[str]]]:
        """Yield the tokens of one client's examples to count, each with the name of its vocabulary."""
        return ()

    def class_count(self, vocabularies: Vocabularies) -> int | None:
        """Return the number of classes; None = the largest label + 1."""
        return None

    def label_names(self) -> Sequence[str]:
        """Return the class names in the order of their numbers; empty if unnamed."""
        return getattr(self, "classes", None) or ()

    def token_names(self) -> Sequence[str]:
        """Return the tokens in the order of their numbers, unless `vocabularies` has them; otherwise none."""
        return ()

    def unpack(self, x: Tensor) -> Tensor:
        """Undo what saves space in the store; runs on the device.

        Args:
            x: features as stored, with any leading axes; one of several by name.

        Returns:
            The features, which `FederatedDataModule.transform` turns into inputs of a model.
        """
        return x
