"""One-client functions made to run on the active clients of a chunk: the single engine of training and evaluation.

A chunk (or what is left of it) of one client runs the same functions without the vmap wrapper. A gradient that is
asked for often is traced once to plain tensor operations and replayed, which spares vmap's and autograd's cost per
step; both give the same numbers, bit for bit. Steps are always made with the modules in training mode.
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
from flow_pl.methods.base import Minibatch, Step
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import from_leaves, leaves, names_of, take
from flow_pl.utils.unit_stream import UnitStream, UnitTable, drawing_from
from flow_pl.utils.validation import given, require_choice, require_count

MAX_TRACES = 256
"""Traced gradients kept; the least recently used goes first."""


def map_clients(fn: Callable[[Groups, Any], Any], groups: ClientGroups, data: Any, active: int | None = None) -> Any:
    """Call a one-client function for the first clients of a chunk, side by side.

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
    """What a step draws, as its first call has shown: as with a trace, what its objective does must not change."""

    NOTHING = 0
    BY_MODULES = 1
    """By modules of the project alone."""
    BY_FUNCTIONS = 2
    """By torch's functions too, which must be replaced."""


class GradientEngine:
    """Gradients of a step's objective with respect to the group that moves, for many clients at once.

    Args:
        trace_after: calls of the same kind (step, shapes, number of clients) after which it is traced and replayed;
            None for never.
        compile_mode: compile what is traced, by `torch.compile` in this mode; None to replay it as it is.
    """

    def __init__(self, trace_after: int | None = 200, compile_mode: CompileMode | None = None) -> None:
        require_count(0, **given(trace_after=trace_after))
        require_choice(get_args(CompileMode), **given(compile_mode=compile_mode))
        if compile_mode is not None and trace_after is None:
            raise ConfigurationError(
                f"compile_mode is {compile_mode} and trace_after null: what is compiled are traced steps, set "
                "trace_after to the number of steps after which they are."
            )
        self.trace_after = trace_after
        self.compile_mode = compile_mode
        self._units = UnitTable()
        self._draws: WeakKeyDictionary[Step, _Draws] = WeakKeyDictionary()
        self._calls: Counter[Any] = Counter()
        self._traces: OrderedDict[Any, Callable[..., list[Tensor]] | None] = OrderedDict()

    def draws(self, step: Step) -> bool:
        """Whether a step draws random numbers, as far as is known: before its first call, it may."""
        # where the first call is traced, the trace stays as it is
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
        """Gradients and losses of the active clients: `bind`, for a single minibatch."""
        return self.bind(step, views, stacked)(minibatch, scale, keys)

    def bind(self, step: Step, views: Groups, stacked: set[str]) -> BoundStep:
        """A step of the active clients, for as many minibatches as they make with the same tensors.

        Args:
            step: the step.
            views: groups of the active clients, from `ClientGroups.prefix`.
            stacked: names of the groups with a client axis.
        """
        return BoundStep(self, step, views, stacked)

    def _replay(
        self, key: Any, gradients: Callable[..., list[Tensor]], arguments: Sequence[Tensor]
    ) -> Callable[..., list[Tensor]] | None:
        """The trace of a kind of step; None while it is not asked for often enough, or where it cannot be traced."""
        if key in self._traces:
            self._traces.move_to_end(key)
            return self._traces[key]
        if len(self._calls) > 16 * MAX_TRACES:
            self._calls.clear()
        self._calls[key] += 1
        if self.trace_after is None or self._calls[key] <= self.trace_after:
            return None
        del self._calls[key]  # once dropped, a trace has to be earned anew
        try:
            traced = trace(gradients, arguments)
        except Exception as error:
            self._traces[key] = None
            warnings.warn(
                f"a step cannot be traced and runs untraced, with the same results: {brief(error)}", stacklevel=2
            )
        else:
            self._traces[key] = traced.forward if self.compile_mode is None else compiled(traced, self.compile_mode)
        if len(self._traces) > MAX_TRACES:
            self._traces.popitem(last=False)
        return self._traces[key]


class BoundStep:
    """A step with the groups of the clients that make it; made by `GradientEngine.bind`."""

    def __init__(self, engine: GradientEngine, step: Step, views: Groups, stacked: set[str]) -> None:
        self._engine, self._step, self._stacked = engine, step, stacked
        self._names = [(group, key) for group, parameters in views.items() for key in parameters]
        self._tensors = [views[group][key] for group, key in self._names]
        self._kind: Any = None
        self._known: Callable[..., list[Tensor]] | None = None  # trace for minibatches of this kind

    def __call__(
        self, minibatch: Minibatch, scale: Tensor | None, keys: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients and losses of the clients.

        Args:
            minibatch: of the active clients [A, B, ...].
            scale: [A] factor on each client's loss (16-mixed), or None.
            keys: [A, 2] int32, of what the clients draw in this step (`counter_rng.step_keys`); None where nothing is
                drawn.

        Returns:
            Gradients of the moving group's tensors [A, ...] and losses [A], unscaled.
        """
        engine = self._engine
        if keys is not None and not engine.draws(self._step):
            keys = None
        data = [*leaves(minibatch.x), minibatch.y, minibatch.mask, *(t for t in (scale, keys) if t is not None)]
        arguments = [*self._tensors, *data]
        # A client alone gains nothing by a trace, but something by the compiler. Anomaly detection asks for the values
        # of gradients, which a trace has none of, and for the very call that a gradient comes from.
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
            # The casts of autocast are part of the trace.
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
        """The function of tensors, in a flat list, that makes gradients and losses of a minibatch of this kind."""
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
    """What a trace depends on in one of its arguments."""
    return t.shape, t.stride(), t.dtype


@contextmanager
def _drawing(key: Tensor, units: UnitTable, draws: _Draws) -> Iterator[None]:
    """A context in which a client alone draws by its key; torch's functions are replaced where any is called."""
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
    """Gradients of the moving group and the losses, for tensors given in a flat list."""
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
    # One graph over all clients: their losses do not meet, so the gradient of the sum is every client's own.
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
    # Autocast keeps its casts of this step's leaves until its context ends: a round's worth of copies of the model.
    torch.clear_autocast_cache()
    if active == 1:
        # convolutions lay gradients out as their images, which may have their channels last; parameters do not
        grads = [g.contiguous().unsqueeze(0) for g in grads]
    return [*grads, losses.detach()]
