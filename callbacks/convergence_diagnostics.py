"""Measure the quantities of Flow's convergence analysis: gradients, dissimilarity, progress, routing probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from flow_pl.callbacks._federated import federated_data, federated_module
from flow_pl.callbacks._output_files import check_ending, check_writable
from flow_pl.data.batch import Chunk, ClientBatch
from flow_pl.engine.chunk_size import ChunkSize
from flow_pl.engine.client_update import ClientUpdate
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.server_round import sent_parameters, server_groups
from flow_pl.evaluation.convergence import (
    HEAD,
    OBSERVED,
    dissimilarity_bound,
    gradient_figures,
    gradient_sums,
    has_global_model,
    observed,
)
from flow_pl.methods.base import Method
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.optional import import_optional
from flow_pl.utils.rng import Stream, generator
from flow_pl.utils.rows_file import RowsFile
from flow_pl.utils.validation import given, require_count

PROGRESS = ("global_progress", "local_progress", "deviation")
"""Squared distances that the clients of a round measure, if their method has such models."""


class ConvergenceDiagnostics(Callback):
    """Measures what Flow's convergence analysis bounds (Panchal et al., NeurIPS 2023, Section 4 and Appendix E).

    Measures rounds 0, n, 2n, ... of a fit and logs with their training metrics. On seen clients, drawn from (seed,
    round), with w_g at the start of the round:

    - `diagnostics/loss`: F(w_g), the clients weighted as in the server's mean;
    - `diagnostics/gradient_norm`: ||grad F(w_g)||, corrected for sampling; 0 if it cannot be distinguished from 0;
      `diagnostics/sample_gradient_norm`: that of the mean over the drawn clients, uncorrected;
    - `diagnostics/client_gradient_norm`: root of the mean over clients of ||grad f_m(w_g)||^2;
    - `diagnostics/gradient_diversity`: mean of ||grad f_m(w_g) - grad F(w_g)||^2 (Definition E.5);
    - `diagnostics/G`, `diagnostics/B`: of the tightest bound mean ||grad f_m||^2 <= G^2 + B^2 ||grad F||^2 that holds
      in all rounds measured so far.

    On the clients of the round, root mean squares over clients:

    - `diagnostics/global_progress`: of the client's copy of w_g, ||w_g,m - w_g|| (Lemma E.7);
    - `diagnostics/local_progress`: of the local model, ||w_l - w_g|| (Lemma E.6); of the personal one, if a method
      trains one beside the model it sends;
    - `diagnostics/deviation`: of the personalized model, ||w_p - w_g||, the routed share of w_l - w_g, over training
      examples (Lemma E.8);
    - `diagnostics/q_local`, `diagnostics/q_global`, `diagnostics/q_local/<block>`: means of the routing probabilities.

    A method logs those of its models; one that does not send a single w_g (`Local`, `HypCluster`) logs none. Training
    stays bit-identical, and the device is read only once, at the end of such a round.

    Args:
        every_n_rounds: number of rounds between two measurements.
        clients: number of clients whose gradient is computed, once over all of their examples; null for as many as in a
            round. The more their gradients differ, the more clients are needed to distinguish ||grad F|| from 0.
        path: a table with a row for each measurement (.csv), in the run's folder; null for none.
        figure: a figure of the measurements (.png) in the run's folder, drawn at the end of the fit, where
            `WandbResults` finds it; null for none.

    Raises:
        ConfigurationError: a number is not positive or a path has another ending; at the start of a fit, a file cannot
            be written, or matplotlib, which draws the figure, is not installed.
    """

    def __init__(
        self,
        every_n_rounds: int = 10,
        clients: int | None = None,
        path: str | None = "diagnostics.csv",
        figure: str | None = "figures/diagnostics.png",
    ) -> None:
        require_count(every_n_rounds=every_n_rounds, **given(clients=clients))
        self.every_n_rounds = every_n_rounds
        self.clients = clients
        self.path = None if path is None else check_ending(path, (".csv",))
        self.figure = None if figure is None else check_ending(figure, (".png",))
        self._rows = RowsFile()
        self._loop: FederatedLoop | None = None
        self._gradients: Tensor | None = None
        self._observations: list[Parameters] = []

    @property
    def rows(self) -> list[dict[str, float]]:
        """The measurements so far."""
        return self._rows.rows()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed fit continues from."""
        return {"rows": self._rows.text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._rows.restore(state_dict.get("rows"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the files before the fit."""
        if self.figure is not None:
            import_optional("matplotlib", "compare", "the figure of ConvergenceDiagnostics (or set figure to null)")
        if trainer.is_global_zero:
            for file in (self.path, self.figure):
                if file is not None:
                    check_writable(Path(trainer.default_root_dir) / file)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of a checkpoint, in place of what a killed process has left."""
        if trainer.is_global_zero and self.path is not None and self._rows.text:
            self._rows.write(Path(trainer.default_root_dir) / self.path)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the gradients, and start observing the round's clients."""
        module = federated_module(pl_module)
        if trainer.current_epoch % self.every_n_rounds or not has_global_model(module.method):
            return
        self._gradients = self._gradient_sums(trainer, pl_module)
        self._observations, self._loop = [], module.loop
        module.loop = _ObservingLoop(module.loop, self._observations)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the measurements of all processes, log and write them."""
        if self._loop is None:
            return
        self._restore(pl_module)
        figures = self._figures(trainer, pl_module)
        measured = [*self.rows, figures]
        squares = ([row[name] ** 2 for row in measured] for name in ("gradient_norm", "client_gradient_norm"))
        figures["G"], figures["B"] = dissimilarity_bound(*squares)
        self._rows.add({"round": trainer.current_epoch, **figures})
        if trainer.is_global_zero and self.path is not None:
            self._rows.write(Path(trainer.default_root_dir) / self.path)
        logged = {f"diagnostics/{name}": torch.tensor(value) for name, value in figures.items()}
        # already reduced: every process has the same value
        pl_module.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, sync_dist=True, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figure."""
        if trainer.is_global_zero and self.figure is not None and self.rows:
            from flow_pl.callbacks._convergence_figure import draw  # needs matplotlib

            draw(self.rows, Path(trainer.default_root_dir) / self.figure)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._restore(pl_module)

    def _restore(self, pl_module: LightningModule) -> None:
        if self._loop is not None:
            federated_module(pl_module).loop = self._loop
            self._loop = None

    def _gradient_sums(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        """Sum the gradients of this process's drawn clients, the largest clients first."""
        module, data, number = federated_module(pl_module), federated_data(trainer), trainer.current_epoch
        dataset, sampler = trainer.train_dataloader.dataset, trainer.train_dataloader.sampler  # type: ignore[union-attr]
        seen = data.federation.seen
        count = min(data.cohort_size if self.clients is None else self.clients, len(seen))
        drawn = np.sort(generator(sampler.seed, Stream.DIAGNOSIS, number).choice(seen, count, replace=False))
        drawn = drawn[np.argsort(-data.federation.train_sizes[drawn], kind="stable")]
        share = tuple(drawn[trainer.global_rank :: trainer.world_size].tolist())
        server = server_groups(module.method)
        size = sum(p.numel() for p in sent_parameters(module.method)["global"].values())
        sums = torch.zeros(HEAD + size, device=pl_module.device)
        batch: ClientBatch = data.transfer_batch_to_device(dataset[Chunk(number, share)], pl_module.device, 0)
        batch = data.on_after_batch_transfer(batch, 0)

        def measure(piece: ClientBatch) -> Tensor:
            return gradient_sums(module.method, server, piece, module.loop.weighting)

        for piece in ChunkSize().run(batch, measure):
            sums += piece
        return sums

    def _figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Compute the values of the round, the same in all processes."""
        blocks = federated_module(pl_module).route_names
        assert self._gradients is not None
        progress = torch.zeros(len(PROGRESS) + len(blocks), 2, device=pl_module.device)
        for group in self._observations:
            found = [group.get(name) for name in PROGRESS]
            found += list(group["q_local"].unbind(1)) if blocks else []
            for place, measured in enumerate(found):
                if measured is not None:
                    finite = measured.isfinite()  # exclude clients that diverged, as in the server's mean
                    progress[place] += torch.stack([measured.where(finite, 0).sum(), finite.sum()])
        sums = trainer.strategy.reduce(torch.cat([progress.flatten(), self._gradients]), reduce_op="sum")
        totals, counts = sums[: progress.numel()].view(-1, 2).unbind(1)
        gradients = gradient_figures(sums[progress.numel() :], len(federated_data(trainer).federation.seen))
        # the only read from the device
        values = torch.cat([torch.stack([*gradients.values()]), totals / counts]).tolist()
        squares, q_local = values[len(gradients) :][: len(PROGRESS)], values[len(gradients) + len(PROGRESS) :]
        figures = dict(zip(gradients, values, strict=False))
        # NaN if no client has it
        figures |= {name: mean**0.5 for name, mean in zip(PROGRESS, squares, strict=True) if mean == mean}
        if q_local:
            mean = sum(q_local) / len(q_local)
            figures |= {"q_local": mean, "q_global": 1 - mean}
            figures |= {f"q_local/{block}": q for block, q in zip(blocks, q_local, strict=True)}
        return figures


class _ObservingLoop(FederatedLoop):
    """Wraps a loop and records what its clients measure.

    Args:
        loop: the loop whose settings and traces it shares.
        observations: collects the measurements, chunk by chunk.
    """

    def __init__(self, loop: FederatedLoop, observations: list[Parameters]) -> None:
        vars(self).update(vars(loop))
        self._observations = observations

    def train_clients(
        self,
        method: Method,
        server: Groups,
        batch: ClientBatch,
        loss_scale: Tensor | None = None,
        kept: Groups | None = None,
    ) -> ClientUpdate:
        """See `FederatedLoop.train_clients`."""
        update = super().train_clients(observed(method, server), server, batch, loss_scale, kept)
        self._observations.append(update.kept.pop(OBSERVED))
        return update
