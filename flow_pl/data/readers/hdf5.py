"""Read files of TensorFlow Federated's simulations: HDF5, a group for each client (`examples/<client>/<field>`).

Source: `tff.simulation.HDF5ClientData` (github.com/google-parfait/tensorflow-federated).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flow_pl.data.encodings.encoding import Encoding
from flow_pl.data.readers.file_data import FileData
from flow_pl.data.readers.hdf5_texts import Texts
from flow_pl.data.readers.sources import RawClient, Selection, Source
from flow_pl.data.store.limits import require_bounded, require_name
from flow_pl.errors import ConfigurationError, DataError, brief
from flow_pl.utils.optional import import_optional

_GROUP = "examples"
_FILTERS = {1, 2, 3, 4, 5, 6, 32000}
"""Numbers of the filters that are part of HDF5 and h5py; for others, HDF5 would load code from a folder."""


class HDF5Source(Source):
    """Reads one HDF5 file, one client at a time.

    Args:
        path: the file.
        selection: clients and examples to read; its columns are the fields of a client.

    Raises:
        ConfigurationError: h5py is not installed.
        DataError: the file is missing, damaged, or has another layout.
    """

    def __init__(self, path: Path, selection: Selection) -> None:
        self._path = path
        self._selection = selection
        self._taken: set[str] = set()
        self._expanded = 0
        h5py = import_optional("h5py", "hdf5")
        try:
            self._file = h5py.File(path, "r")
            # caches of groups that are no longer needed would fill 300 MB and more, outside of Python
            cache = self._file.id.get_mdc_config()
            cache.max_size = cache.initial_size
            self._file.id.set_mdc_config(cache)
            self._texts = Texts(path, self._file)
            self._names = [require_name(name, path) for name in sorted(_plain(self._file, _GROUP).keys())]
        except DataError:
            raise
        except Exception as error:  # damage raises one of a dozen types
            raise DataError(
                f"{path} is not a usable HDF5 file of clients ({brief(error)}): it needs the group {_GROUP!r} with a "
                "group for each client; get it again if it is damaged."
            ) from error

    def __iter__(self) -> Iterator[RawClient]:
        """Yield the clients in the order of their names."""
        for name in self._names:
            if name not in self._taken and self._selection.keeps(name):
                yield self._read(name)

    def take(self, name: str) -> RawClient | None:
        """Return a client by name; None if the file lacks it."""
        if name not in self._file[_GROUP]:
            return None
        self._taken.add(name)
        return self._read(name)

    def names(self) -> Iterable[str]:
        """Return the names of the groups."""
        return filter(self._selection.keeps, self._names)

    def close(self) -> None:
        """Close the file."""
        self._texts.close()
        self._file.close()

    def _read(self, name: str) -> RawClient:
        try:
            group = _plain(self._file[_GROUP], name)
            missing = [field for field in self._selection.columns if field not in group]
            if missing:
                raise DataError(
                    f"{self._path}: client {name!r} has no {' and no '.join(missing)}, only {brief(list(group))}: name "
                    "the right fields in the encoding."
                )
            columns = {field: self._column(_plain(group, field)) for field in self._selection.columns}
        except DataError:
            raise
        except Exception as error:  # damage raises one of a dozen types
            raise DataError(
                f"{self._path}: client {name!r} cannot be read ({brief(error)}): get the file again."
            ) from error
        return RawClient(name, columns, str(self._path)).checked()

    def _column(self, dataset: Any) -> Any:
        """Read the rows of a field, after checking their size before memory is allocated."""
        h5py = import_optional("h5py", "hdf5")
        kind, creation = dataset.dtype.kind, dataset.id.get_create_plist()
        texts = h5py.check_string_dtype(dataset.dtype) is not None
        if not texts and kind not in "biufSU":
            raise ValueError(f"{dataset.name} has values of type {dataset.dtype}, expected numbers or texts")
        if dataset.is_virtual or creation.get_external_count():
            raise ValueError(f"the values of {dataset.name} lie in another file")
        filters = {creation.get_filter(index)[0] for index in range(creation.get_nfilters())}
        if not filters <= _FILTERS:
            raise ValueError(f"{dataset.name} is compressed by filters {sorted(filters)}, expected some of {_FILTERS}")
        if dataset.chunks:  # a chunk is expanded as a whole
            self._require(math.prod(dataset.chunks) * dataset.dtype.itemsize)
        stop = len(dataset) if self._selection.max_examples is None else self._selection.max_examples
        count = min(len(dataset), stop)
        # any number of rows without bytes can be declared
        self._add(count * max(1, dataset.dtype.itemsize * math.prod(dataset.shape[1:])))
        if kind != "O":
            return dataset[:count]
        if dataset.ndim != 1:
            raise ValueError(f"{dataset.name} has shape {dataset.shape}, expected one text for each row")
        self._add(int(self._texts.lengths(dataset, count).sum(dtype=np.int64)))
        return dataset[:count]

    def _add(self, size: int) -> None:
        self._expanded += size
        self._require(self._expanded)

    def _require(self, size: int) -> None:
        require_bounded(self._path, size, self._path.stat().st_size)


class HDF5Data(FileData):
    """Provides clients from HDF5 files in the layout of TensorFlow Federated's simulations; a part is one file.

    Args:
        train: file of the training examples.
        encoding: how a client's examples become rows, see `EncodedData`; its columns are the fields of a client.
        **kwargs: settings of every data set of files, see `FileData`, of every published data set, see `EncodedData`,
            and of every data set, see `FederatedDataModule`.

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    def __init__(self, train: str, encoding: Encoding, **kwargs: Any) -> None:
        super().__init__(train=train, encoding=encoding, **kwargs)

    def part_source(self, paths: Sequence[Path], selection: Selection) -> HDF5Source:
        """Open the file of a part."""
        if len(paths) != 1:
            raise ConfigurationError(f"a part has {len(paths)} HDF5 files, {', '.join(map(str, paths))}: give one.")
        return HDF5Source(paths[0], selection)


def _plain(group: Any, name: str) -> Any:
    """Return a member of a group, which must be in the same file: a link may lead to any file on the machine."""
    if isinstance(group.get(name, getlink=True), import_optional("h5py", "hdf5").ExternalLink):
        raise ValueError(f"{name} lies in another file")
    return group[name]
