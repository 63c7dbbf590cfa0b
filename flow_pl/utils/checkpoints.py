"""Write checkpoint files atomically, and check them before they are used."""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.serialization import get_unsafe_globals_in_checkpoint

from flow_pl.errors import ConfigurationError
from flow_pl.utils.files import replacing, unwritable

MARK = "flow_pl"
"""Key in every checkpoint of this project; see `FederatedModule.on_save_checkpoint`."""

HPC = "hpc_ckpt_"
"""Prefix of the checkpoints that Lightning writes when SLURM preempts a job."""

HANDED_OVER = ".temp.ckpt"
"""Name of the file in which Lightning passes weights from forked processes to their parent."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints to a temporary file in the same folder and renames them; loads only intact ones.

    Lightning writes to the system's temporary folder and copies the file from there to another disk, so that a kill
    during the copy leaves half a checkpoint in place of the last one. Here the file is streamed to its own disk,
    without a second copy in memory. Lightning handles files outside the local file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            FlowError: the disk is full or the folder is not writable; an earlier file of that name stays intact.
        """
        if storage_options is not None or _remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        # Lightning treats every file with HPC in its name as a checkpoint
        with replacing(path, f".{path.name.replace(HPC, 'hpc-')}.part") as file:
            _save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint; nothing in it is executed.

        Raises:
            ConfigurationError: the file is missing, damaged, or not a checkpoint of this project; names one that can be
                used.
        """
        if weights_only is False:
            raise ConfigurationError(
                "weights_only is false, expected true: loading a checkpoint without it may run arbitrary code."
            )
        if _remote(path):
            try:
                return super().load_checkpoint(path, map_location, weights_only=True)
            except pickle.UnpicklingError as error:
                what = f"holds Python objects, which may run arbitrary code ({_brief(error)})"
                raise _refused(Path(path), what) from error
        path = Path(path).expanduser()
        if path.name != HANDED_OVER:
            look_at(path)
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch itself compares no checksums
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")
            return super().load_checkpoint(path, map_location, weights_only=True)
        except Exception as error:
            raise _refused(Path(path), f"is damaged or truncated ({_brief(error)})") from error


def look_at(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint; its tensors are memory-mapped and read when used.

    Args:
        path: path of the file.

    Raises:
        ConfigurationError: the file is missing, damaged, or not a checkpoint of this project; names one that can be
            used.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise _refused(path, "does not exist")
    try:
        return _header(path)
    except Exception as error:
        if not path.is_file() or zipfile.is_zipfile(path):
            raise _refused(path, f"was not written by `flow-pl fit` ({_brief(error)})") from error
        raise _refused(path, "is damaged or truncated") from error


def resumed_checkpoint(trainer: Trainer, ckpt_path: str | os.PathLike[str] | None) -> Path | None:
    """Return the checkpoint from which a fit resumes.

    Args:
        trainer: trainer of the run.
        ckpt_path: the value given on the command line: a path, "last", "hpc" or None. As in Lightning, None means "hpc"
            if SLURM has requeued the run, and otherwise "last" for a trainer with an OnExceptionCheckpoint.

    Returns:
        The file; None if the fit starts from scratch.
    """
    root = Path(trainer.default_root_dir)
    crashed = [Path(c.ckpt_path) for c in getattr(trainer, "callbacks", ()) if isinstance(c, OnExceptionCheckpoint)]
    if ckpt_path in (None, "hpc"):
        known = list(root.glob(f"{HPC}*.ckpt")) if ckpt_path or SLURMEnvironment.detect() else []
        if known or not crashed or ckpt_path:
            return max(known, key=lambda path: int("0" + "".join(filter(str.isdigit, path.stem))), default=None)
        ckpt_path = "last"
    if ckpt_path == "last":
        folders = {c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath}
        known = [path for folder in folders for path in Path(folder).glob("last*.ckpt")]
        known += [path for path in crashed if path.is_file()]
        return max(known, key=lambda path: path.stat().st_mtime, default=None)
    path = Path(str(ckpt_path))
    return path if path.is_file() else None


def _header(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        # torch stores them uncompressed; compressed ones could expand to any size
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("its parts are compressed")
    objects = get_unsafe_globals_in_checkpoint(path)
    if objects:
        raise ValueError(f"it holds Python objects, which may run arbitrary code: {', '.join(objects)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warning about what the next lines refuse
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict) or MARK not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(f"it has no entry '{MARK}'")
    if checkpoint.get("hyper_parameters"):  # Lightning would override the configuration with them, class paths included
        raise ValueError("it holds settings, which belong only in the configuration")
    return checkpoint


def _refused(path: Path, what: str) -> ConfigurationError:
    """Return the error, which names the last intact checkpoint of the same run."""
    folders = [path.parent, path.parent.parent] if path.parent.name == "checkpoints" else [path.parent]
    others = [other for folder in folders for other in folder.glob("*.ckpt") if other.resolve() != path.resolve()]
    good = []
    for other in sorted(others, key=lambda other: other.stat().st_mtime, reverse=True):
        with contextlib.suppress(Exception):
            good.append(f"{other} (round {_header(other)['global_step']})")
    said = f"the checkpoint {path} {what}: give --ckpt_path a file that `flow-pl fit` wrote, such as"
    if good:
        return ConfigurationError(f"{said} {good[0]}, which can be loaded.")
    return ConfigurationError(f"{said} checkpoints/best.ckpt in the run's folder; none beside this one can be loaded.")


class _Sink:
    """A file that keeps the error of a write, since torch replaces it by an uninformative one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    sink = _Sink(file)
    try:
        torch.save(checkpoint, sink)  # type: ignore[arg-type]  # torch uses only these methods of a file
    except RuntimeError as error:
        raise sink.error or error from None


def _remote(path: str | os.PathLike[str]) -> bool:
    return "://" in str(path)


def _brief(error: Exception) -> str:
    """Return the first line of a library's message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120].rstrip(". ")
