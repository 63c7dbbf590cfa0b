"""A function of tensors traced once to a flat graph of operations, without what makes no difference to its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

_aten = torch.ops.aten
_RESHAPES = {_aten.expand.default, _aten.view.default, _aten._unsafe_view.default, _aten.permute.default}


def trace(fn: Callable[..., list[Tensor]], arguments: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """Trace a function for arguments of these shapes; the trace gives the function's numbers, bit for bit.

    Autograd, vmap and autocast inside the function become part of the trace.

    Args:
        fn: maps tensors to a list of new tensors, without control flow that depends on their values.
        arguments: tensors as it will be called with.

    Returns:
        The traced function.
    """
    # On fake tensors: nothing is computed, nothing is drawn from the generator. Tensors that are no arguments (buffers
    # of blocks) are referred to.
    traced: GraphModule = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    graph = traced.graph
    outputs = set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        if _changes_nothing(node) and not (node in outputs and node.args[0].op == "placeholder"):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    traced.recompile()
    forward: Callable[..., list[Tensor]] = traced.forward
    return forward


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
