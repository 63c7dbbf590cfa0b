"""A function of tensors traced once to a flat graph of operations, without what makes no difference to its result."""

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
    """Trace a function for arguments of these shapes; the trace gives the function's numbers, bit for bit.

    Autograd, vmap and autocast inside the function become part of the trace.

    Args:
        fn: maps tensors to a list of new tensors, without control flow that depends on their values.
        arguments: tensors as it will be called with.

    Returns:
        The traced function.
    """
    # On fake tensors: nothing is computed. Tensors that are no arguments (buffers
    # of blocks) are referred to.
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
    """A trace that is compiled by `torch.compile` at its first call; its numbers differ from the trace's by rounding.

    What cannot be compiled is replayed as it is, with a warning.

    Args:
        traced: the trace.
        mode: of `torch.compile`.
    """
    errors = _compiler_errors()
    replay = _compile(traced, mode)

    def call(*arguments: Tensor) -> list[Tensor]:
        nonlocal replay
        # a CUDA graph writes its results where the last ones are, which nothing needs any more
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            *grads, losses = replay(*arguments)
        except errors as error:
            replay = traced.forward
            warnings.warn(f"a step cannot be compiled and runs as it is: {brief(error)}", stacklevel=2)
            *grads, losses = replay(*arguments)
        return [*grads, losses.clone()]  # losses are kept until the round ends

    return call


def check_compiler(device: torch.device, mode: CompileMode) -> None:
    """Compile something small, for which the first step of training would be late.

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
    # the function itself is new code; modules share theirs, of which torch compiles only so many kinds
    return torch.compile(traced.forward, fullgraph=True, dynamic=False, mode=mode)


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import ShortenTraceback  # takes a second, which every start would pay

    return (ShortenTraceback,)


def _changes_nothing(node: Node) -> bool:
    """Whether a node hands on its first argument: detached, in the shape it has, or times one."""
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
