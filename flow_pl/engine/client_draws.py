# ruff: noqa: A002 (the names are those of the functions that are replaced)
"""Draw dropout, and all other random numbers of a client's step, as a function of (seed, round, client, step, unit).

Torch's own functions keep a state that every draw advances, so their numbers depend on which other clients are trained
in the same process, and in which order. Within a step the engine replaces them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flow_pl.kernels.attention import attention, open_attention
from flow_pl.models.dropout import drop
from flow_pl.utils.counter_rng import below
from flow_pl.utils.unit_stream import UnitStream

_SELU_FLOOR = -1.7580993408473766
"""Limit of SELU for large negative inputs: minus its scale times its alpha."""


class ClientDraws(TorchFunctionMode):
    """A context in which one client's step, possibly one of many under vmap, draws by the client's key.

    It replaces, wherever a block calls them: dropout of all kinds (`torch.nn.Dropout`, `Dropout1d` to `Dropout3d`,
    `AlphaDropout`, `FeatureAlphaDropout` and their functions), attention with dropout (`torch.nn.MultiheadAttention`,
    `scaled_dot_product_attention`), `gumbel_softmax`, `torch.rand`, `randn`, their `_like` forms, `bernoulli`, and the
    methods `bernoulli_`, `uniform_` and `normal_`. Blocks that draw by other means (`torch.nn.LSTM` with dropout,
    `multinomial`, a generator of their own) are refused before training; see `flow_pl.engine.draw_check`.

    Args:
        stream: random numbers of the client and the step.
        replaced: more functions to replace, each with the function to call instead.
    """

    def __init__(
        self, stream: UnitStream, replaced: Mapping[Callable[..., Any], Callable[..., Any]] | None = None
    ) -> None:
        super().__init__()
        self._stream = stream
        self._replaced = replaced or {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the replacement of a function; pass everything else through."""
        kwargs = kwargs or {}
        own = None if _attends_without_draws(func, args, kwargs) else _OWN.get(func)
        if own is not None and kwargs.get("generator") is None:
            self._stream.table.by_functions = True
            return own(self._stream, *args, **kwargs)
        if func is functional.multi_head_attention_forward:
            with self:  # entered again: it is left while it handles a function
                return open_attention(*args, **kwargs)
        return self._replaced.get(func, func)(*args, **kwargs)


