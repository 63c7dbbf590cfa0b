"""The base of the readers of published files: from their clients' examples to rows, by way of an encoding."""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from flow_pl.data.cache import file_identity, progress
from flow_pl.data.datamodule import FederatedDataModule
from flow_pl.data.encoding import Encoding, Rows, UnusableError, VocabularySource
from flow_pl.data.sources import Part, RawClient, Record, Selection, Source, joined
from flow_pl.data.vocabulary import Vocabulary, most_frequent, read_tokens
from flow_pl.data.writer import ClientData
from flow_pl.errors import ConfigurationError, DataError, require_positive

_log = logging.getLogger(__name__)


class EncodedData(FederatedDataModule):
    """Clients of published files, whose examples an encoding turns into rows.

    A reader of a file format is a subclass with `source` and `source_options`.

    Args:
        encoding: how a client's examples become rows, by its class: `Images`, `Vectors`, `NextWord`, `NextCharacter`,
            `CharacterAfterWindow`, `TokenSequences`, `TagPrediction`.
        max_examples: largest number of examples of a client that are read, in each part of the data; the first ones
            count; null = all.
        client_fraction: share of the clients that are read, drawn by `split_seed`.
        same_clients: whether a name means the same client in the training and the test files; otherwise the test files
            have clients of their own, who are new.
        unusable_clients: what to do about a client that nothing can be learned from (without examples, without text, or
            with unknown tokens alone): "error" = stop, "skip" = leave it out.
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
        super().__init__(**kwargs)
        if max_examples is not None:
            require_positive(max_examples=max_examples)
        if not 0 < client_fraction <= 1:
            raise ConfigurationError(
                f"client_fraction is {client_fraction}, expected a share greater than 0 and at most 1."
            )
        self._encoding = encoding
        self._selection = Selection(encoding.columns, max_examples, client_fraction, self.split_seed)
        self._same_clients = same_clients
        self._skip_unusable = unusable_clients == "skip"

    @abstractmethod
    def source(self, part: Part, selection: Selection) -> Source | None:
        """Open a part of the data; None where there is no such part. There is always one to train on."""

    @abstractmethod
    def source_options(self) -> dict[str, Any]:
        """What identifies the source, of JSON types."""

    def obtain(self) -> None:
        """Fetch the files of the source where they are to be fetched."""

    def prepare_data(self) -> None:
        """Fetch what is to be fetched, and write the client store where it is not there yet.

        Raises:
            DataError: the source is not there or cannot be used.
            ConfigurationError: the cache cannot be written to.
        """
        self.obtain()
        super().prepare_data()

    def options(self) -> dict[str, Any]:
        """The source, what is read of it, and how it is encoded."""
        selection, sources = self._selection, self._encoding.vocabularies().values()
        return {
            "source": self.source_options(),
            "encoding": self._encoding.options(),
            "vocabularies": [file_identity(Path(source.path)) for source in sources if source.path],
            "max_examples": selection.max_examples,
            "clients": [selection.client_fraction, selection.seed] if selection.client_fraction < 1 else None,
            "same_clients": self._same_clients,
            "skip_unusable": self._skip_unusable,
        }

    def class_count(self) -> int | None:
        """What the encoding says."""
        return self._encoding.class_count(self.vocabularies)

    def transform(self, x: Tensor) -> Tensor:
        """Unpack the features and turn them into inputs of a model; see `FederatedDataModule.transform`."""
        return super().transform(self._encoding.unpack(x))

    @cached_property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """The vocabularies of the encoding by name; kept beside the client store, so that they are counted once.

        Raises:
            DataError: the source cannot be used, or a vocabulary is empty.
        """
        path = self._store_path().with_suffix(".vocabulary.json")
        wanted = self._encoding.vocabularies()
        if not wanted:
            return {}
        if not path.exists():
            found = self._tokens(wanted)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(found), encoding="utf-8")
                temporary.rename(path)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise ConfigurationError(
                    f"the vocabulary {path} cannot be written ({error}): set cache_dir, or the environment variable "
                    "FLOW_PL_CACHE, to a folder that can be written to, on a disk with room."
                ) from error
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return {name: Vocabulary(stored[name]) for name in wanted}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no usable vocabulary ({error}): delete it, it will be rebuilt.") from error

    def clients(self) -> Iterator[ClientData]:
        """Read the parts of the source, one client at a time.

        Yields:
            The clients of the training part, each with its test examples, and then those of the other parts.

        Raises:
            DataError: the source cannot be used; the message names the file and the client.
        """
        with contextlib.ExitStack() as stack:
            sources = {part: self._open(part, stack) for part in ("train", "test", "validation", "heldout")}
            skipped = 0
            for record in joined(**sources, same_clients=self._same_clients):
                try:
                    yield self._encoded(record)
                except UnusableError:
                    if not self._skip_unusable:
                        raise
                    skipped += 1
            if skipped:
                _log.info("%d clients with nothing to learn from: left out", skipped)

    def _open(self, part: Part, stack: contextlib.ExitStack) -> Any:
        source = self.source(part, self._selection)
        return None if source is None else stack.enter_context(contextlib.closing(source))

    def _encoded(self, record: Record) -> ClientData:
        first, *others = record.parts
        parts = [self._rows(first)]
        if not self._encoding.can_be_learned_from(parts[0]):
            raise _unusable(first, "has only tokens that are not in the vocabulary")
        for tested in others:
            with contextlib.suppress(UnusableError):  # without a row to test on, the client can still be trained on
                parts.append(self._rows(tested))
        x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        train_rows = len(parts[0].x) if record.has_split else None
        return ClientData(record.name, x, y, train_rows, record.role, first.source)

    def _rows(self, client: RawClient) -> Rows:
        if not all(len(column) for column in client.columns.values()):
            raise _unusable(client, "has no examples")
        try:
            return self._encoding.encode(client.columns, self.vocabularies)
        except UnusableError as error:
            raise _unusable(client, error) from error
        except DataError as error:
            raise DataError(f"{client.source}: client {client.name!r} {error}") from error

    def _tokens(self, wanted: dict[str, VocabularySource]) -> dict[str, list[str]]:
        counted = [name for name, source in wanted.items() if not (source.characters or source.path)]
        counts = self._counts() if counted else {}
        tokens = {}
        for name, source in wanted.items():
            if source.path:
                tokens[name] = read_tokens(Path(source.path), source.size)
            else:
                tokens[name] = list(source.characters or most_frequent(counts.get(name, Counter()), source.size))
            Vocabulary(tokens[name])  # an empty one is never written
        return tokens

    def _counts(self) -> dict[str, Counter[str]]:
        """How often each token occurs in the training part, by vocabulary."""
        counts: dict[str, Counter[str]] = {}
        with contextlib.ExitStack() as stack:
            for client in progress(self._open("train", stack), "Counting tokens"):
                try:
                    for name, tokens in self._encoding.tokens(client.columns):
                        counts.setdefault(name, Counter()).update(tokens)
                except DataError as error:
                    raise DataError(f"{client.source}: client {client.name!r} {error}") from error
        return counts


def _unusable(client: RawClient, found: object) -> UnusableError:
    return UnusableError(
        f"{client.source}: client {client.name!r} {found}: mend the file, or set unusable_clients to skip."
    )
