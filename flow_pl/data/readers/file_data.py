"""The base class of readers of files in a folder or an archive."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from flow_pl.data.encodings.encoded import EncodedData
from flow_pl.data.encodings.encoding import Encoding
from flow_pl.data.readers.download import Archive, obtain
from flow_pl.data.readers.sources import Part, Selection, Source
from flow_pl.data.store.cache import file_identity
from flow_pl.errors import DataError
from flow_pl.utils.validation import given, require_some


def is_hidden(path: Path) -> bool:
    """Return whether a file below a folder is not data: hidden, or written by macOS beside a file (`._a.json`).

    Args:
        path: path of the file, relative to the folder.
    """
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


class FileData(EncodedData):
    """Provides clients of files; each part of the data is a file, a folder of files, or a list of both.

    A reader of a file format is a subclass with `part_source`.

    Args:
        train: files of the training examples.
        encoding: how a client's examples become rows, see `EncodedData`.
        test: files of the test examples; clients without training examples are new. null = a share of each client's
            examples is for testing.
        validation: files of the validation examples; clients without training examples are not trained on, only
            evaluated on after rounds. null = a share of each client's examples is for validation.
        heldout: files of clients that are not trained on, and tested as new clients; null = none.
        archive: published archive of the files, which is unpacked into the folder of `train`; null = none.
        download: whether the archive may be fetched if a file is missing.
        **kwargs: settings of every published data set, see `EncodedData`, and of every data set, see
            `FederatedDataModule`.

    Attributes:
        endings: endings of the names of the files in a folder.

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    endings: tuple[str, ...] = ("",)

    def __init__(
        self,
        train: str | list[str],
        encoding: Encoding,
        test: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        heldout: str | list[str] | None = None,
        archive: Archive | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoding=encoding, **kwargs)
        parts: dict[Part, str | list[str] | None] = {
            "train": train,
            "test": test,
            "validation": validation,
            "heldout": heldout,
        }
        require_some(train=train, **given(test=test, validation=validation, heldout=heldout))
        self._paths = {
            part: [Path(path).expanduser() for path in ([paths] if isinstance(paths, str) else paths)]
            for part, paths in parts.items()
            if paths
        }
        self._archive = archive
        self._download = download

    @property
    def parts(self) -> Collection[Part]:
        """Return the parts that have files."""
        return self._paths.keys()

    @abstractmethod
    def part_source(self, paths: Sequence[Path], selection: Selection) -> Source:
        """Open the files of a part."""

    def obtain(self) -> None:
        """Unpack the archive if a file is missing; fetch it first if that is allowed.

        Raises:
            DataError: a file cannot be obtained; the message says which to put where.
        """
        if self._archive is not None:
            obtain([path for paths in self._paths.values() for path in paths], self._archive, self._download)

    def source_options(self) -> dict[str, Any]:
        """Return the files' paths, sizes and modification times."""
        return {part: [file_identity(file) for file in self._files(part)] for part in self._paths}

    def source(self, part: Part, selection: Selection) -> Source | None:
        """Open the files of a part; None if there are none."""
        return self.part_source(self._files(part), selection) if part in self._paths else None

    def _files(self, part: Part) -> list[Path]:
        found: list[Path] = []
        for path in self._paths[part]:
            if not path.is_dir():
                found.append(path)
                continue
            files = sorted(
                file
                for file in path.iterdir()
                if file.is_file() and file.name.endswith(self.endings) and not is_hidden(file.relative_to(path))
            )
            if not files:
                raise DataError(f"the folder {path} has no {' or '.join(self.endings)} file: correct it.")
            found += files
        return found
