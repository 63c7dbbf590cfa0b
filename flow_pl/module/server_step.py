"""Begin a round on the server, and take the server's step at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info

from flow_pl.engine.privacy import GaussianMechanism
from flow_pl.engine.round_settings import planned_rounds
from flow_pl.engine.server_round import ServerRound
from flow_pl.methods.base import Method
from flow_pl.module.notices import warn_of_empty_round, warn_of_rejected
from flow_pl.module.round_log import log_round

if TYPE_CHECKING:
    from flow_pl.module.federated import FederatedModule


def begin_round(module: FederatedModule, method: Method) -> ServerRound:
    """Return a round that combines the clients' updates by the module's settings, and has none yet.

    Args:
        module: module attached to the trainer of a fit.
        method: the method in this round.
    """
    return ServerRound(
        method,
        module.max_rejected,
        module.aggregation,
        module.privacy,
        module.attack,
        module.compression,
        Path(module.trainer.default_root_dir),
    )


def make_server_step(module: FederatedModule, round_: ServerRound) -> None:
    """Finish a round: step the server's optimizer and scheduler on its pseudo-gradient, and log its metrics.

    Args:
        module: module attached to the trainer of a fit, at the last batch of a round.
        round_: updates of this process.
    """
    figures = round_.finish(
        lambda tensor: module.trainer.strategy.reduce(tensor, reduce_op="sum"),
        module.current_epoch,
        module.trainer.global_rank,
        module.trainer.world_size,
    )
    scaler = module.scaler
    if scaler is not None:
        # Lightning unscales every gradient and requires a scaler; the pseudo-gradient was never scaled.
        parameters = module.trained()
        for p in [p for p in parameters if p.grad is not None] or parameters:  # it refuses a step without any gradient
            p.grad = scaler.scale(torch.zeros_like(p) if p.grad is None else p.grad)
        module.loss_scale.adapt(figures["skipped_steps"])
    warn_of_rejected(module.trainer, round_)
    if round_.empty:
        module.empty_rounds += 1
        if module.empty_rounds == 1:  # `on_train_end` reports their number
            warn_of_empty_round(module.trainer)
    optimizer = module.optimizers()
    assert isinstance(optimizer, LightningOptimizer)
    optimizer.step()
    if module.states is not None:
        # Not before: if the step fails, the round is repeated from the states at its start.
        module.states.commit()
        module.trainer.strategy.barrier()  # the next round's clients may have been another process's in this one
    optimizer.zero_grad()
    scheduler = module.lr_schedulers()
    if scheduler is not None:
        scheduler.step()  # type: ignore[union-attr]
    if scaler is None:
        del figures["skipped_steps"]
    sampler = module.trainer.train_dataloader.sampler  # type: ignore[union-attr]
    figures["bytes_down"] = figures["bytes_down"] + round_.bytes_down * sum(sampler.absent.values())
    figures |= {f"{name}_clients": torch.tensor(float(count)) for name, count in sampler.absent.items()}
    if module.loop.client_schedule.factory is not None:
        figures["client_lr_factor"] = torch.tensor(module.loop.client_schedule.factor(module.current_epoch))
    if module.states is not None:
        kept = torch.tensor(float(len(module.states.known())))
        figures |= {"clients_with_state": kept, "state_bytes": kept * module.states.bytes_per_client}
    if round_.unknown:
        # Lightning keeps the last logged values and would log them again
        logged_before = module.trainer.logged_metrics
        for name in round_.unknown:
            logged_before.pop(f"train/{name}", None)
    logged = {f"train/{name}": value for name, value in figures.items()}
    if module.privacy is not None:
        logged["privacy/epsilon"] = torch.tensor(module.privacy.epsilon)
        _stop_at_budget(module.trainer, module.privacy)
    log_round(module.trainer, logged)


def _stop_at_budget(trainer: Trainer, privacy: GaussianMechanism) -> None:
    """End the fit after the last round that the privacy budget allows."""
    rounds = planned_rounds(trainer)
    if privacy.exhausted and (rounds is None or trainer.global_step < rounds):
        trainer.should_stop = True
        rank_zero_info(
            f"the privacy budget is spent: epsilon is {privacy.epsilon:.4g} of {privacy.budget:g} after "
            f"{privacy.ledger.rounds} rounds, and another round would exceed it. Training stops here."
        )
