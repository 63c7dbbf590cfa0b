"""Trace a function of tensors once, to a flat graph of operations without those that do not affect the result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from flow_pl.errors import ConfigurationError, brief

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
"""Modes of `torch.compile`; on a GPU the last two replay steps as CUDA graphs."""

_aten = torch.ops.aten
_RESHAPES = {_aten.expand.default, _aten.view.default, _aten._unsafe_view.default, _aten.permute.default}


def trace(fn: Callable[..., list[Tensor]], arguments: Sequence[Tensor]) -> GraphModule:
    """Trace a function for arguments of these shapes; its results are those of the function, bit for bit.

    Autograd, vmap and autocast inside the function become part of the trace.

    Args:
        fn: maps tensors to a list of new tensors, without control flow that depends on their values.
        arguments: tensors like those it will be called with.

    Returns:
        The traced function.
    """
    # On fake tensors, so nothing is computed. Tensors that are not arguments (buffers of blocks) are captured.
    traced: GraphModule = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    graph = traced.graph
    outputs = set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        if _changes_nothing(node) and not (node in outputs and node.args[0].op == "placeholder"):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    traced.recompile()
    return traced


def compiled(traced: GraphModule, mode: CompileMode) -> Callable[..., list[Tensor]]:
    """Compile a trace by `torch.compile` at its first call; its results differ from the trace's by rounding.

    A trace that cannot be compiled is replayed uncompiled, with a warning.

    Args:
        traced: the trace.
        mode: mode of `torch.compile`.
    """
    errors = _compiler_errors()
    replay = _compile(traced, mode)

    def call(*arguments: Tensor) -> list[Tensor]:
        nonlocal replay
        # a CUDA graph overwrites its last results, which are no longer needed
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            *grads, losses = replay(*arguments)
        except errors as error:
            replay = traced.forward
            warnings.warn(f"a step cannot be compiled and runs uncompiled: {brief(error)}", stacklevel=2)
            *grads, losses = replay(*arguments)
        return [*grads, losses.clone()]  # losses are kept until the round ends

    return call


def check_compiler(device: torch.device, mode: CompileMode) -> None:
    """Compile a small function, to find errors before the first step of training.

    Raises:
        ConfigurationError: nothing can be compiled on this machine.
    """
    x = torch.ones(2, 2, device=device)
    try:
        _compile(trace(lambda x: [x + 1, x.sum(1)], [x]), mode)(x)
    except _compiler_errors() as error:
        raise ConfigurationError(
            f"model.loop.compile_mode is {mode}, but nothing can be compiled on this machine ({brief(error)}): install "
            "a C++ compiler, and Triton for a GPU, or set it to null."
        ) from error


def _compile(traced: GraphModule, mode: CompileMode) -> Callable[..., list[Tensor]]:
    # the function is new code; modules share theirs, which torch compiles only for a limited number of variants
    return torch.compile(traced.forward, fullgraph=True, dynamic=False, mode=mode)


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import ShortenTraceback  # the import takes a second, which would delay every start

    return (ShortenTraceback,)


def _changes_nothing(node: Node) -> bool:
    """Return whether a node only passes on its first argument: detached, in the same shape, or times one."""
    if node.op != "call_function":
        return False
    if node.target is _aten.detach.default:
        return True
    if node.target is _aten.mul.Scalar and node.args[1] == 1:
        source, result = node.args[0], node
        return isinstance(source, Node) and source.meta["val"].dtype == result.meta["val"].dtype
    if node.target in _RESHAPES and isinstance(node.args[0], Node):
        before, after = node.args[0].meta["val"], node.meta["val"]
        return bool(before.shape == after.shape and before.stride() == after.stride())
    return False
