"""Log the comparison as a Weights & Biases run of its own, beside those of its methods."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

from flow_pl.compare.runs import Run
from flow_pl.compare.settings import wandb_loggers


def log_comparison(runs: Iterable[Run], tables: Mapping[str, Path], figures: Mapping[str, Path], group: str) -> None:
    """Log tables and figures to the W&B project of the runs, if they log to W&B; offline if they are offline.

    The same results always go to the same W&B run.

    Args:
        runs: runs of the comparison.
        tables: CSV files by name.
        figures: PNG files by name.
        group: name of the comparison.
    """
    runs = list(runs)
    settings = next((logger for run in runs for logger in wandb_loggers(run.settings)), None)
    if settings is None:
        return
    identity = hashlib.sha256("".join(run.digest for run in runs).encode()).hexdigest()[:16]
    shared = {key: settings.get(key) for key in ("project", "entity", "offline", "save_dir", "mode", "settings")}
    given = {key: value for key, value in shared.items() if value is not None}
    logger = WandbLogger(name=f"compare-{group}", group=group, job_type="compare", id=f"compare-{identity}", **given)
    for name, path in tables.items():
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        logger.log_table(name, columns=header, data=[[_number(text) for text in row] for row in rows])
    for name, path in figures.items():
        logger.log_image(name, [str(path)])
    logger.experiment.finish()


def _number(text: str) -> float | str | None:
    try:
        return float(text)
    except ValueError:
        return text or None
