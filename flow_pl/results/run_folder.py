"""Find a checkpoint in the folder of a run, and move an earlier run in that folder aside."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from flow_pl.errors import ConfigurationError
from flow_pl.utils.checkpoints import HPC
from flow_pl.utils.files import unwritable, write_text

CHECKPOINTS = "checkpoints"
"""Subfolder of a run's folder with best.ckpt and last.ckpt."""

LOGS = "logs"
"""Subfolder of a run's folder with the CSV logs, one folder per command."""

CONFIG = "config.yaml"
"""Name of the file with the settings of the run."""

CONFIG_HEADER = "# The settings of the run in this folder, with every default; written by flow_pl."
"""First line of that file; a file without it is never replaced."""

EARLIER = "earlier"
"""Subfolder for earlier runs in the same folder, numbered from 1."""

RELEASED = "private_rounds.json"
"""The private rounds of a deployed run, whose models nodes may have received."""

RESULTS = (
    CHECKPOINTS,
    f"{HPC}*.ckpt",
    "predictions.csv",
    "predictions.parquet",
    "clients.csv",
    "curve.csv",
    "diagnostics.csv",
    "report.html",
    "figures",
    RELEASED,
)
"""Files that a run writes into its folder, except its settings and its logs."""


def best_checkpoint(root: Path) -> Path:
    """Return the path of the best round's checkpoint, whether or not it exists."""
    return root / CHECKPOINTS / "best.ckpt"


def newest(paths: list[Path]) -> Path | None:
    """Return the file that was written last; None if there are none."""
    return max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)


def find_checkpoint(root: Path, word: str | None) -> Path:
    """Return the checkpoint to use if no file is named.

    Args:
        root: folder of the run.
        word: "best", "last" or "hpc" (of SLURM); None for the best, or the last if no round was validated.

    Raises:
        ConfigurationError: there is no such checkpoint.
    """
    folder = root / CHECKPOINTS
    best = best_checkpoint(root)
    found = best if best.is_file() and word in (None, "best") else None
    if found is None and word != "best":
        files = root.glob(f"{HPC}*.ckpt") if word == "hpc" else folder.glob("last*.ckpt")
        found = newest(list(files))
    if found is None:
        names = {None: "neither best.ckpt nor last.ckpt", "best": "no best.ckpt", "last": "no last.ckpt"}
        where = f"no {HPC}*.ckpt in {root}" if word == "hpc" else f"{names[word]} in {folder}"
        there = newest([*folder.glob("*.ckpt"), *root.glob(f"{HPC}*.ckpt")])
        remedy = "train it first with `flow-pl fit`" if there is None else f"found {there}"
        raise ConfigurationError(
            f"no trained model found: {where}; {remedy}, or name a file with --ckpt_path, or the folder of "
            "the run with --trainer.default_root_dir."
        )
    return found


def write_config(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run, so that a reader sees all of them or nothing.

    Args:
        path: the file; replaced if it exists.
        settings: the settings.

    Raises:
        FlowError: the file cannot be written.
    """
    write_text(path, f"{CONFIG_HEADER}\n{yaml.safe_dump(dict(settings), sort_keys=False)}")


def is_ours(config: Path) -> bool:
    """Return whether a settings file may be replaced: it does not exist, or a run wrote it."""
    if not config.exists():
        return True
    with config.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip() == CONFIG_HEADER


def goes_on(root: Path, checkpoint: str | os.PathLike[str] | None) -> bool:
    """Return whether a fit from a checkpoint continues the run in a folder rather than replacing it."""
    if checkpoint is None:
        return False
    path, folder = Path(checkpoint).resolve(), root.resolve()
    return path.is_relative_to(folder) and not path.is_relative_to(folder / EARLIER)


def put_aside(root: Path, in_use: Collection[Path] = ()) -> Path | None:
    """Move an earlier run's files in a folder to a subfolder, so that they are neither replaced nor mixed up.

    The moved settings name the subfolder, so that a command with them uses the moved run.

    Args:
        root: folder of the new run.
        in_use: log folders of the new run, which stay.

    Returns:
        The subfolder; None if there was nothing to move.

    Raises:
        FlowError: the files cannot be moved.
    """
    found = [path for pattern in RESULTS for path in sorted(root.glob(pattern)) if _holds_files(path)]
    config = root / CONFIG
    with_config = config.exists() and (bool(found) or not is_ours(config))
    if not found and not with_config:
        return None
    stay = {path.resolve() for path in in_use}
    logs = [path for path in sorted((root / LOGS).glob("*")) if path.resolve() not in stay]
    numbered = (root / EARLIER / str(number) for number in itertools.count(1))
    target = next(folder for folder in numbered if not folder.exists())
    try:
        target.mkdir(parents=True)
        if logs:
            (target / LOGS).mkdir()
        for path in (*found, *logs):
            path.rename(target / path.relative_to(root))
        if with_config:
            _move_config(config, target)
    except OSError as error:
        raise unwritable(target, error) from error
    return target


def _move_config(config: Path, target: Path) -> None:
    """Move the settings of a run to its new folder, which they name from then on; a user's file stays as it is."""
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if is_ours(config) else None
    except (ValueError, yaml.YAMLError):  # no command can read it, wherever it is
        settings = None
    trainer = settings.get("trainer") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(trainer, dict):
        config.rename(target / CONFIG)
        return
    write_config(target / CONFIG, {**settings, "trainer": {**trainer, "default_root_dir": str(target)}})
    config.unlink()


def _holds_files(path: Path) -> bool:
    return path.is_file() or any(child.is_file() for child in path.rglob("*"))
