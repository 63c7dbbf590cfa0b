"""The LightningModule: owns the server's parameters and optimizer, and delegates clients to the federated loop."""

from __future__ import annotations

import os
from functools import partial
from typing import IO, Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import Self

from flow_pl.checks import check_trainer
from flow_pl.data import FederatedDataModule
from flow_pl.data.batch import ClientBatch
from flow_pl.engine.aggregation import Aggregation, Mean
from flow_pl.engine.attacks import Attack
from flow_pl.engine.chunk_size import ChunkSize
from flow_pl.engine.client_states import ClientStates
from flow_pl.engine.client_update import ClientUpdate
from flow_pl.engine.compression import Compression
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.loss_scale import LossScale
from flow_pl.engine.privacy import GaussianMechanism
from flow_pl.engine.server_round import ServerRound, server_groups, trained_parameters
from flow_pl.evaluation.counts import ClientEvaluation, ClientPredictions
from flow_pl.methods.base import Method
from flow_pl.models.blocks import Blocks
from flow_pl.models.normalization import BatchNorm, converted
from flow_pl.module.checkpoint import from_checkpoint, identity, load, save
from flow_pl.module.client_updates import train_clients
from flow_pl.module.evaluation import evaluate, predict
from flow_pl.module.kept_states import initial_state, opened_states
from flow_pl.module.notices import warn_of_empty_rounds
from flow_pl.module.preparation import (
    begin_fit,
    check_still_trained,
    give_shapes,
    limit_rounds,
    prepare,
    report_blocks,
)
from flow_pl.module.server_step import begin_round, make_server_step
from flow_pl.resume import data_record
from flow_pl.tasks import Classification, Objective
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_fraction


