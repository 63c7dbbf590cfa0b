"""Check and set up a module before clients are trained or evaluated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from flow_pl.checks import (
    check_backbone,
    check_fit,
    check_gradients,
    check_label_moments,
    check_label_range,
    check_server_optimizer,
)
from flow_pl.data import CohortSampler, FederatedDataModule
from flow_pl.data.rounds import count_rounds
from flow_pl.engine.chunk_size import ChunkSize
from flow_pl.engine.client_optimizer import check_elementwise
from flow_pl.engine.draw_check import check_draws
from flow_pl.engine.round_settings import choose_attackers, planned_rounds, prepare_rounds
from flow_pl.engine.server_round import changed_parameters
from flow_pl.engine.tracing import check_compiler
from flow_pl.errors import ConfigurationError
from flow_pl.kernels.allocator import keep_freed_memory
from flow_pl.methods.base import Method
from flow_pl.module.round_log import prepare_log
from flow_pl.resume import apply_server
from flow_pl.utils.inputs import Inputs, take

if TYPE_CHECKING:
    from flow_pl.module.federated import FederatedModule

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def prepare(module: FederatedModule, stage: str) -> None:
    """Check that data, backbone, method and optimizers fit together, and open the storage of the clients' state.

    Args:
        module: module attached to a trainer whose data are set up.
        stage: stage of the trainer: fit, validate, test or predict.

    Raises:
        ConfigurationError: they do not fit.
    """
    data = getattr(module.trainer, "datamodule", None)
    if not isinstance(data, FederatedDataModule):
        raise ConfigurationError(
            f"the data module is {type(data).__name__}, expected a FederatedDataModule, whose batches are chunks "
            "of clients: derive yours from flow_pl.data.FederatedDataModule."
        )
    if module.trainer.precision not in PRECISIONS:
        raise ConfigurationError(
            f"trainer.precision is {module.trainer.precision}, expected one of {', '.join(PRECISIONS)}: updates and "
            "their mean are kept in float32."
        )
    check_gradients(module.method, module.trainer, stage)
    device, mode = module.trainer.strategy.root_device, module.loop.engine.compile_mode
    if device.type == "cpu":
        keep_freed_memory()
    if stage == "fit" and mode is not None:
        check_compiler(device, mode)
    if stage == "fit":
        if changed_parameters(module.method):
            module.method.plan()
        module.method.set_cohort_share(data.cohort_size / data.population_size)
    check_elementwise(module.loop.client_optimizer)
    example = give_shapes(module, data)
    check_draws(module.method, example)
    check_backbone(module.method, example, side_by_side=data.chunk_size != 1)
    if module.attack is not None:
        module.attack.check(example, data.num_classes, data.federation.store.label_shape)
    data.unevaluated = choose_attackers(data, module.attack)
    check_label_range(module.objective, data.federation)
    if stage == "fit":
        check_label_moments(module.objective, data.federation)
        module.method.cohort_size = data.cohort_size
        prepare_rounds(
            module.trainer,
            data,
            module.method,
            module.loop.weighting,
            module.aggregation,
            module.privacy,
            module.attack,
            module.compression,
        )
        rounds = -1 if module.trainer.max_epochs is None else module.trainer.max_epochs
        check_server_optimizer(module.server_optimizer, module.server_scheduler, module.trained(), rounds)
        module.loop.client_schedule.check(rounds)
    module.open_states(data)
    if data.chunk_size == "auto" and not module.chunks.automatic:
        module.chunks = ChunkSize(True, 4 * sum(p.numel() for p in module.trained()))


def give_shapes(module: FederatedModule, data: FederatedDataModule) -> Inputs:
    """Check that data, backbone and method fit together, and create the parameters whose shapes follow from the data.

    Args:
        module: module attached to a trainer.
        data: its data, set up.

    Returns:
        An instance [1, ...] of the data, in the loop's layout.

    Raises:
        ConfigurationError: they do not fit.
    """
    example = take(module.loop.lay_out(take(data.example(), None)), 0)
    store = data.federation.store
    check_fit(module.method, example, data.num_classes, store.label_shape, store.real_valued)
    return example


def limit_rounds(module: FederatedModule) -> None:
    """Check the number of rounds against the privacy budget; end after one if the method trains nothing in rounds.

    Raises:
        PrivacyBudgetError: it exceeds the budget.
    """
    trainer, rounds = module.trainer, planned_rounds(module.trainer)
    if module.privacy is not None:
        module.privacy.require_budget(rounds)
    if not module.method.phases and rounds not in (0, 1):
        # each further round would only train all personal models once more for the same validation
        rank_zero_info(f"{type(module.method).__name__} trains nothing in rounds, so one round is run")
        trainer.fit_loop.max_epochs = 1
        trainer.check_val_every_n_epoch = 1


def report_blocks(method: Method) -> None:
    """Report the names of the blocks, if any are routed or a setting has chosen them."""
    if method.route_names or method.model.chosen:
        kind = "routed blocks" if method.route_names else "blocks"
        rank_zero_info(f"{kind}: {', '.join(method.model.blocks)}")


def begin_fit(module: FederatedModule) -> None:
    """Begin a fit: count and log its rounds, and apply the settings of a changed server optimizer.

    Raises:
        ConfigurationError: Lightning has replaced the training loader's sampler, so every process would train
            every client.
    """
    trainer = module.trainer
    count_rounds(trainer)
    prepare_log(trainer)
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    if not isinstance(sampler, CohortSampler):
        raise ConfigurationError(
            f"the training loader's sampler is {type(sampler).__name__}, expected a CohortSampler, which shares "
            "the cohort over processes: set trainer.use_distributed_sampler to false."
        )
    if module.server_changed:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        apply_server(
            module.server_optimizer,
            module.server_scheduler,
            trainer.optimizers[0],
            schedulers[0] if schedulers else None,
            trainer.global_step,
        )
        module.server_changed = False


def check_still_trained(method: Method) -> None:
    """Check that the trained parameters are those that the method was planned for.

    Raises:
        ConfigurationError: a callback has frozen or unfrozen parameters.
    """
    changed = changed_parameters(method)
    if changed:
        raise ConfigurationError(
            f"{', '.join(changed[:3])} {'has' if len(changed) == 1 else 'have'} been frozen or unfrozen after the "
            "start of the fit, expected requires_grad to stay unchanged: leave out callbacks that change it "
            "(BackboneFinetuning), and start a new fit for each phase of the training."
        )
