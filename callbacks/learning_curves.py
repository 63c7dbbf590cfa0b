"""Learning curves: the metrics of every validation of a fit, in a file and in a figure."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from flow_pl.callbacks._base import metric_prefixes
from flow_pl.callbacks._federated import federated_module
from flow_pl.callbacks._output_files import check_ending, check_writable
from flow_pl.utils.optional import import_optional
from flow_pl.utils.rows_file import RowsFile


class LearningCurves(Callback):
    """Writes the metrics of every validation to a CSV file, independently of the loggers, and draws the accuracies.

    Columns: `round` (number of completed rounds), `train_seconds` (training time so far, without validation)
    and the validation metrics by name; a fit whose last rounds are not validated ends with a row without
    metrics. A resumed fit continues from the rows of its checkpoint.

    The figure shows both accuracies over the rounds, as means over clients with a band from their 10th to their 90th
    percentile, as `GeneralizedAccuracy` and `PersonalizedAccuracy` log them; it is redrawn after every validation.
    Both files are complete at any time.

    Args:
        path: the table (.csv), in the run's folder; folders are created.
        figure: the figure (.png), in the run's folder; null for none.

    Raises:
        ConfigurationError: a path has another ending; at the start of a fit, a file cannot be written, or matplotlib,
            which draws the figure, is not installed.
    """

    def __init__(self, path: str = "curve.csv", figure: str | None = "figures/curves.png") -> None:
        self.path = check_ending(path, (".csv",))
        self.figure = None if figure is None else check_ending(figure, (".png",))
        self._rows, self._last = RowsFile(), 0  # the last row's round
        self._seconds = 0.0
        self._clock = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed fit continues from."""
        return {"rows": self._rows.text, "last": self._last, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._rows.restore(state_dict.get("rows"))
        self._last, self._seconds = state_dict["last"], state_dict["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the files before the fit."""
        if self.figure is not None:
            import_optional("matplotlib", "compare", "the figure of LearningCurves (or set figure to null)")
        if trainer.is_global_zero:
            for file in (self.path, self.figure):
                if file is not None:
                    check_writable(Path(trainer.default_root_dir) / file)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of a checkpoint, in place of what a killed process has left."""
        if trainer.is_global_zero and self._rows.text:
            self._rows.write(Path(trainer.default_root_dir) / self.path)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, excluding the time between two rounds."""
        self._clock = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the time of a chunk, including reading it."""
        now = time.monotonic()
        self._seconds += now - self._clock
        self._clock = now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row and redraw the figure."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        (prefix,) = metric_prefixes(trainer)
        metrics = trainer.callback_metrics  # in every process: reading them may be collective
        figures = {name.removeprefix(prefix): v.item() for name, v in metrics.items() if name.startswith(prefix)}
        self._add(trainer, figures)
        if trainer.is_global_zero and self.figure is not None:
            from flow_pl.results.curves import accuracy_curves
            from flow_pl.results.plotting import save  # needs matplotlib

            curve = {int(row["round"]): row for row in self._rows.rows()}
            name = federated_module(pl_module).objective.accuracy or "accuracy"
            save(partial(accuracy_curves, curve, accuracy=name), Path(trainer.default_root_dir) / self.figure)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row for the last round, if it was not validated."""
        if self._last != trainer.global_step:
            self._add(trainer, {})

    def _add(self, trainer: Trainer, figures: dict[str, float]) -> None:
        self._last = trainer.global_step
        self._rows.add({"round": self._last, "train_seconds": round(self._seconds, 3), **figures})
        if trainer.is_global_zero:
            self._rows.write(Path(trainer.default_root_dir) / self.path)
