"""Divide any `datasets.Dataset` among clients by any partitioner of Flower Datasets.

Sources: huggingface.co/docs/datasets and flower.ai/docs/datasets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.encodings.encoded import EncodedData
from flow_pl.data.encodings.encoding import Encoding
from flow_pl.data.readers.columns import column_values
from flow_pl.data.readers.file_data import is_hidden
from flow_pl.data.readers.npz import npz_table
from flow_pl.data.readers.partitioned_files import check_files, require_embedded
from flow_pl.data.readers.sources import Part, RawClient, Selection, Source
from flow_pl.data.store.cache import file_identity
from flow_pl.errors import ConfigurationError, DataError, brief
from flow_pl.utils.optional import import_optional

_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
_ARRAYS = ".npz"
_ROW = "__row__"
_EXTRA = "datasets"


class PartitionedSource(Source):
    """Reads the clients of a partitioned data set, one at a time.

    Args:
        name: name of the data set, for messages.
        dataset: a `datasets.Dataset`.
        rows: row numbers of each client, by name.
        selection: clients and examples to read.
    """

    def __init__(self, name: str, dataset: Any, rows: dict[str, NDArray[np.int64]], selection: Selection) -> None:
        self._name = name
        self._rows = dict(rows)
        self._selection = selection
        missing = [column for column in selection.columns if column not in dataset.column_names]
        if missing:
            raise DataError(
                f"{name} has no column {' and no '.join(missing)}, only {brief(dataset.column_names)}: name the "
                "right ones in the encoding."
            )
        self._dataset = dataset.select_columns(list(selection.columns))

    def __iter__(self) -> Iterator[RawClient]:
        """Yield the clients in the order of the partitions."""
        for name in list(self._rows):
            if self._selection.keeps(name) and (client := self.take(name)) is not None:
                yield client

    def take(self, name: str) -> RawClient | None:
        """Return a client by name; None if there is none."""
        rows = self._rows.pop(name, None)
        if rows is None:
            return None
        if not len(rows):
            return RawClient(name, dict.fromkeys(self._selection.columns, ()), self._name)
        try:
            chosen = self._dataset.select(rows[: self._selection.max_examples])
            columns = {column: self._column(chosen, column) for column in self._selection.columns}
        except DataError:
            raise
        except Exception as error:  # images and files that cannot be decoded: errors of Arrow, of Pillow, ...
            raise DataError(f"{self._name}: client {name!r} cannot be read ({brief(error)}).") from error
        return RawClient(name, columns, self._name)

    def names(self) -> Iterable[str]:
        """Return the names of the partitions that have not been taken."""
        return filter(self._selection.keeps, self._rows)

    def _column(self, chosen: Any, name: str) -> Any:
        feature = column = chosen.features[name]
        while hasattr(feature, "feature"):  # lists, possibly of lists
            feature = feature.feature
        kind = getattr(feature, "dtype", "")
        if kind in ("string", "large_string"):
            return chosen[name][:]
        if type(feature).__name__ in ("Value", "ClassLabel"):
            # the library's own conversion of nested lists is a hundred times slower
            return column_values(self._name, name, chosen.with_format("arrow")[:][name])
        require_embedded(chosen.with_format("arrow")[:][name])
        if type(feature).__name__ == "Image" and feature is column:
            return [_pixels(picture) for picture in chosen[name]]
        return chosen.with_format("numpy")[:][name]  # lists of decoded images


class PartitionedData(EncodedData):
    """Provides clients by dividing a table: from local files, or from the Hugging Face hub.

    Args:
        path: a file (.parquet, .csv, .json, .jsonl, .arrow or .npz), a folder of files of one of these kinds except
            `.npz`, a folder written by `Dataset.save_to_disk`, or the name of a data set on the hub. The columns of a
            `.npz` file are its arrays, where `x_train` is the column `x` of the split `train`.
        partitioner: a partitioner by its `class_path`, such as `flwr_datasets.partitioner.DirichletPartitioner`, and
            its `init_args`; other keys override these arguments, as in `--data.partitioner.alpha 0.3`. Null for its
            `partition_by` = the encoding's column of labels.
        encoding: how a client's examples become rows, see `EncodedData`; its columns are those of the table.
        split: split of a data set on the hub, or of a folder or a `.npz` file with splits; `train+test` = both.
        name: configuration of a data set on the hub; null = its only one.
        revision: commit or tag of a data set on the hub; null = the newest, which does not affect a client store that
            is already written.
        download: whether a data set may be fetched from the hub; otherwise it must be in the hub's cache.
        **kwargs: settings of every published data set, see `EncodedData`, and of every data set, see
            `FederatedDataModule`.

    Raises:
        ConfigurationError: a setting is out of its range, or the partitioner is not one.
    """

    def __init__(
        self,
        path: str,
        partitioner: dict[str, Any],
        encoding: Encoding,
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoding=encoding, **kwargs)
        if not isinstance(partitioner, dict):  # such as an object of Python
            raise ConfigurationError(
                f"partitioner is of type {type(partitioner).__name__}, expected its name and arguments, which identify "
                'the stored clients: {"class_path": "flwr_datasets.partitioner.IidPartitioner", "init_args": '
                '{"num_partitions": 10}}, for instance.'
            )
        arguments = {key: value for key, value in partitioner.items() if key != "class_path"}
        given = arguments.pop("init_args", None) or {}
        if "class_path" not in partitioner or not isinstance(given, dict):
            raise ConfigurationError(
                f"partitioner is {partitioner}, expected a class_path and its init_args. A later file replaces the "
                "whole partitioner: to set one argument, use --data.partitioner.<name>."
            )
        self._path = path
        # also for `--data.partitioner.init_args.alpha 0.3`, which jsonargparse (4.53) puts beside the init_args
        arguments = {**given, **arguments}
        if "partition_by" in arguments and arguments["partition_by"] is None:
            arguments["partition_by"] = getattr(encoding, "label", None)
        self._partitioner = {"class_path": partitioner["class_path"], "init_args": arguments}
        self._split = split
        self._name = name
        self._revision = revision
        self._download = download

    def source_options(self) -> dict[str, Any]:
        """Return the files, or the name on the hub, and the partitioner."""
        local = self._local()
        files = None if local is None else [file_identity(file) for file in _files(local)]
        return {
            "path": self._path if files is None else files,
            "split": self._split,
            "name": self._name,
            "revision": self._revision,
            "partitioner": self._partitioner,
        }

    def source(self, part: Part, selection: Selection) -> PartitionedSource | None:
        """Open the partitions as the training part; there is no other part."""
        if part != "train":
            return None
        dataset, rows = self._partitioned
        return PartitionedSource(self._path, dataset, rows, selection)

    @cached_property
    def _partitioned(self) -> tuple[Any, dict[str, NDArray[np.int64]]]:
        """Return the table and the row numbers of its partitions, computed once for the vocabulary and the store."""
        dataset = self._load()
        return dataset, partition(dataset, self._make_partitioner(), self._path)

    def _make_partitioner(self) -> Any:
        module, _, name = self._partitioner["class_path"].rpartition(".")
        base = import_optional("flwr_datasets.partitioner", _EXTRA).Partitioner
        try:
            kind = getattr(import_optional(module or "flwr_datasets.partitioner", _EXTRA), name)
            # before it is called, since anything else may be harmful, such as a command to the system
            if not (isinstance(kind, type) and issubclass(kind, base)):
                raise ConfigurationError(f"{self._partitioner['class_path']} is not a partitioner of flwr_datasets.")
            return kind(**self._partitioner.get("init_args", {}))
        except ConfigurationError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigurationError(f"the partitioner {self._partitioner} cannot be created: {error}.") from error

    def _local(self) -> Path | None:
        """Return the path, unless it is the name of a data set on the hub."""
        path = Path(self._path).expanduser()
        if path.exists():
            return path
        if path.is_absolute() or path.suffix in (*_BUILDERS, _ARRAYS):
            raise DataError(f"there is no {path}: correct the path of the data.")
        return None

    def _load(self) -> Any:
        datasets = import_optional("datasets", _EXTRA)
        local = self._local()
        cache = str(self.store_path.parent / "datasets")
        try:
            if local is None:
                with _network(datasets, self._download):
                    return datasets.load_dataset(self._path, self._name, split=self._split, revision=self._revision)
            files = _files(local)
            check_files(local, files)
            if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
                saved = datasets.load_from_disk(str(local))
                if isinstance(saved, datasets.Dataset):
                    return saved
                return datasets.concatenate_datasets([saved[part] for part in self._split.split("+")])
            if local.suffix == _ARRAYS:
                return datasets.Dataset(npz_table(local, self.encoding.columns, self._split))
            return datasets.load_dataset(
                _BUILDERS[files[0].suffix], data_files=[str(file) for file in files], split="train", cache_dir=cache
            )
        except DataError:
            raise
        except Exception as error:  # of Arrow, of the hub's client, of readers of file formats, ...
            remedy = (
                "set download to true, or put it into the hub's cache on a machine with a network, or give a local path"
                if local is None and not self._download
                else "check that it is complete and reachable, and its split"
            )
            raise DataError(f"the data set {self._path} cannot be read ({brief(error)}): {remedy}.") from error


def partition(dataset: Any, partitioner: Any, name: str) -> dict[str, NDArray[np.int64]]:
    """Divide a table among clients.

    Args:
        dataset: a `datasets.Dataset`.
        partitioner: a partitioner of Flower Datasets, not used before.
        name: name of the data set, for messages.

    Returns:
        The row numbers of each client by name, which is the natural id if the partitioner uses one.

    Raises:
        DataError: the partitioner cannot divide the table.
    """
    try:
        # the partitioner divides row numbers instead of rows; the rows are read one client at a time
        partitioner.dataset = dataset.add_column(_ROW, np.arange(len(dataset)))
        natural: dict[int, Any] = {}
        rows = {}
        for index in range(partitioner.num_partitions):
            members = partitioner.load_partition(index)
            natural = natural or getattr(partitioner, "partition_id_to_natural_id", {})
            client = str(natural.get(index, f"partition_{index:05d}"))
            rows[client] = np.asarray(members.with_format("numpy", columns=[_ROW])[:][_ROW], dtype=np.int64)
    except Exception as error:  # partitioners raise whatever their arithmetic raises
        raise DataError(
            f"{name} cannot be divided by {type(partitioner).__name__} ({brief(error)}): change its init_args."
        ) from error
    return rows


def _pixels(picture: Any) -> NDArray[Any]:
    """Return the pixels of a decoded image whose values are not pixels: with two levels, or a palette."""
    if picture is None:
        raise ValueError("a row has no image")
    if picture.mode == "1":
        picture = picture.convert("L")
    elif picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA" if picture.mode == "PA" or "transparency" in picture.info else "RGB")
    return np.asarray(picture)


@contextlib.contextmanager
def _network(datasets: Any, allowed: bool) -> Iterator[None]:
    """Keep the hub's client off the network, where it would wait long for a response; its cache is still used."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _files(path: Path) -> list[Path]:
    """Return the files of a local path, all of one kind."""
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.rglob("*") if file.is_file() and not is_hidden(file.relative_to(path)))
    )
    if path.suffix == _ARRAYS or any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return files
    readable = [file for file in files if file.suffix in _BUILDERS]
    if len({file.suffix for file in readable}) != 1:
        raise DataError(f"{path} holds no files of one kind among {', '.join(_BUILDERS)}: name a file of the folder.")
    return readable
