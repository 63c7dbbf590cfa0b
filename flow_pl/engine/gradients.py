"""Run functions of one client on the active clients of a chunk: the single engine of training and evaluation.

For a single active client, the same functions run without vmap. A gradient that is computed often is traced once to
plain tensor operations and replayed, which saves the cost of vmap and autograd in each step; both give the same
numbers, bit for bit. Steps always run with the modules in training mode.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import vmap

from flow_pl.engine.client_draws import ClientDraws
from flow_pl.engine.client_groups import ClientGroups
from flow_pl.engine.tracing import CompileMode, compiled, trace
from flow_pl.errors import ConfigurationError, brief
from flow_pl.kernels.linear import REPLACED, ClientLinears
from flow_pl.methods.steps import Minibatch, Step
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import from_leaves, leaves, names_of, take
from flow_pl.utils.unit_stream import UnitStream, UnitTable, drawing_from
from flow_pl.utils.validation import given, require_choice, require_count

MAX_TRACES = 256
"""Number of traced gradients to keep; the least recently used one is dropped first."""


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


class _Draws(IntEnum):
    """How a step draws, recorded at its first call; like a trace, it assumes that the objective never changes."""

    NOTHING = 0
    BY_MODULES = 1
    """Only by modules of this package."""
    BY_FUNCTIONS = 2
    """Also by torch's functions, which must be replaced."""


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
        self._draws: WeakKeyDictionary[Step, _Draws] = WeakKeyDictionary()
        self._calls: Counter[Any] = Counter()
        self._traces: OrderedDict[Any, Callable[..., list[Tensor]] | None] = OrderedDict()

    @property
    def traced(self) -> int:
        """Return the number of kinds of steps that are traced and replayed."""
        return sum(trace is not None for trace in self._traces.values())

    def draws(self, step: Step) -> bool:
        """Return whether a step may draw random numbers: its first call shows it, so before that, it may."""
        # a trace made at the first call is kept
        return self.trace_after == 0 or self._draws.get(step) != _Draws.NOTHING

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

    def _replay(
        self, key: Any, gradients: Callable[..., list[Tensor]], arguments: Sequence[Tensor]
    ) -> Callable[..., list[Tensor]] | None:
        """Return the trace of a kind of step; None before it was called often enough, or if it cannot be traced."""
        if key in self._traces:
            self._traces.move_to_end(key)
            return self._traces[key]
        if len(self._calls) > 16 * MAX_TRACES:
            self._calls.clear()
        self._calls[key] += 1
        if self.trace_after is None or self._calls[key] <= self.trace_after:
            return None
        del self._calls[key]  # a dropped trace needs as many calls again
        try:
            traced = trace(gradients, arguments)
        except Exception as error:
            self._traces[key] = None
            warnings.warn(
                f"a step cannot be traced; it runs untraced, with the same results: {brief(error)}", stacklevel=2
            )
        else:
            self._traces[key] = traced.forward if self.compile_mode is None else compiled(traced, self.compile_mode)
        if len(self._traces) > MAX_TRACES:
            self._traces.popitem(last=False)
        return self._traces[key]


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
        return self._engine._replay(key, self._gradients(minibatch, scale, keys), arguments)

    def _gradients(
        self, minibatch: Minibatch, scale: Tensor | None, keys: Tensor | None
    ) -> Callable[..., list[Tensor]]:
        """Return a function of a flat list of tensors that computes the gradients and losses of such minibatches."""
        engine, step, units = self._engine, self._step, self._engine._units
        draws = engine._draws.get(step, _Draws.BY_FUNCTIONS)
        if keys is not None:
            units.grow(keys.device)
        active, options = len(minibatch.mask), (scale is not None, keys is not None)
        features = names_of(minibatch.x)

        def gradients(*arguments: Tensor) -> list[Tensor]:
            units.drawn = units.by_functions = False
            result = _gradients(step, self._names, self._stacked, active, arguments, options, features, draws, units)
            if options[1]:
                engine._draws[step] = _Draws(units.drawn + units.by_functions)
            return result

        return gradients


def _layout(t: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    """Return the properties of an argument that a trace depends on."""
    return t.shape, t.stride(), t.dtype


@contextmanager
def _drawing(key: Tensor, units: UnitTable, draws: _Draws) -> Iterator[None]:
    """Let a single client draw by its key within the context; replace torch's functions if it calls any."""
    stream = UnitStream(key, units)
    with drawing_from(stream), ClientDraws(stream) if draws == _Draws.BY_FUNCTIONS else nullcontext():
        yield


def _gradients(
    step: Step,
    names: Sequence[tuple[str, str]],
    stacked: set[str],
    active: int,
    arguments: Sequence[Tensor],
    options: tuple[bool, bool],
    features: tuple[str, ...] | None,
    draws: _Draws,
    units: UnitTable,
) -> list[Tensor]:
    """Compute gradients of the updated group, and losses, from a flat list of tensors."""
    parameters, data = arguments[: len(names)], arguments[len(names) :]
    parts, (scaled, drawn) = 1 if features is None else len(features), options
    x, (y, mask, *others) = from_leaves(features, data[:parts]), data[parts:]
    minibatch = Minibatch(x, y, mask)
    scale, keys = others[0] if scaled else None, others[-1] if drawn else None
    groups: Groups = {}
    leaves = []
    for (group, key), p in zip(names, parameters, strict=True):
        if group == step.moves:
            p = p.detach().requires_grad_()
            leaves.append(p)
        groups.setdefault(group, {})[key] = p
    # One graph over all clients: their losses are independent, so the sum's gradient is that of each client.
    with torch.enable_grad():
        if active == 1:
            one = Minibatch(take(x, 0), y[0], mask[0])
            with nullcontext() if keys is None else _drawing(keys[0], units, draws):
                losses = step.objective(groups, one).unsqueeze(0)
        elif keys is None:
            dims = {name: 0 if name in stacked else None for name in groups}
            with ClientLinears():
                losses = vmap(step.objective, in_dims=(dims, 0))(groups, minibatch)
        else:
            dims = {name: 0 if name in stacked else None for name in groups}

            def objective(key: Tensor, groups: Groups, minibatch: Minibatch) -> Tensor:
                stream = UnitStream(key, units)
                with drawing_from(stream), ClientDraws(stream, REPLACED):
                    return step.objective(groups, minibatch)

            losses = vmap(objective, in_dims=(0, dims, 0))(keys, groups, minibatch)
        total = (losses if scale is None else losses * scale).sum()
        grads = list(torch.autograd.grad(total, leaves, materialize_grads=True))
    # Autocast would keep its casts of this step's leaves until its context ends: a round's worth of model copies.
    torch.clear_autocast_cache()
    if active == 1:
        # gradients of convolutions may be in channels-last format, like the images; parameters are not
        grads = [g.contiguous().unsqueeze(0) for g in grads]
    return [*grads, losses.detach()]
