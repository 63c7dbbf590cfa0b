"""Logs the results of a test to Weights & Biases: a table, and the run's figures."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from flow_pl.callbacks._results import Results, ResultsCallback, metric_rows
from flow_pl.loggers import wandb_loggers


class WandbResults(ResultsCallback):
    """Logs the table of a test's results to W&B, and the figures of the run; does nothing without a `WandbLogger`.

    The table `test/results` has a row for each metric and a column for each population. All is logged against
    rounds, at the round of the tested model.

    Args:
        figures: folder, in the run's folder, of PNG files to log as images `figures/<name>`; it may be missing.
    """

    def __init__(self, figures: str = "figures") -> None:
        self.figures = figures

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test against rounds; Lightning would count chunks."""
        if wandb_loggers(trainer):
            pl_module.log("step", float(self.tested_round(trainer)), sync_dist=True, rank_zero_only=True)

    def report(self, trainer: Trainer, pl_module: LightningModule, rounds: int, results: Results) -> None:
        """Log table and images."""
        figures = sorted((Path(trainer.default_root_dir) / self.figures).glob("*.png"))
        for logger in wandb_loggers(trainer):
            logger.log_table("test/results", columns=["metric", *results], data=metric_rows(results), step=rounds)
            for figure in figures:
                logger.log_image(f"figures/{figure.stem}", [str(figure)], step=rounds)
