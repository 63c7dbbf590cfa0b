"""The federated loop: train, personalize and evaluate the clients of a chunk side by side.

One loop for every method: phases over a client's data, minibatches in the drawn order, steps that each update one
group. Nothing in it reads a value from the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from flow_pl.data.batch import ClientBatch
from flow_pl.engine.client_groups import ClientGroups
from flow_pl.engine.client_norms import clipped
from flow_pl.engine.client_optimizer import StackedOptimizer
from flow_pl.engine.client_schedule import ClientSchedule, SchedulerFactory
from flow_pl.engine.client_update import ClientUpdate
from flow_pl.engine.gradients import GradientEngine, map_clients
from flow_pl.engine.plan import Plan, plan_phases
from flow_pl.engine.schedule import make_schedule, minibatches, part_mask
from flow_pl.engine.tracing import CompileMode
from flow_pl.engine.training_statistics import TrainingStatistics
from flow_pl.kernels.functional import training_mode
from flow_pl.methods.base import Method
from flow_pl.methods.group_names import naming_missing_groups
from flow_pl.methods.steps import Derive, Minibatch, Phase
from flow_pl.utils.counter_rng import step_keys
from flow_pl.utils.groups import Groups, OptimizerFactory, client_rows
from flow_pl.utils.inputs import Inputs, map_inputs
from flow_pl.utils.validation import given, require_choice, require_count, require_positive


class FederatedLoop:
    """Trains, personalizes and evaluates chunks of clients for any method.

    Args:
        local_epochs: epochs over a client's data in a round (E), for every method alike.
        personal_epochs: epochs when a client is personalized for evaluation; None for `local_epochs`.
        batch_size: examples in a minibatch of a client.
        client_optimizer: any element-wise torch optimizer; a fresh one for every client, phase and step.
        weighting: a client's weight in the server's mean: its number of training examples, or 1.
        client_scheduler: any torch schedule, stepped once a round on a learning rate of 1; what it makes of that is a
            factor on the client optimizer's learning rate, in the training of what the clients send or keep. Models
            that are made anew for a client, in rounds or in evaluation, keep the whole learning rate. None for a
            constant one.
        evaluation_batch_size: number of a client's examples that are evaluated at once.
        trace_after: steps of a kind after which the step is traced once and replayed (a trace costs thirty
            to sixty times what it saves on each step); null to never trace.
        channels_last: store the images of a client that is trained alone in channels-last format. Makes
            convolutions and pooling faster, and group normalization slower; the numbers stay the same up to rounding.
            Blocks must then flatten or reshape a convolution's output, not `view` it.
        compile_mode: compile traced steps with `torch.compile` in this mode, which takes seconds each; on a GPU,
            "reduce-overhead" and "max-autotune" replay them as CUDA graphs. Pays in long runs whose steps have few
            shapes. The numbers stay the same up to rounding, so a resumed run is no longer bit-identical.
        max_grad_norm: largest L2 norm of the gradient of a client's step, over all that the step updates; a larger one
            is scaled down to it, for each client separately. None for no clipping.
    """

    def __init__(
        self,
        local_epochs: int = 3,
        personal_epochs: int | None = None,
        batch_size: int = 20,
        client_optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        weighting: Literal["examples", "uniform"] = "examples",
        client_scheduler: SchedulerFactory | None = None,
        evaluation_batch_size: int = 256,
        trace_after: int | None = 50,
        channels_last: bool = False,
        compile_mode: CompileMode | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        require_count(local_epochs=local_epochs, **given(personal_epochs=personal_epochs))
        require_count(batch_size=batch_size, evaluation_batch_size=evaluation_batch_size)
        require_choice(("examples", "uniform"), weighting=weighting)
        self.local_epochs = local_epochs
        self.personal_epochs = local_epochs if personal_epochs is None else personal_epochs
        self.batch_size = batch_size
        self.client_optimizer = client_optimizer
        self.client_schedule = ClientSchedule(client_scheduler)
        require_positive(**given(max_grad_norm=max_grad_norm))
        self.max_grad_norm = max_grad_norm
        self.weighting = weighting
        self.evaluation_batch_size = evaluation_batch_size
        self.channels_last = channels_last
        self.engine = GradientEngine(trace_after, compile_mode)

    def orders(self, method: Method) -> int:
        """Return how many orderings of its examples a client needs, for a round or for its personalization."""
        plans = [*self._plan(method, True), *self._plan(method, False)]
        return max([1, *(orders.stop for _, orders in plans if orders is not None)])

    def _plan(self, method: Method, training: bool) -> Plan:
        return plan_phases(method, training, self.local_epochs, self.personal_epochs)

    def train_clients(
        self,
        method: Method,
        server: Groups,
        batch: ClientBatch,
        loss_scale: Tensor | None = None,
        kept: Groups | None = None,
    ) -> ClientUpdate:
        """Train a chunk of clients for one round.

        Args:
            method: the algorithm.
            server: the server's groups; not changed.
            batch: the clients, at least one.
            loss_scale: scalar tensor, factor on the losses in 16-mixed; None for no scaling.
            kept: the clients' state [C, ...], by the group they start with, changed in place; None if they have no
                state.

        Returns:
            The updates that the clients send and the state that they keep.
        """
        groups, statistics = self.run(method, server, batch, True, loss_scale, kept)
        sizes = batch.train.mask.sum(1).to(torch.float32)
        weights = sizes if self.weighting == "examples" else torch.ones_like(sizes)
        factors = {} if method.participation is None else groups.groups[method.participation]
        uses = Counter([*method.shared.values(), *method.private.values()])
        difference: Groups = {}
        for name, source in method.shared.items():
            copies, base = groups.stack(source), [server[name][key] for key in groups.groups[source]]
            if uses[source] == 1:
                # The clients' copies are no longer needed, so the difference is computed in place.
                torch._foreach_sub_(copies, base)
            else:
                copies = list(torch._foreach_sub(copies, base))
            difference[name] = dict(zip(groups.groups[source], copies, strict=True))
        for name in method.private.values():
            groups.stack(name)
        return ClientUpdate(
            batch.client,
            difference,
            {name: weights * factors.get(name, 1) for name in method.shared},
            statistics,
            {name: groups.groups[source] for name, source in method.private.items()},
        )

    def personalize(self, method: Method, server: Groups, batch: ClientBatch, kept: Groups | None = None) -> Groups:
        """Return the groups of one client after personalization, without a client axis; changed groups are copies."""
        groups, _ = self.run(method, server, batch, False, kept=kept)
        return groups.prefix(1)

    def run(
        self,
        method: Method,
        server: Groups,
        batch: ClientBatch,
        training: bool,
        loss_scale: Tensor | None = None,
        kept: Groups | None = None,
    ) -> tuple[ClientGroups, TrainingStatistics]:
        """Run a round or the personalization of a chunk of clients, starting from the server's and their own groups."""
        plan = self._plan(method, training)
        groups = ClientGroups(method.start(server), len(batch))
        if kept is not None:
            groups.put(kept)
        statistics = TrainingStatistics(batch.client.device)
        named = naming_missing_groups(method, groups.groups)
        lasting = {*method.shared.values(), *method.private.values()}
        with named, torch.no_grad(), training_mode(method.modules.values(), True):
            phases = 0
            for stage, orders in plan if len(batch) else ():
                if isinstance(stage, Derive):
                    x = self.lay_out(batch.train.x)
                    examples = Minibatch(x, batch.train.y, part_mask(batch, stage.part))
                    with training_mode(method.modules.values(), False):
                        groups.put(map_clients(stage.compute, groups, examples))
                else:
                    assert orders is not None
                    factors = dict.fromkeys(lasting, self.client_schedule.factor(batch.round))
                    self._run_phase(groups, stage, orders, phases, batch, loss_scale, statistics, factors)
                    phases += 1
        return groups, statistics

    def _run_phase(
        self,
        groups: ClientGroups,
        phase: Phase,
        orders: range,
        number: int,
        batch: ClientBatch,
        loss_scale: Tensor | None,
        statistics: TrainingStatistics,
        factors: Mapping[str, float],
    ) -> None:
        """Run all minibatches of a phase, the number-th of its kind, for all clients of the chunk."""
        schedule = make_schedule(batch, phase.part, orders, self.batch_size)
        optimizers = {
            step: StackedOptimizer(
                step.optimizer or self.client_optimizer,
                groups.stack(step.moves),
                step.lr_scale if step.optimizer else step.lr_scale * factors.get(step.moves, 1.0),
            )
            for step in dict.fromkeys(phase.steps)
        }
        features: Inputs = batch.train.x
        targets = batch.train.y
        if phase.examples is not None:
            taken = groups.take(phase.examples)
            features, targets = taken["x"], taken["y"]
        x, y = map_inputs(lambda t: t.flatten(0, 1), features), targets.flatten(0, 1)
        scales = None if loss_scale is None else loss_scale.expand(len(batch)).clone()
        total = len(schedule.active) * len(phase.steps)
        keys = (
            step_keys(batch.key, number, total).unbind() if total and any(map(self.engine.draws, phase.steps)) else ()
        )
        active = 0
        for t, (now, minibatch) in enumerate(minibatches(schedule, x, y)):
            if now != active:
                active = now
                views = groups.prefix(active)
                bound = {step: self.engine.bind(step, views, groups.stacked) for step in optimizers}
                for optimizer in optimizers.values():
                    optimizer.narrow(active)
            if self.channels_last:
                minibatch = minibatch._replace(x=self.lay_out(minibatch.x))
            for s, step in enumerate(phase.steps):
                scale = None if scales is None else scales[:active]
                key = keys[t * len(phase.steps) + s][:active] if keys else None
                grads, losses = bound[step](minibatch, scale, key)
                keep = None if scale is None else _unscale(grads, scale)
                if self.max_grad_norm is not None:
                    grads = clipped(grads, self.max_grad_norm)
                optimizers[step].step(grads, keep)
                if step.bounds is not None:
                    for p in groups.stack(step.moves):
                        p.clamp_(*step.bounds)
                statistics.add_step(step.moves, losses, keep)
        statistics.add_rows(sum(schedule.active) * self.batch_size, schedule.examples)

    def lay_out(self, x: Inputs) -> Inputs:
        """Return instances [A, B, ...] unchanged; images [1, B, channels, height, width] in channels-last format."""
        return map_inputs(_channels_last, x) if self.channels_last else x


def _channels_last(x: Tensor) -> Tensor:
    return x if x.ndim != 5 or len(x) > 1 else x[0].to(memory_format=torch.channels_last)[None]


def _unscale(grads: list[Tensor], scale: Tensor) -> Tensor:
    """Remove the loss scale from a list of gradients [A, ...]; return [A] bool, which clients' are finite."""
    finite = torch.ones_like(scale, dtype=torch.bool)
    for i, g in enumerate(grads):
        grads[i] = g / scale.view(-1, *[1] * (g.ndim - 1))  # not in place: two parameters may share one gradient
        finite &= client_rows(g).isfinite().all(1)
    return finite
