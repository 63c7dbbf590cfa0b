"""Run functions of one client on the active clients of a chunk: the single engine of training and evaluation.

For a single active client, the same functions run without vmap. A gradient that is computed often is traced once to
plain tensor operations and replayed, which saves the cost of vmap and autograd in each step; both give the same
numbers, bit for bit. Steps always run with the modules in training mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import vmap

from flow_pl.engine.client_groups import ClientGroups
from flow_pl.engine.step_gradients import Draws, step_gradients
from flow_pl.engine.trace_cache import TraceCache
from flow_pl.engine.tracing import CompileMode
from flow_pl.errors import ConfigurationError
from flow_pl.kernels.linear import ClientLinears
from flow_pl.methods.steps import Minibatch, Step
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import leaves, names_of
from flow_pl.utils.unit_stream import UnitTable
from flow_pl.utils.validation import given, require_choice, require_count


def map_clients(fn: Callable[[Groups, Any], Any], groups: ClientGroups, data: Any, active: int | None = None) -> Any:
    """Call a function of one client for the first clients of a chunk, side by side.

    Args:
        fn: maps (groups, data) of one client to a tree of tensors.
        groups: the clients' groups.
        data: tree of tensors [active, ...].
        active: number of clients; all by default.

    Returns:
        What `fn` returns, stacked: [active, ...].
    """
    active = groups.clients if active is None else active
    views = groups.prefix(active)
    if active == 1:
        one = torch.utils._pytree.tree_map(lambda t: t[0], data)
        return torch.utils._pytree.tree_map(lambda t: t.unsqueeze(0), fn(views, one))
    dims = {name: 0 if name in groups.stacked else None for name in views}
    with ClientLinears():
        return vmap(fn, in_dims=(dims, 0))(views, data)


class GradientEngine:
    """Computes gradients of a step's objective with respect to the updated group, for many clients at once.

    Args:
        trace_after: number of calls of the same kind (step, shapes, number of clients) after which it is traced and
            replayed; None for never.
        compile_mode: mode of `torch.compile` for traced steps; None to replay them uncompiled.
    """

    def __init__(self, trace_after: int | None = 200, compile_mode: CompileMode | None = None) -> None:
        require_count(0, **given(trace_after=trace_after))
        require_choice(get_args(CompileMode), **given(compile_mode=compile_mode))
        if compile_mode is not None and trace_after is None:
            raise ConfigurationError(
                f"compile_mode is {compile_mode} and trace_after null, but only traced steps are compiled: set "
                "trace_after to the number of steps after which they are."
            )
        self.trace_after = trace_after
        self.compile_mode = compile_mode
        self._units = UnitTable()
        self._draws: WeakKeyDictionary[Step, Draws] = WeakKeyDictionary()
        self._traces = TraceCache(trace_after, compile_mode)

    @property
    def traced(self) -> int:
        """Return the number of kinds of steps that are traced and replayed."""
        return len(self._traces)

    def draws(self, step: Step) -> bool:
        """Return whether a step may draw random numbers: its first call shows it, so before that, it may."""
        # a trace made at the first call is kept
        return self.trace_after == 0 or self._draws.get(step) != Draws.NOTHING

    def __call__(
        self,
        step: Step,
        views: Groups,
        stacked: set[str],
        minibatch: Minibatch,
        scale: Tensor | None,
        keys: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Compute gradients and losses of the active clients: `bind`, for a single minibatch."""
        return self.bind(step, views, stacked)(minibatch, scale, keys)

    def bind(self, step: Step, views: Groups, stacked: set[str]) -> BoundStep:
        """Bind a step to the active clients' groups, for all minibatches that use the same tensors.

        Args:
            step: the step.
            views: the active clients' groups, from `ClientGroups.prefix`.
            stacked: names of the groups with a client axis.
        """
        return BoundStep(self, step, views, stacked)


class BoundStep:
    """A step bound to the groups of its clients; created by `GradientEngine.bind`."""

    def __init__(self, engine: GradientEngine, step: Step, views: Groups, stacked: set[str]) -> None:
        self._engine, self._step, self._stacked = engine, step, stacked
        self._names = [(group, key) for group, parameters in views.items() for key in parameters]
        self._tensors = [views[group][key] for group, key in self._names]
        self._kind: Any = None
        self._known: Callable[..., list[Tensor]] | None = None  # the trace for minibatches of this kind

    def __call__(
        self, minibatch: Minibatch, scale: Tensor | None, keys: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the clients' gradients and losses.

        Args:
            minibatch: examples of the active clients [A, B, ...].
            scale: [A] factor on each client's loss (16-mixed), or None.
            keys: [A, 2] int32 keys of the clients' draws in this step (`counter_rng.step_keys`); None if nothing is
                drawn.

        Returns:
            Gradients of the updated group's tensors [A, ...] and losses [A], unscaled.
        """
        engine = self._engine
        if keys is not None and not engine.draws(self._step):
            keys = None
        data = [*leaves(minibatch.x), minibatch.y, minibatch.mask, *(t for t in (scale, keys) if t is not None)]
        arguments = [*self._tensors, *data]
        # A single client gains nothing from a trace, but it does from the compiler. Anomaly detection needs the values
        # of gradients, which a trace lacks, and the call that a gradient comes from.
        alone = len(minibatch.mask) == 1 and engine.compile_mode is None
        if engine.trace_after is None or alone or torch.is_anomaly_enabled():
            *grads, losses = self._gradients(minibatch, scale, keys)(*arguments)
            return grads, losses
        kind = ((scale is not None, keys is not None), names_of(minibatch.x), [_layout(t) for t in data])
        if self._known is None or kind != self._kind:
            self._kind, self._known = kind, self._replay(kind, minibatch, scale, keys, arguments)
        if self._known is None:
            *grads, losses = self._gradients(minibatch, scale, keys)(*arguments)
        elif torch.is_grad_enabled() or torch.is_autocast_enabled(arguments[0].device.type):
            # Autocast's casts are part of the trace.
            with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
                *grads, losses = self._known(*arguments)
        else:
            *grads, losses = self._known(*arguments)
        return grads, losses

    def _replay(
        self, kind: Any, minibatch: Minibatch, scale: Tensor | None, keys: Tensor | None, arguments: Sequence[Tensor]
    ) -> Callable[..., list[Tensor]] | None:
        options, features, layouts = kind
        device = arguments[0].device
        key = (
            self._step,
            tuple(sorted(self._stacked)),
            (*map(_layout, self._tensors), *layouts),
            device,
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
            options,
            features,
        )
        return self._engine._traces.get(key, self._gradients(minibatch, scale, keys), arguments)

    def _gradients(
        self, minibatch: Minibatch, scale: Tensor | None, keys: Tensor | None
    ) -> Callable[..., list[Tensor]]:
        """Return a function of a flat list of tensors that computes the gradients and losses of such minibatches."""
        engine, step, units = self._engine, self._step, self._engine._units
        draws = engine._draws.get(step, Draws.BY_FUNCTIONS)
        if keys is not None:
            units.grow(keys.device)
        active, options = len(minibatch.mask), (scale is not None, keys is not None)
        features = names_of(minibatch.x)

        def gradients(*arguments: Tensor) -> list[Tensor]:
            units.drawn = units.by_functions = False
            result = step_gradients(
                step, self._names, self._stacked, active, arguments, options, features, draws, units
            )
            if options[1]:
                engine._draws[step] = Draws(units.drawn + units.by_functions)
            return result

        return gradients


def _layout(t: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    """Return the properties of an argument that a trace depends on."""
    return t.shape, t.stride(), t.dtype
