"""Recurrent blocks that can be routed at every time step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (what torch's own documentation calls it)

from flow_pl.kernels.lstm import recur
from flow_pl.utils.validation import require_count

Decide = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps (input [N, D], global state, local state) of one time step to probabilities [N, 2]."""


class Recurrent(nn.Module, ABC):
    """A block with a state; when routed, both copies continue from the mixed state at the next step."""

    @abstractmethod
    def routed(self, x: Tensor, global_: dict[str, Tensor], local: dict[str, Tensor], decide: Decide) -> Tensor:
        """Run both copies side by side, mixing their states at every step.

        Args:
            x: inputs [N, T, D].
            global_: the global copy's parameters by name.
            local: the local copy's parameters by name.
            decide: called once at every step, in order, with the states of both copies.

        Returns:
            The mixed outputs [N, T, H].
        """


class LSTM(Recurrent):
    """One LSTM layer, batch first, with the parameters of `torch.nn.LSTM` (two biases).

    Inputs [N, T, D], outputs [N, T, H]; the state starts at zero. A single client uses torch's fused kernel, where the
    processor has one; it has no vmap rule, so several use `recur`.

    Args:
        input_size: number of features of a step (D).
        hidden_size: number of features of the state (H).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        require_count(input_size=input_size, hidden_size=hidden_size)
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(4 * hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(4 * hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights like torch's LSTM."""
        bound = 1 / math.sqrt(self.weight_hh.shape[1])
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Compute outputs [N, T, H] for inputs x [N, T, D]."""
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if not any(has_client_axis(t) for t in (x, *weights)) and has_kernel(x):
            # A single client: torch's fused kernel, which has no vmap rule.
            zeros = x.new_zeros(1, x.shape[0], self.weight_hh.shape[1])
            # only then does it keep what a gradient needs, also one in evaluation mode
            training = self.training or torch.is_grad_enabled()
            outputs: Tensor = torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, training, False, True)[0]
            return outputs
        # Time comes first, and under vmap the client axis after it, so that a step of all clients is contiguous.
        gates = F.linear(x.transpose(0, 1), self.weight_ih, self.bias_ih + self.bias_hh)
        h = recur(gates.unsqueeze(1), self.weight_hh.to(gates.dtype).unsqueeze(0))
        return h.squeeze(1).transpose(0, 1)

    def routed(self, x: Tensor, global_: dict[str, Tensor], local: dict[str, Tensor], decide: Decide) -> Tensor:
        """Run both copies side by side; the states passed to `decide` are [N, 2 H]: h, then c."""
        h = c = x.new_zeros(x.shape[0], self.weight_hh.shape[1])
        outputs = []
        steps = zip(x.unbind(1), self._inputs(x, global_), self._inputs(x, local), strict=True)
        for inputs, gates_global, gates_local in steps:
            h_global, c_global = _cell(gates_global + h @ global_["weight_hh"].t(), c)
            h_local, c_local = _cell(gates_local + h @ local["weight_hh"].t(), c)
            q = decide(inputs, torch.cat([h_global, c_global], -1), torch.cat([h_local, c_local], -1))
            # the router's probabilities are float32, whatever the type of the weights
            h = (q[:, :1] * h_global + q[:, 1:] * h_local).to(global_["weight_hh"].dtype)
            c = (q[:, :1] * c_global + q[:, 1:] * c_local).to(global_["weight_hh"].dtype)
            outputs.append(h)
        return torch.stack(outputs, dim=1)

    @staticmethod
    def _inputs(x: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Compute the inputs' contribution to the gates, one tensor [N, 4 H] for each step."""
        return F.linear(x, parameters["weight_ih"], parameters["bias_ih"] + parameters["bias_hh"]).unbind(1)


def has_kernel(x: Tensor) -> bool:
    """Return whether torch's fused LSTM runs on inputs x.

    Under autocast on a CPU it is oneDNN's, which torch also calls where the processor lacks the instructions for it, as
    x86-64 without AVX-512 does.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or not torch._C._has_mkldnn:
        return True
    bfloat = torch.get_autocast_dtype("cpu") == torch.bfloat16
    mkldnn = torch.ops.mkldnn
    return bool(mkldnn._is_mkldnn_bf16_supported() if bfloat else mkldnn._is_mkldnn_fp16_supported())


def has_client_axis(t: Tensor) -> bool:
    """Return whether a tensor is batched by vmap, also inside of torch.func.grad."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def _cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the next (h, c) [N, H] from gates [N, 4 H] in torch's order: input, forget, cell, output."""
    i, f, g, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c
