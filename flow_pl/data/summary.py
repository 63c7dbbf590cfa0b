"""Summarize the data in one line, for the start of a run."""

from __future__ import annotations

from flow_pl.data.federation import Federation
from flow_pl.errors import brief
from flow_pl.utils.inputs import Inputs


def summarize(federation: Federation, x: Inputs) -> str:
    """Return a line on the clients, the examples and their labels.

    Args:
        federation: the clients and their splits.
        x: some examples as passed to a model, [n, ...].
    """
    meta = federation.store.meta
    shapes = {name: list(t.shape[1:]) for name, t in x.items()} if isinstance(x, dict) else list(x.shape[1:])
    names = f" ({brief(list(meta.class_names))})" if meta.class_names else ""
    what = "real-valued labels" if federation.store.real_valued else f"{meta.num_classes} classes{names}"
    return (
        f"data: {len(federation.seen)} seen and {len(federation.new)} new clients, {meta.rows} examples of shape "
        f"{shapes}, {what}"
    )
