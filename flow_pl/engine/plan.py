"""Choose which of the drawn orders of a client's examples each phase of a method visits."""

from __future__ import annotations

from typing import TypeAlias

from flow_pl.methods.base import Method
from flow_pl.methods.steps import Derive, Phase

Plan: TypeAlias = list[tuple[Phase | Derive, range | None]]
"""The stages of a round or a personalization; with each phase the orders that it visits, one per epoch."""


def plan_phases(method: Method, training: bool, local_epochs: int, personal_epochs: int) -> Plan:
    """Choose which of the drawn orders each phase visits, one per epoch.

    Phases that update what is sent, and the last one of a round, visit the first orders, as FedAvg's only phase
    does: methods that send the same model see the same minibatches. Other phases visit later orders, or two models
    that start from w_g would take the very same steps. Personalization has its own orders.

    Args:
        method: the algorithm.
        training: whether a round is planned, rather than a personalization.
        local_epochs: epochs of a phase in a round.
        personal_epochs: epochs of a phase in a personalization, and of phases of a round that ask for as many.
    """
    stages = method.phases if training else method.personal_phases
    budget = local_epochs if training else personal_epochs
    last = max((i for i, stage in enumerate(stages) if isinstance(stage, Phase)), default=0)
    plan: Plan = []
    for i, stage in enumerate(stages):
        if isinstance(stage, Phase):
            sent = any(step.moves in method.shared.values() for step in stage.steps)
            first = local_epochs if training and i < last and not sent else 0
            epochs = personal_epochs if stage.epochs == "personal" else stage.epochs or budget
            plan.append((stage, range(first, first + epochs)))
        else:
            plan.append((stage, None))
    return plan