def _dropout(stream: UnitStream, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return _drop(stream, input, input.shape, p, training, inplace)


def _feature_dropout(channels: int) -> Callable[..., Tensor]:
    """Return dropout of whole channels, for batches with this many axes after the channels."""

    def drop(
        stream: UnitStream,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        # an unbatched input has its channels first; dropout2d takes three axes for a batch
        kept = 1 if channels in (1, 3) and input.ndim == channels + 1 else 2
        return _drop(stream, input, _channels(input, kept), p, training, inplace)

    return drop


def _channels(input: Tensor, kept: int = 2) -> tuple[int, ...]:
    return tuple(input.shape[:kept]) + (1,) * (input.ndim - kept)


def _drop(
    stream: UnitStream,
    input: Tensor,
    shape: Sequence[int],
    p: float,
    training: bool,
    inplace: bool,
) -> Tensor:
    _check_share(p)
    return drop(stream, input, shape, p, inplace) if training and p else input


def _alpha_dropout(
    stream: UnitStream,
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    return _alpha_drop(stream, input, input.shape, p, training, inplace)


def _feature_alpha_dropout(
    stream: UnitStream,
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    return _alpha_drop(stream, input, _channels(input), p, training, inplace)


def _alpha_drop(
    stream: UnitStream,
    input: Tensor,
    shape: Sequence[int],
    p: float,
    training: bool,
    inplace: bool,
) -> Tensor:
    """Set elements to SELU's floor, and keep mean and variance.

    From Klambauer et al., Self-Normalizing Neural Networks (NeurIPS 2017).
    """
    _check_share(p)
    if not training or p == 0:
        return input
    if p == 1:
        return input.mul_(0) if inplace else input * 0
    scale = ((1 - p) * (1 + p * _SELU_FLOOR**2)) ** -0.5
    keep = below(stream.bits(shape), 1 - p)
    out = torch.where(keep, input, _SELU_FLOOR) * scale - scale * _SELU_FLOOR * p
    return input.copy_(out) if inplace else out


def _check_share(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def _attention(stream: UnitStream, *args: Any, **kwargs: Any) -> Tensor:
    """Return attention like torch's, with dropout of its weights."""
    return partial(attention, drop=partial(_dropout, stream))(*args, **kwargs)


def _attends_without_draws(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call is torch's attention without dropout."""
    return func is functional.scaled_dot_product_attention and not (
        args[4] if len(args) > 4 else kwargs.get("dropout_p")
    )


def _gumbel_softmax(
    stream: UnitStream, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    gumbels = -(-stream.uniform(logits.shape).log()).log().to(logits.dtype)
    soft = ((logits + gumbels) / tau).softmax(dim)
    if not hard:
        return soft
    taken = torch.zeros_like(logits).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return taken - soft.detach() + soft


def _factory(kind: Callable[[UnitStream, Sequence[int]], Tensor]) -> Callable[..., Tensor]:
    """Return a replacement of `torch.rand` or `torch.randn`."""

    def draw(stream: UnitStream, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        shape = options.pop("size", size)
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else tuple(shape)
        drawn = kind(stream, shape).to(dtype or torch.get_default_dtype())
        return drawn.requires_grad_() if options.get("requires_grad") else drawn

    return draw


def _like(kind: Callable[[UnitStream, Sequence[int]], Tensor]) -> Callable[..., Tensor]:
    """Return a replacement of `torch.rand_like` or `torch.randn_like`."""

    def draw(stream: UnitStream, input: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        drawn = kind(stream, input.shape).to(dtype or input.dtype)
        return drawn.requires_grad_() if options.get("requires_grad") else drawn

    return draw


def _bernoulli(stream: UnitStream, input: Tensor, p: float | None = None, **options: Any) -> Tensor:
    drawn = stream.uniform(input.shape)
    return (drawn < (input if p is None else p)).to(input.dtype)


def _bernoulli_(stream: UnitStream, input: Tensor, p: float | Tensor = 0.5, **options: Any) -> Tensor:
    return input.copy_(stream.uniform(input.shape) < p)


def _uniform_(
    stream: UnitStream,
    input: Tensor,
    low: float = 0.0,
    high: float = 1.0,
    **options: Any,
) -> Tensor:
    low, high = options.get("from", low), options.get("to", high)
    return input.copy_(stream.uniform(input.shape) * (high - low) + low)


def _empty(stream: UnitStream, *size: Any, **options: Any) -> Tensor:
    """Allocate a tensor for each client, which only the client's own stream may fill."""
    shape = options.pop("size", size)
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else tuple(shape)
    dtype = options.pop("dtype", None) or torch.get_default_dtype()
    return stream.room(shape, dtype=dtype, device=options.pop("device", None))


def _by_train(drop: Callable[..., Tensor], inplace: bool = False) -> Callable[..., Tensor]:
    """Return dropout as in `torch`, which calls `train` what `torch.nn.functional` calls `training`."""

    def call(stream: UnitStream, input: Tensor, p: float, train: bool) -> Tensor:
        return drop(stream, input, p, train, inplace)

    return call


def _normal_(stream: UnitStream, input: Tensor, mean: float = 0.0, std: float = 1.0, **options: Any) -> Tensor:
    return input.copy_(stream.normal(input.shape) * std + mean)


_OWN: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.dropout: _dropout,
    functional.dropout1d: _feature_dropout(1),
    functional.dropout2d: _feature_dropout(2),
    functional.dropout3d: _feature_dropout(3),
    functional.alpha_dropout: _alpha_dropout,
    functional.feature_alpha_dropout: _feature_alpha_dropout,
    functional.scaled_dot_product_attention: _attention,
    functional.gumbel_softmax: _gumbel_softmax,
    torch.dropout: _by_train(_dropout),
    torch.dropout_: _by_train(_dropout, inplace=True),
    torch.feature_dropout: _by_train(_feature_dropout(2)),
    torch.feature_dropout_: _by_train(_feature_dropout(2), inplace=True),
    torch.alpha_dropout: _by_train(_alpha_dropout),
    torch.alpha_dropout_: _by_train(_alpha_dropout, inplace=True),
    torch.feature_alpha_dropout: _by_train(_feature_alpha_dropout),
    torch.feature_alpha_dropout_: _by_train(_feature_alpha_dropout, inplace=True),
    torch.empty: _empty,
    torch.rand: _factory(UnitStream.uniform),
    torch.randn: _factory(UnitStream.normal),
    torch.rand_like: _like(UnitStream.uniform),
    torch.randn_like: _like(UnitStream.normal),
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.Tensor.bernoulli_: _bernoulli_,
    torch.Tensor.uniform_: _uniform_,
    torch.Tensor.normal_: _normal_,
}
