"""Shows progress in rounds and clients."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich import get_console

from flow_pl.callbacks._federated import federated_data
from flow_pl.callbacks._progress_display import ProgressDisplay
from flow_pl.data import CohortSampler
from flow_pl.utils.validation import require_at_least_zero

ACCURACIES = {
    "val/generalized_accuracy": "val generalized",
    "val/personalized_accuracy": "personalized",
    "privacy/epsilon": "epsilon",
}
"""Metrics shown after the training losses of a fit, when available, with their labels."""


def served_clients(loader: Any, batch: Sized, batch_idx: int) -> int:
    """Count the clients in the chunks that all processes have trained at the same time."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, CohortSampler):
        return len(batch)
    # the unusable clients of other processes are not known here
    return sampler.served[batch_idx] - len(getattr(batch, "unusable", ()))


def _evaluated(trainer: Trainer, dataloader_idx: int) -> Any:
    """Return the dataloader of an evaluation."""
    if trainer.predicting:
        loaders = trainer.predict_dataloaders
    else:
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    return loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders


class RoundProgressBar(ProgressBar):
    """Shows the round, the clients trained in it, clients per second, the time left and the headline metrics.

    Draws live bars on a terminal; elsewhere (a log file, a batch job) prints a line at most every `interval_s` seconds
    and one at the end. Only the first process shows anything: it counts the clients of all processes, and assumes that
    they have progressed equally.

    Args:
        interval_s: minimum number of seconds between two lines when there is no terminal.

    Raises:
        ConfigurationError: `interval_s` is negative or not finite.
    """

    def __init__(self, interval_s: float = 10.0) -> None:
        super().__init__()
        require_at_least_zero(interval_s=interval_s)
        self.interval_s = interval_s
        self._enabled = True
        self._display: ProgressDisplay | None = None
        self._ahead = ("", "", 0.0)
        self._fit_clients = 0
        self._round_clients = 0
        self._evaluated_clients = 0

    @property
    def is_enabled(self) -> bool:
        """Return whether progress is shown."""
        return self._enabled

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False
        self._stop()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the display."""
        self._start()
        self._fit_clients = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a round."""
        self._round_clients = 0
        self._show_round(done=0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Sized, batch_idx: int
    ) -> None:
        """Count the clients of a chunk."""
        clients = served_clients(trainer.train_dataloader, batch, batch_idx)
        self._round_clients += clients
        self._fit_clients += clients
        # not `total_train_batches`, which counts every batch as a step if `max_steps` is set
        self._show_round(done=(batch_idx + 1) / trainer.num_training_batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the metrics of the round."""
        # in every process, shown or not: reading a metric for the first time may reduce it over the processes
        metrics = trainer.callback_metrics
        losses = {
            n: n.removeprefix("train/").replace("_", " ") for n in metrics if n.startswith("train/") and "loss" in n
        }
        headlines = {**losses, **ACCURACIES}
        if self._display is not None:
            texts = [f"{label} {metrics[name]:.4f}" for name, label in headlines.items() if name in metrics]
            self._display.caption("  ".join(texts))
            self._display.line("  ".join([self._show_round(done=1.0), *texts]))
        if trainer.current_epoch + 1 == self._rounds():
            self._stop()  # stop before the trainer prints that it is done, in the middle of the bar

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last state on screen."""
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the display."""
        self._start()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begin with the clients of a dataloader."""
        if batch_idx == 0 and self._display is not None and not trainer.sanity_checking:
            self._display.flush()
            self._evaluated_clients = 0
            self._ahead = self._clients_ahead(trainer, dataloader_idx)
            self._show_clients(done=0)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Sized,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the clients of a chunk."""
        if self._display is not None and not trainer.sanity_checking:
            self._evaluated_clients += served_clients(_evaluated(trainer, dataloader_idx), batch, batch_idx)
            text = self._show_clients(done=batch_idx + 1)
            if trainer.state.fn != "fit":
                self._display.line(text)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume the display of the fit, if there is one."""
        if trainer.state.fn != "fit":
            self._stop()
        elif self._display is not None:
            self._display.remove("validation")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last state on screen, before other callbacks print in `on_test_end`."""
        self._stop()

    on_predict_epoch_end = on_test_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the terminal."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the terminal."""
        self._stop()

    def _start(self) -> None:
        if self._enabled and self._display is None:
            self._display = ProgressDisplay(get_console(), self.interval_s)

    def _stop(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def _rounds(self) -> int | None:
        """Return the round at which the fit ends; None if unknown."""
        # the server makes one step per round, so both limits count rounds
        limits = (self.trainer.max_epochs, self.trainer.max_steps)
        return min((limit for limit in limits if limit is not None and limit >= 0), default=None)

    def _show_round(self, done: float) -> str:
        """Draw the bar of the fit with a share `done` of the round completed; return its text."""
        number, rounds = self.trainer.current_epoch, self._rounds()
        label = f"Round {number + 1}" + ("" if rounds is None else f"/{rounds}")
        cohort = federated_data(self.trainer).cohort_size
        status = f"clients {self._round_clients}/{cohort}"
        return self._show("fit", label, status, number + done, rounds, self._fit_clients)

    def _clients_ahead(self, trainer: Trainer, dataloader_idx: int) -> tuple[str, str, float]:
        """Return the bar of a dataloader, its label and the number of chunks."""
        label = "Personalize & evaluate"
        if trainer.testing:
            # each population keeps its finished bar
            population = federated_data(trainer).test_populations[dataloader_idx]
            return population, f"{label} ({population} clients)", trainer.num_test_batches[dataloader_idx]
        if trainer.predicting:
            return "prediction", "Personalize & predict", trainer.num_predict_batches[dataloader_idx]
        return "validation", label, trainer.num_val_batches[dataloader_idx]

    def _show_clients(self, done: int) -> str:
        """Draw the bar of an evaluation with `done` chunks completed; return its text."""
        bar, label, chunks = self._ahead
        clients = self._evaluated_clients
        return self._show(bar, label, f"clients {clients}", done, chunks, clients)

    def _show(self, bar: str, label: str, status: str, position: float, total: float | None, clients: int) -> str:
        return "" if self._display is None else self._display.show(bar, label, status, position, total, clients)
