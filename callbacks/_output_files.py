"""Files that callbacks write, checked before the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from flow_pl.errors import ConfigurationError


def check_ending(path: str | Path, endings: Sequence[str]) -> Path:
    """Check that a file name's ending denotes a supported format.

    Args:
        path: the file.
        endings: the formats' endings, with the dot.

    Returns:
        The path.

    Raises:
        ConfigurationError: the name has another ending.
    """
    path = Path(path)
    if path.suffix not in endings:
        raise ConfigurationError(f"path is {str(path)!r}, expected a name that ends in {' or '.join(endings)}.")
    return path


def in_run_folder(trainer: Trainer, path: Path) -> Path:
    """Resolve a path in the run's folder, so that no other run's file is replaced; absolute paths are unchanged.

    Args:
        trainer: trainer of the run.
        path: path of the file.
    """
    return Path(trainer.default_root_dir) / path


def check_writable(path: Path) -> None:
    """Create a file's folder and check that it is writable.

    Args:
        path: the file that is to be written later.

    Raises:
        ConfigurationError: the folder cannot be created or written to, or the path is itself a folder.
    """
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another machine may have used the same name
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error}. Set path to a folder you may write to."
        ) from error
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder, expected the path of a file: set path to {path / path.name}.")
