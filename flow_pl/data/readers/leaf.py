"""Read LEAF's files: JSON with the lists `users` and `num_samples` and the object `user_data`, in any number of files.

Source: Caldas et al., *LEAF: A Benchmark for Federated Settings* (arXiv 1812.01097), github.com/TalwalkarLab/leaf.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flow_pl.data.encodings.encoding import Encoding
from flow_pl.data.readers.file_data import FileData
from flow_pl.data.readers.json_stream import JsonStream
from flow_pl.data.readers.sources import RawClient, Selection, Source
from flow_pl.data.store.limits import Bounded, require_name
from flow_pl.errors import DataError, brief


class LeafSource(Source):
    """Reads the shards of one part, one client at a time.

    Taking clients by name needs no memory if they come in the same order as in the part that names them, as written by
    LEAF's scripts; clients that come too early are kept. All examples of a client must be in one entry of one shard of
    the part, as LEAF's scripts write them; merging entries would need all of them in memory.

    Args:
        files: the shards in their order.
        selection: clients and examples to read; its columns are the lists of a client.
        check_samples: whether `num_samples` must agree with the data.
    """

    def __init__(self, files: Sequence[Path], selection: Selection, check_samples: bool = True) -> None:
        self._files = files
        self._selection = selection
        self._check_samples = check_samples
        self._stream = self._shards()
        self._early: dict[str, RawClient] = {}
        self._names: set[str] | None = None
        self._found_in: dict[str, Path] = {}

    def __iter__(self) -> Iterator[RawClient]:
        """Yield the clients in the order of the files."""
        while self._early:
            yield self._early.pop(next(iter(self._early)))
        yield from self._stream

    def take(self, name: str) -> RawClient | None:
        """Return a client by name; None if the files lack it."""
        if name in self._early:
            return self._early.pop(name)
        if self._names is None:
            self._names = set(self.names())
        if name in self._names:
            for client in self._stream:
                if client.name == name:
                    return client
                self._early[client.name] = client
        return None

    def names(self) -> Iterable[str]:
        """Return the names in the lists `users` of the shards."""
        return filter(self._selection.keeps, (user for file in self._files for user in _users(file)))

    def _shards(self) -> Iterator[RawClient]:
        for file in self._files:
            yield from self._shard(file)

    def _shard(self, file: Path) -> Iterator[RawClient]:
        sizes: dict[str, int] = {}
        header: dict[str, Any] = {}
        with _stream(file) as stream:
            for key in stream.members():
                if key != "user_data":
                    header[key] = stream.value()
                    continue
                for name in stream.members():
                    client = self._client(file, require_name(name, file), stream.value())
                    sizes[name] = len(next(iter(client.columns.values())))
                    if self._selection.keeps(name):
                        self._require_first(file, name)
                        yield self._cut(client)
            stream.end()
        self._check(file, header, sizes)

    def _require_first(self, file: Path, name: str) -> None:
        if name in self._found_in:
            raise DataError(
                f"{file}: client {name!r} has examples in {self._found_in[name]}, too: put all its examples of a part "
                "into one entry of one shard."
            )
        self._found_in[name] = file

    def _client(self, file: Path, name: str, data: Any) -> RawClient:
        if not isinstance(data, dict):
            raise DataError(f"{file}: client {name!r} is not an object of lists: correct the file.")
        lists = {key: value for key, value in data.items() if isinstance(value, list | str)}
        missing = [column for column in self._selection.columns if column not in lists]
        if missing:
            raise DataError(
                f"{file}: client {name!r} has no {' and no '.join(missing)}, only {brief(list(lists) or 'nothing')}: "
                "correct the file, or name the right lists in the encoding."
            )
        columns = {column: lists[column] for column in self._selection.columns}
        return RawClient(name, columns, str(file)).checked()

    def _cut(self, client: RawClient) -> RawClient:
        rows = slice(self._selection.max_examples)
        return client._replace(columns={name: column[rows] for name, column in client.columns.items()})

    def _check(self, file: Path, header: dict[str, Any], sizes: dict[str, int]) -> None:
        users, samples = header.get("users"), header.get("num_samples")
        users = _names(file, users)
        if not isinstance(samples, list) or len(users) != len(samples):
            raise DataError(f"{file}: `users` and `num_samples` must be lists of equal length: correct the file.")
        if len(set(users)) < len(users):
            twice = next(name for name, count in Counter(users).items() if count > 1)
            raise DataError(f"{file}: client {twice!r} is more than once in `users`: correct the file.")
        for names, others, place in ((users, sizes, "user_data"), (sizes, set(users), "users")):
            missing = [name for name in names if name not in others]
            if missing:
                raise DataError(f"{file}: client {missing[0]!r} is not in `{place}`: correct the file.")
        for name, expected in zip(users, samples, strict=True):
            if self._check_samples and sizes[name] != expected:
                raise DataError(
                    f"{file}: client {name!r} has {sizes[name]} examples, but its `num_samples` is "
                    f"{brief(repr(expected))}: correct the file, or set check_samples to false."
                )


class LeafData(FileData):
    """Provides clients from JSON files in LEAF's format (.json or .json.gz); a part may be folders of them.

    LEAF's Reddit has every user in each of its folders `train`, `val` and `test`, which are the parts `train`,
    `validation` and `test`. Within a part, a user may be in only one shard.

    Args:
        train: files of the training examples.
        encoding: how a client's examples become rows, see `EncodedData`; its columns are the lists of a client.
        check_samples: whether `num_samples` must agree with the data; LEAF's Reddit counts the examples of all parts.
        **kwargs: settings of every data set of files, see `FileData`, of every published data set, see `EncodedData`,
            and of every data set, see `FederatedDataModule`.

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    endings = (".json", ".json.gz")

    def __init__(self, train: str | list[str], encoding: Encoding, check_samples: bool = True, **kwargs: Any) -> None:
        super().__init__(train=train, encoding=encoding, **kwargs)
        self._check_samples = check_samples

    def source_options(self) -> dict[str, Any]:
        """Return the files' paths, sizes and modification times."""
        return {**super().source_options(), "check_samples": self._check_samples}

    def part_source(self, paths: Sequence[Path], selection: Selection) -> LeafSource:
        """Open the shards of a part."""
        return LeafSource(paths, selection, self._check_samples)


@contextlib.contextmanager
def _stream(file: Path) -> Iterator[JsonStream]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as packed:
            yield JsonStream(io.BufferedReader(Bounded(packed, file)))
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{file} is not a complete LEAF file ({brief(error)}): get it again, or correct it.") from error


def _users(file: Path) -> list[str]:
    """Return the clients of a file by its list `users`, which comes first in LEAF's files."""
    users: list[str] = []
    with _stream(file) as stream:
        for key in stream.members():
            if key == "users":
                users = _names(file, stream.value())
                break
            for _ in stream.members() if key == "user_data" else ():
                stream.value()
            if key != "user_data":
                stream.value()
    return users


def _names(file: Path, users: Any) -> list[str]:
    """Read the list `users`, and check that it is one."""
    if not isinstance(users, list) or not all(isinstance(name, str) for name in users):
        raise DataError(f"{file}: `users` must be a list of names: correct the file.")
    return [require_name(name, file) for name in users]
