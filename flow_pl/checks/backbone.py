"""Check that a backbone's outputs for an instance do not depend on other instances or clients."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from flow_pl.checks.block_calls import Calls, named, watched
from flow_pl.checks.side_by_side import check_clients
from flow_pl.engine.client_draws import ClientDraws
from flow_pl.errors import ConfigurationError, brief
from flow_pl.kernels.functional import buffers_kept, training_mode
from flow_pl.methods.base import Method
from flow_pl.utils.inputs import Inputs, first, leaves, map_inputs, take
from flow_pl.utils.unit_stream import UnitStream, UnitTable, drawing_from

INSTANCES = 3
MANY = 17
"""Number of instances in a larger call, since some blocks mix only larger batches (windows of 4, 8 or 16)."""


def check_backbone(method: Method, example: Inputs, side_by_side: bool) -> None:
    """Call the backbone on a few instances and check that outputs do not depend on others or on earlier calls.

    Args:
        method: the method, bound to a backbone whose lazy modules have their shapes.
        example: one instance [1, ...].
        side_by_side: whether several clients are trained or evaluated at once.

    Raises:
        ConfigurationError: a block changes its input in place, keeps state between calls, mixes instances, has no
            gradient, or has different outputs beside other clients; the message names the block and a remedy.
    """
    backbone, modules = method.modules["global"], list(method.modules.values())
    x = instances(example)
    with torch.random.fork_rng(devices=[]), buffers_kept(modules):
        for training in (False, True):
            with torch.no_grad(), training_mode(modules, training):
                calls, outputs = _check_calls(method, backbone, x, training)
                if method.route_names and not training:
                    _check_copies(method, x, outputs)
        check_clients(method, x, outputs, calls.in_place, side_by_side)


def instances(example: Inputs) -> Inputs:
    """Return a few distinct instances [3, ...] with values similar to those of an example [1, ...]."""
    return map_inputs(_moved if isinstance(example, dict) else _varied, example)


def _moved(example: Tensor) -> Tensor:
    """Permute the positions of an example with several features alike in all of them: a token keeps its mask."""
    if example.ndim < 2 or example.is_floating_point():
        return _varied(example)
    positions = torch.arange(example.shape[1], device=example.device)
    ends = (positions >= (len(positions) + 1) // 2) * (len(positions) - 1)  # the first and the last one
    return torch.cat([example, example.flip(1), example[:, ends]])


def _varied(example: Tensor) -> Tensor:
    if not example.is_floating_point():  # tokens: only the existing ones and 0
        first = example.reshape(1, -1)
        half = first.clone()
        half[:, : (half.shape[1] + 1) // 2] = 0
        return torch.cat([first, first.flip(1), half]).view(INSTANCES, *example.shape[1:])
    low, high = (float(v) for v in torch.aminmax(example.nan_to_num(0, 1, 0))) if example.numel() else (0.0, 1.0)
    share = torch.rand(INSTANCES, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    return (low + share * (high - low if high > low else 1.0)).to(example)


class _Still(UnitStream):
    """Constant draws, the same for all instances, so that outputs do not differ because of them."""

    def bits(self, shape: object) -> Tensor:
        """Return bits that all have one value, in the middle of the range."""
        return torch.zeros(shape, dtype=torch.int32, device=self._key.device)  # type: ignore[call-overload,no-any-return]


def _call(backbone: nn.Module, x: Inputs, training: bool) -> tuple[Calls, Tensor | Exception]:
    """Call the backbone on a copy of the instances."""
    x = map_inputs(torch.clone, x)
    with ExitStack() as stack:
        calls = stack.enter_context(watched(backbone, x, keep=True))
        if training:
            still = _Still(torch.zeros(2, dtype=torch.int32, device=first(x).device), UnitTable())
            stack.enter_context(drawing_from(still))
            stack.enter_context(ClientDraws(still))
        try:
            return calls, backbone(x)
        except Exception as error:  # a block may raise anything
            return calls, error


def _check_calls(method: Method, backbone: nn.Module, x: Inputs, training: bool) -> tuple[Calls, Tensor]:
    when = "in training" if training else "in evaluation"
    before = _state(backbone)
    calls, among = _call(backbone, x, training)
    if isinstance(among, Exception):
        raise ConfigurationError(
            f"{named(backbone, calls.inside[-1] if calls.inside else None)} cannot take {INSTANCES} instances at once "
            f"{when} ({brief(among)}): make it accept any number of them along the first axis."
        ) from among
    _check_in_place(method, backbone, calls)
    _check_written(backbone, before, when)
    _, again = _call(backbone, x, training)
    if isinstance(again, Exception) or _differ(again, among, x):
        raise ConfigurationError(
            f"the backbone {type(backbone).__name__} has different outputs when it is called again {when}: it keeps "
            "state between calls, which would leak from client to client. Make every call start without state."
        )
    several = torch.arange(MANY, device=first(x).device) % INSTANCES
    # many in training alone, which costs less: what mixes in evaluation does so there
    for rows in (several[:1], several[INSTANCES - 1 : INSTANCES], *((several,) if training else ())):
        other_calls, other = _call(backbone, take(x, rows), training)
        if isinstance(other, Exception):
            _refuse_mixing(backbone, other_calls.inside[-1] if other_calls.inside else None, when, len(rows))
        else:
            _check_rows(backbone, calls, other_calls, rows, among, other, x, when)
    return calls, among


def _check_in_place(method: Method, backbone: nn.Module, calls: Calls) -> None:
    if calls.on_data:
        raise ConfigurationError(
            f"{named(backbone, calls.on_data[0])} changes the data in place, which other models and steps read too: "
            "create a new tensor (x = x - 1, not x -= 1), or set inplace=False."
        )
    for name in method.model.blocks if method.route_names else ():
        block = backbone.get_submodule(name)
        if block in calls.in_place:
            inner = next(part for part in calls.in_place if part in set(block.modules()))
            raise ConfigurationError(
                f"{named(backbone, inner)} changes the input of block '{name}' in place, which "
                f"the block's other copy and the router of {type(method).__name__} read too: create a new tensor "
                "(x = x - 1, not x -= 1), or set inplace=False."
            )


def _check_copies(method: Method, x: Inputs, outputs: Tensor) -> None:
    """Check that a mixture of two equal copies equals the model itself."""
    weights = {name: p.detach() for name, p in method.modules["global"].named_parameters()}
    half = torch.full((INSTANCES, 2), 0.5, device=outputs.device)

    def route(block: int, inputs: Tensor, on_global: Tensor, on_local: Tensor) -> Tensor:
        return half

    mixed, _ = method.model.routed(map_inputs(torch.clone, x), weights, method.model.local_copy(weights), route)
    if _differ(mixed, outputs, x):
        raise ConfigurationError(
            f"the backbone {type(method.modules['global']).__name__} has different outputs if each of its blocks "
            f"({', '.join(method.model.blocks)}) is the mean of two equal copies than by itself: a block has a forward "
            "hook that changes its inputs or outputs, or its calls depend on each other. Remove the hook, or name "
            "other submodules in model.blocks."
        )


State = dict[tuple[nn.Module, str], tuple[Tensor, int, Tensor]]


def _state(backbone: nn.Module) -> State:
    """Return buffers and parameters of every block: the tensor, its version, and a copy."""
    return {
        (module, name): (t, t._version, t.clone())
        for module in backbone.modules()
        for name, t in (*module._buffers.items(), *module._parameters.items())
        if t is not None
    }


def _check_written(backbone: nn.Module, before: State, when: str) -> None:
    """Check that no call has written buffers or parameters.

    A parameter counts as written if its version has changed, since the operation may change other values than these.
    """
    for module in backbone.modules():
        for name, buffer in module._buffers.items():
            entry = before.get((module, name))
            if buffer is not None and (entry is None or not _same(buffer, entry[2])):
                raise ConfigurationError(
                    f"{named(backbone, module)} writes its buffer '{name}' when it is called {when}; a client's "
                    "values there would leak to the next one and cannot be averaged: use a layer without state "
                    "(nn.GroupNorm or nn.LayerNorm instead of running statistics)."
                )
        for name, p in module._parameters.items():
            entry = before.get((module, name))
            if p is not None and entry is not None and (p._version != entry[1] or not _same(p, entry[2])):
                raise ConfigurationError(
                    f"{named(backbone, module)} writes its parameter '{name}' when it is called {when}, which only the "
                    "client's optimizer may do: remove the cause (max_norm of an embedding, for instance)."
                )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, 0, 0, equal_nan=True))


def _check_rows(
    backbone: nn.Module, among: Calls, others: Calls, rows: Tensor, whole: Tensor, other: Tensor, x: Inputs, when: str
) -> None:
    """Compare the outputs of every block for some instances with those for the same instances among the first few."""
    count = len(rows)
    if len(whole) != INSTANCES or len(other) != count:
        _refuse_mixing(backbone, None, when, count)
    wrong = _differ(whole[rows], other, x)
    for (block, a), (again, b) in zip(among.outputs, others.outputs, strict=False):
        if block is not again:
            break
        axes = [axis for axis, (m, n) in enumerate(zip(a.shape, b.shape, strict=False)) if m != n]
        if a.ndim != b.ndim or len(axes) != 1 or a.shape[axes[0]] * count != INSTANCES * b.shape[axes[0]]:
            continue
        axis, size = axes[0], b.shape[axes[0]] // count
        index = rows.unsqueeze(1) * size + torch.arange(size, device=rows.device)
        expected = a.index_select(axis, index.flatten())
        # several rows of an instance may be in another order: then only the outputs count
        if (wrong or size == 1) and _differ(expected, b, x):
            _refuse_mixing(backbone, block, when, count)
    if wrong:
        _refuse_mixing(backbone, None, when, count)


def _refuse_mixing(backbone: nn.Module, block: nn.Module | None, when: str, count: int) -> None:
    found = "one alone has other outputs than among others"
    if count > 1:
        found = f"one among {count} has other outputs than among {INSTANCES}"
    remedy = "compute each instance's outputs from it alone (nn.GroupNorm or nn.LayerNorm in place of batch statistics)"
    if getattr(block, "batch_first", None) is False:
        remedy = "set batch_first=True"
    raise ConfigurationError(
        f"{named(backbone, block)} mixes instances: {when}, {found}, so "
        f"results would depend on the rest of a minibatch: {remedy}."
    )


def _differ(a: Tensor, b: Tensor, x: Inputs) -> bool:
    """Return whether outputs differ by more than rounding."""
    if a.shape != b.shape:
        return True
    if not a.is_floating_point():
        return not torch.equal(a, b)
    a, b = a.float().nan_to_num(), b.float().nan_to_num()
    size = float(b.abs().max()) if b.numel() else 0.0
    numbers = [float(t.abs().max()) for t in leaves(x) if t.is_floating_point() and t.numel()]
    noise = 1e-5 * max([1.0, *numbers])
    return not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * size + noise)