class FederatedModule(lightning.LightningModule):
    """A federated method as a LightningModule: one training epoch is one communication round.

    A training batch is a chunk of clients. The last batch of a round takes the server's step, with the mean of the
    clients' updates as a pseudo-gradient; so `trainer.global_step` counts rounds, and checkpoints, schedulers,
    loggers and multi-process strategies work as in any Lightning project.

    Args:
        backbone: any module that returns a tensor.
        method: the federated algorithm; a bound copy of it is kept.
        loop: trains the clients.
        objective: the task.
        server_optimizer: any torch optimizer, on the pseudo-gradient. SGD with lr 1.0 is FedAvg, with momentum
            FedAvgM, Adam FedAdam (Reddi et al., Adaptive Federated Optimization, ICLR 2021).
        server_scheduler: schedules the server optimizer's learning rate; stepped once per round.
        max_rejected: largest share of a round's clients that may be left out, if their update is not finite or their
            data cannot be used; beyond it the run stops.
        aggregation: how the server combines the clients' updates; null = their weighted mean.
        privacy: client-level differential privacy of the training; null = none.
        compression: lossy compression of the updates that clients send; null = none.
        attack: simulated clients that attack; null = none.
        blocks: names of the backbone's submodules that a method routes, or splits into body and head, as in
            `named_modules`; "auto" = the children of a Sequential, the stages of a residual network, the layers of
            a transformer.
        batch_norm: replacement of BatchNorm layers: "group" = GroupNorm with their weights, "frozen" = constant
            statistics, "local" = each client keeps them (FedBN); null = a backbone with any is refused.
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: Method,
        loop: FederatedLoop | None = None,
        objective: Objective | None = None,
        server_optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1.0),
        server_scheduler: LRSchedulerCallable | None = None,
        max_rejected: float = 0.5,
        aggregation: Aggregation | None = None,
        privacy: GaussianMechanism | None = None,
        compression: Compression | None = None,
        attack: Attack | None = None,
        blocks: Blocks = "auto",
        batch_norm: BatchNorm | None = None,
    ) -> None:
        super().__init__()
        require_fraction(max_rejected=max_rejected)
        self.automatic_optimization = False
        self.loop = FederatedLoop() if loop is None else loop
        self.objective = Classification() if objective is None else objective
        self.batch_norm = batch_norm
        if batch_norm is not None:
            backbone = converted(backbone, batch_norm)
        self.method = method.bind(backbone, self.objective, None if blocks == "auto" else blocks)
        self.server = nn.ModuleDict(self.method.modules)
        self.server_optimizer = server_optimizer
        self.server_scheduler = server_scheduler
        self.max_rejected = max_rejected
        self.aggregation = Mean() if aggregation is None else aggregation
        self.privacy = privacy
        self.compression = compression
        self.attack = attack
        self.loss_scale = LossScale()
        self.server_changed = False
        self._round: ServerRound | None = None
        self.empty_rounds = 0
        self.states: ClientStates | None = None
        self.states_of = ""  # identifies the rows of the clients that have this state
        self.chunks = ChunkSize()

    @property
    def backbone(self) -> nn.Module:
        """Return the global model w_g."""
        return self.server["global"]

    @property
    def route_names(self) -> list[str]:
        """Return the names of the routed blocks; empty for a method that does not route."""
        return self.method.route_names

    @property
    def orders(self) -> int:
        """Return how many orderings of its examples a client needs; the data module draws as many."""
        return self.loop.orders(self.method)

    def forward(self, x: Inputs) -> Tensor:
        """Compute the outputs of the global model for instances x [N, ...]."""
        outputs: Tensor = self.backbone(x)
        return outputs

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | os.PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a trained module from a checkpoint, which holds the configuration of its training.

        Only class paths that name a class of the expected kind are imported. The clients' state of a stateful method is
        not loaded: pass `ckpt_path` to the Trainer for that.

        Args:
            checkpoint_path: file of a run.
            map_location: device of the parameters; None = the CPU.
            hparams_file: `config.yaml` of the run, whose settings replace those in the checkpoint.
            strict: whether the parameter names must match exactly; None = True.
            weights_only: None or True: nothing in a checkpoint is executed.
            **kwargs: constructor arguments that override the configuration; arguments without a default are required
                if the run was set up in Python, since its checkpoint then holds no configuration.

        Returns:
            The module.

        Raises:
            ConfigurationError: the checkpoint is missing, damaged or of another method or backbone; its settings are
                not valid; or it holds none, and an argument is not given.
        """
        return from_checkpoint(cls, checkpoint_path, map_location, hparams_file, strict, weights_only, kwargs)

    def setup(self, stage: str) -> None:
        """Check that data, backbone, method and optimizers fit together, before anything is trained.

        Raises:
            ConfigurationError: they do not fit.
        """
        prepare(self, stage)

    def configure_model(self) -> None:
        """Create the parameters whose shapes follow from the data, for callbacks that copy the model in their setup.

        Lightning's `WeightAveraging` calls this before `setup`. Called again, it changes nothing.

        Raises:
            ConfigurationError: data, backbone and method do not fit together.
        """
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        if isinstance(data, FederatedDataModule) and any(map(is_lazy, self.parameters())):
            give_shapes(self, data)

    def trained(self) -> list[nn.Parameter]:
        """Return the server's parameters that its optimizer updates: neither frozen nor averaged directly."""
        groups = trained_parameters(self.method).values()
        return [p for group in groups for p in group.values() if p.requires_grad]

    def open_states(self, data: FederatedDataModule) -> None:
        """Allocate storage for the clients' state, unless an earlier stage has done so."""
        self.states = opened_states(self, data)

    def initial_state(self, method: Method, server: Groups) -> Groups:
        """Return the state of a client that has not been sampled."""
        return initial_state(self, method, server)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Create the server's optimizer and scheduler."""
        optimizer = self.server_optimizer(self.trained())
        if self.server_scheduler is None:
            return optimizer
        scheduler = self.server_scheduler(optimizer)
        return [optimizer], [scheduler]

    def on_fit_start(self) -> None:
        """Report which blocks are routed, and check the number of rounds, which is known by now.

        Raises:
            PrivacyBudgetError: it exceeds the privacy budget.
        """
        limit_rounds(self)
        report_blocks(self.method)

    def configure_callbacks(self) -> list[Callback]:
        """Check the trainer; add no callbacks. Lightning calls this before it rejects settings in its own words.

        Raises:
            ConfigurationError: the trainer clips or accumulates gradients.
        """
        if self.trainer.state.fn == "fit":
            check_trainer(self.trainer)
        return []

    def on_train_start(self) -> None:
        """Begin the fit.

        Raises:
            ConfigurationError: Lightning has replaced the training loader's sampler.
        """
        begin_fit(self)

    def on_train_epoch_start(self) -> None:
        """Begin a round; discard the remains of an interrupted one.

        Raises:
            ConfigurationError: a callback has frozen or unfrozen parameters.
        """
        check_still_trained(self.method)
        self._round = None
        if self.states is not None:
            self.states.discard()
        if self.privacy is not None and self.privacy.exhausted:
            self.privacy.require_budget(None)  # trainer.min_epochs would continue where training should stop

    def training_step(self, batch: ClientBatch, batch_idx: int) -> None:
        """Train a chunk of clients; after the last one of the round, take the server's step."""
        server = server_groups(self.method)
        if self._round is None:
            self._round = begin_round(self, self.method.in_round(self.current_epoch, server))
        method = self._round.method
        self._round.reject(batch.unusable)
        if len(batch):
            scaler = self.scaler
            scale = None if scaler is None else self.loss_scale.value
            for update in self.chunks.run(batch, partial(self._train, method, server, scale)):
                accepted = self._round.add(update)
                if self.states is not None and method.private:
                    self.states.write(update.client, update.kept, accepted)
        if self.trainer.is_last_batch:
            self._server_step(self._round)
            self._round = None
            self.chunks.end_round()

    def _train(self, method: Method, server: Groups, scale: Tensor | None, piece: ClientBatch) -> ClientUpdate:
        return train_clients(self, method, server, scale, piece)

    def _server_step(self, round_: ServerRound) -> None:
        make_server_step(self, round_)

    def on_train_end(self) -> None:
        """Report the number of rounds without a client."""
        warn_of_empty_rounds(self.trainer, self.empty_rounds)
        self.empty_rounds = 0

    def on_validation_epoch_end(self) -> None:
        """Log validation against rounds: "step" is the loggers' x-axis, and Lightning would count chunks."""
        if not self.trainer.sanity_checking:
            step = float(self.trainer.global_step)
            self.log("step", step, on_step=False, on_epoch=True, batch_size=1, sync_dist=True, rank_zero_only=True)

    @property
    def scaler(self) -> Any:
        """Return the gradient scaler of 16-bit precision; None in other precisions."""
        plugin = self.trainer.precision_plugin
        return plugin.scaler if isinstance(plugin, MixedPrecision) else None

    def validation_step(  # type: ignore[override]  # callbacks make metrics of any output; Lightning types losses
        self, batch: ClientBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> ClientEvaluation:
        """Personalize a chunk of clients and evaluate them; callbacks compute metrics from the counts."""
        return evaluate(self, batch)

    def test_step(  # type: ignore[override]
        self, batch: ClientBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> ClientEvaluation:
        """Evaluate like `validation_step`, for seen and for new clients."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: ClientBatch, batch_idx: int, dataloader_idx: int = 0) -> ClientPredictions:
        """Personalize a chunk of clients and predict their held-out and unlabelled instances."""
        return predict(self, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the training's settings and the clients' state to a checkpoint."""
        save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject a checkpoint of another method, backbone or split, or one that a fit cannot resume from.

        Raises:
            ConfigurationError: see `check_checkpoint` and `flow_pl.resume`; or it holds only weights.
        """
        load(self, checkpoint)

    def data_record(self) -> dict[str, Any] | None:
        """Return a record that identifies the run's data; None if its rows are not available here."""
        return data_record(self.trainer.datamodule)  # type: ignore[attr-defined]

    def identity(self) -> dict[str, str]:
        """Return the settings that a checkpoint must have been trained with.

        These are the class names of method and backbone, the blocks unless they are the children of a Sequential, and
        the replacement of BatchNorm layers.
        """
        return identity(self)
