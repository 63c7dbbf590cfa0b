"""Trace functions that are called often, and keep the traces that were used last."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flow_pl.engine.tracing import CompileMode, compiled, trace
from flow_pl.errors import brief

MAX_TRACES = 256
"""Number of traces to keep; the least recently used one is dropped first."""


class TraceCache:
    """Keeps traces by the kind of a call. Its length is the number of kinds that are traced and replayed.

    Args:
        trace_after: number of calls of the same kind after which it is traced; None for never.
        compile_mode: mode of `torch.compile` for traces; None to replay them uncompiled.
    """

    def __init__(self, trace_after: int | None, compile_mode: CompileMode | None) -> None:
        self._trace_after = trace_after
        self._compile_mode = compile_mode
        self._calls: Counter[Any] = Counter()
        self._traces: OrderedDict[Any, Callable[..., list[Tensor]] | None] = OrderedDict()

    def __len__(self) -> int:
        return sum(trace is not None for trace in self._traces.values())

    def get(
        self, kind: Any, function: Callable[..., list[Tensor]], arguments: Sequence[Tensor]
    ) -> Callable[..., list[Tensor]] | None:
        """Count a call, and return the trace of its kind.

        Args:
            kind: all that a trace depends on; hashable.
            function: what is traced, a function of tensors.
            arguments: tensors of this call.

        Returns:
            The trace; None before the kind was called often enough, or if it cannot be traced.
        """
        if kind in self._traces:
            self._traces.move_to_end(kind)
            return self._traces[kind]
        if len(self._calls) > 16 * MAX_TRACES:
            self._calls.clear()
        self._calls[kind] += 1
        if self._trace_after is None or self._calls[kind] <= self._trace_after:
            return None
        del self._calls[kind]  # a dropped trace needs as many calls again
        try:
            traced = trace(function, arguments)
        except Exception as error:
            self._traces[kind] = None
            warnings.warn(
                f"a step cannot be traced; it runs untraced, with the same results: {brief(error)}", stacklevel=2
            )
        else:
            self._traces[kind] = traced.forward if self._compile_mode is None else compiled(traced, self._compile_mode)
        if len(self._traces) > MAX_TRACES:
            self._traces.popitem(last=False)
        return self._traces[kind]
