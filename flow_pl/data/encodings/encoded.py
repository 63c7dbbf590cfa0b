"""The base class of readers of published files, whose examples an encoding turns into rows."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from flow_pl.data.datamodule import FederatedDataModule
from flow_pl.data.encodings.encoding import Encoding, Rows
from flow_pl.data.encodings.vocabulary import Vocabulary
from flow_pl.data.readers.sources import Part, RawClient, Record, Selection, Source, joined, new_clients
from flow_pl.data.store.cache import file_identity
from flow_pl.data.store.client_checks import UnusableError
from flow_pl.data.store.counting import kept_vocabularies
from flow_pl.data.store.writer import ClientData
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.utils.inputs import zip_inputs
from flow_pl.utils.validation import given, require_count

_TRAIN: tuple[Part] = ("train",)


class EncodedData(FederatedDataModule):
    """Provides clients of published files, whose examples an encoding turns into rows.

    A reader of a file format is a subclass with `source` and `source_options`, and with `parts` if it has other parts
    than training examples.

    A vocabulary does not count the tokens of new clients. Unless the data names them, new clients are drawn by their
    names before counting, and recorded in the store, which therefore depends on `new_client_fraction` and `split_seed`.
    All training examples of the other clients count, even if some become validation or test rows later (`val_fraction`,
    `test_fraction`) or the client is excluded by `min_examples`: these settings concern rows, which exist only after
    encoding. Validation and test examples in separate parts never count.

    Args:
        encoding: how a client's examples become rows, given by its class: `Images`, `Vectors`, `NextWord`,
            `NextCharacter`, `CharacterAfterWindow`, `TokenSequences`, `TagPrediction`, `TokenizedTexts`.
        max_examples: largest number of examples read of a client in each part of the data, taken from the start; null =
            all.
        client_fraction: share of the clients to read, drawn by `split_seed`.
        same_clients: whether a name means the same client in the training, validation and test files; otherwise the
            test and validation files have their own clients, which are new.
        unusable_clients: what to do with a client that nothing can be learned from (no examples, no text, only unknown
            tokens, or no label): "error" = stop, "skip" = leave it out with a warning.
        **kwargs: settings of every data set, see `FederatedDataModule`.

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    def __init__(
        self,
        encoding: Encoding,
        max_examples: int | None = None,
        client_fraction: float = 1.0,
        same_clients: bool = True,
        unusable_clients: Literal["error", "skip"] = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(unusable_clients=unusable_clients, **kwargs)
        require_count(**given(max_examples=max_examples))
        if not 0 < client_fraction <= 1:
            raise ConfigurationError(
                f"client_fraction is {client_fraction}, expected a share greater than 0 and at most 1."
            )
        self.encoding = encoding
        self._selection = Selection(encoding.columns, max_examples, client_fraction, self.split_seed)
        self._same_clients = same_clients

    @abstractmethod
    def source(self, part: Part, selection: Selection) -> Source | None:
        """Open a part of the data; None if it does not exist. The part to train on always exists."""

    @property
    def parts(self) -> Collection[Part]:
        """Return the existing parts, which include one to train on."""
        return _TRAIN

    @abstractmethod
    def source_options(self) -> dict[str, Any]:
        """Return what identifies the source, as JSON types."""

    def obtain(self) -> None:
        """Fetch the files of the source, if that is allowed."""

    def prepare_data(self) -> None:
        """Fetch missing files, if that is allowed, and write the client store unless it exists.

        Raises:
            DataError: the source is missing or cannot be used.
            ConfigurationError: the cache cannot be written to.
        """
        self.obtain()
        super().prepare_data()

    def options(self) -> dict[str, Any]:
        """Return the source, the selection from it, and its encoding."""
        selection, sources = self._selection, self.encoding.vocabularies().values()
        return {
            "source": self.source_options(),
            "encoding": self.encoding.options(),
            "vocabularies": [file_identity(Path(source.path)) for source in sources if source.path],
            "max_examples": selection.max_examples,
            "clients": [selection.client_fraction, selection.seed] if selection.client_fraction < 1 else None,
            "new_clients": [self.new_client_fraction, self.split_seed] if self._draws_new_clients else None,
            "same_clients": self._same_clients,
            "skip_unusable": self.unusable_clients == "skip",
        }

    def class_count(self) -> int | None:
        """Return the encoding's number of classes."""
        return self.encoding.class_count(self.vocabularies)

    def label_names(self) -> Sequence[str]:
        """Return the encoding's class names."""
        return self.encoding.label_names()

    def transform(self, x: Tensor) -> Tensor:
        """Unpack the features and turn them into inputs of a model; see `FederatedDataModule.transform`."""
        return super().transform(self.encoding.unpack(x))

    def token_names(self) -> Sequence[str]:
        """Return the tokens of the encoding's tokenizer in the order of their numbers; none without a tokenizer."""
        return self.encoding.token_names()

    @cached_property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """Return the vocabularies of the encoding by name; stored beside the client store, so they are counted once.

        Raises:
            DataError: the source cannot be used, or a vocabulary is empty.
        """
        path = self.store_path.with_suffix(".vocabulary.json")
        return kept_vocabularies(path, self.encoding, self._counted_clients)

    def clients(self) -> Iterator[ClientData]:
        """Read the parts of the source, one client at a time.

        Yields:
            The clients of the training part, each with its validation and test examples, and then the clients of
            other parts.

        Raises:
            DataError: the source cannot be used; the message names the file and the client.
        """
        with contextlib.ExitStack() as stack:
            sources = {part: self._open(part, stack) for part in ("train", "test", "validation", "heldout")}
            for record in joined(**sources, same_clients=self._same_clients):
                try:
                    yield self._encoded(record)
                except UnusableError:
                    if self.unusable_clients == "error":
                        raise
                    self._left_out.append(record.name)

    def _open(self, part: Part, stack: contextlib.ExitStack) -> Any:
        source = self.source(part, self._selection)
        return None if source is None else stack.enter_context(contextlib.closing(source))

    def _counted_clients(self) -> Iterator[RawClient]:
        """Yield the clients whose tokens count for the vocabularies."""
        with contextlib.ExitStack() as stack:
            for client in self._open("train", stack):
                if client.name not in self._new_clients:
                    yield client

    @property
    def _draws_new_clients(self) -> bool:
        """Return whether the new clients are drawn before the vocabulary is counted."""
        counted = any(source.is_counted for source in self.encoding.vocabularies().values())
        named = "heldout" in self.parts or ("test" in self.parts and not self._same_clients)
        return counted and not named and self.new_client_fraction > 0

    @property
    def _fraction_to_draw(self) -> float:
        return 0.0 if self._draws_new_clients else self.new_client_fraction

    @cached_property
    def _new_clients(self) -> frozenset[str]:
        """Return the names of the clients of the training part that are drawn as new clients."""
        if not self._draws_new_clients:
            return frozenset()
        with contextlib.ExitStack() as stack:
            return new_clients(self._open("train", stack).names(), self.new_client_fraction, self.split_seed)

    def _encoded(self, record: Record) -> ClientData:
        train = self._rows(record.train)
        if not self.encoding.can_be_learned_from(train):
            raise _unusable(record.train, "has only tokens that are not in the vocabulary")
        val, val_rows = self._heldout(record.validation)
        test, test_rows = self._heldout(record.test)
        xs, ys = zip(train, *val, *test, strict=True)
        x, y = zip_inputs(lambda *parts: np.concatenate(parts), *xs), np.concatenate(ys)
        role = "test" if record.role == "train" and record.name in self._new_clients else record.role
        return ClientData(record.name, x, y, val_rows, test_rows, role, record.train.source)

    def _heldout(self, client: RawClient | None) -> tuple[list[Rows], int | None]:
        """Return the rows to evaluate on and their number; None = the data does not specify them."""
        if client is None:
            return [], None
        try:
            rows = self._rows(client)
        except UnusableError:  # the client can still be trained on
            return [], 0
        return [rows], len(rows.y)

    def _rows(self, client: RawClient) -> Rows:
        if not all(len(column) for column in client.columns.values()):
            raise _unusable(client, "has no examples")
        try:
            return self.encoding.encode(client.columns, self.vocabularies)
        except UnusableError as error:
            raise _unusable(client, error) from error
        except DataError as error:
            raise DataError(f"{client.source}: client {client.name!r} {error}") from error


def _unusable(client: RawClient, found: object) -> UnusableError:
    return UnusableError(
        f"{client.source}: client {client.name!r} {found}: correct the file, or set unusable_clients to skip."
    )
