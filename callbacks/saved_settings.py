"""Save the settings of a run in its folder, in its checkpoints and with its loggers."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from flow_pl.configuration import KEY, SECTIONS
from flow_pl.results.run_folder import CONFIG, write_config
from flow_pl.resume import warn_of_changes


class SavedSettings(SaveConfigCallback):
    """Saves the configuration: for a fit in the run's folder and each checkpoint, for every command with each logger.

    Every logger receives it as hyperparameters, and as `config.yaml` in its log folder if it has one per run.
    """

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return the whole configuration except what belongs to a single command (a checkpoint, say)."""
        settings = json.loads(self.parser.dump(self.config, skip_none=False, format="json"))
        return {key: value for key, value in settings.items() if key in SECTIONS}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Pass the configuration to the loggers."""
        # evaluated in all processes, since it may be collective
        folders = [logger.log_dir for logger in trainer.loggers if isinstance(logger, CSVLogger | TensorBoardLogger)]
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        for folder in folders:
            self._write(Path(str(folder)) / self.config_filename)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file in the run's folder, once an earlier run has been moved aside."""
        if trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir) / CONFIG)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the configuration into the checkpoint, for `FederatedModule.load_from_checkpoint`."""
        checkpoint[KEY] = self.settings

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Report which settings of a resumed fit differ from its start."""
        if trainer.state.fn == "fit":
            warn_of_changes(checkpoint.get(KEY, {}), self.settings)

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_config(path, self.settings)
