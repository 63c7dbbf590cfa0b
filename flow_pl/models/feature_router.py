"""A router that decides by a submodule's features: for tokens, whose ids are not quantities, and for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flow_pl.errors import ConfigurationError
from flow_pl.kernels.functional import call, intercepted
from flow_pl.models.blocks import suggestion
from flow_pl.models.pooling import padding_token, pooled, token_mask
from flow_pl.models.routers import InstanceRouter
from flow_pl.models.routing import tensors_in
from flow_pl.utils.groups import Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import given, require_count

if TYPE_CHECKING:
    from flow_pl.models.routed import RoutedModel


class FeatureRouter(InstanceRouter):
    """Routes like `InstanceRouter`, but by pooled features of w_g: their mean over tokens or an image's positions.

    The features are those of the unmodified w_g, computed by an extra pass up to the submodule, without gradients, so
    they do not depend on the route. Padding is excluded by the instances' `attention_mask` or, for a single tensor of
    token ids, by the padding token. The router sees the whole instance, including later tokens in a task that predicts
    at every token.

    Args:
        blocks: the routed blocks, given by the method.
        submodule: name in the backbone of the submodule whose outputs are the features; null = use the input of the
            last block, which is what the head sees.
        hidden: widths of the hidden layers, with an early exit for each routed block.
        dropout: share of hidden units dropped in training; none in evaluation.
        padding: the padding token; null = the `padding_idx` of the backbone's embedding table, if it has one.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        submodule: str | None = None,
        hidden: Sequence[int] = (64, 32),
        dropout: float = 0.3,
        padding: int | None = None,
    ) -> None:
        super().__init__(blocks, hidden, dropout)
        require_count(0, **given(padding=padding))
        self.submodule = submodule
        self.padding = padding

    def look(self, model: RoutedModel, parameters: Parameters, x: Inputs) -> Tensor:
        """Compute the pooled features [N, F] of instances x [N, ...], without gradients.

        Raises:
            ConfigurationError: there is no such submodule, or its output in the backbone is not a tensor.
        """
        with torch.no_grad():
            if self.submodule is None:
                features = model.features(x, parameters)
            else:
                features = output_of(model.backbone, self.submodule, parameters, x)
            padding = padding_token(model.backbone) if self.padding is None else self.padding
            return pooled(features, token_mask(x, padding)).float()


class _Found(Exception):  # noqa: N818 (no error: it ends a forward that has given what is asked for)
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def output_of(backbone: nn.Module, name: str, parameters: Parameters, x: Inputs) -> Tensor:
    """Compute the output of a submodule at its first call in the backbone, and nothing after it.

    Args:
        backbone: any module.
        name: name of the submodule.
        parameters: parameters of the backbone.
        x: instances [N, ...].

    Returns:
        The output, or the first tensor in it.

    Raises:
        ConfigurationError: there is no such submodule, it is not called, or returns no tensor.
    """
    modules, kind = dict(backbone.named_modules()), type(backbone).__name__
    if not name or name not in modules:
        raise ConfigurationError(
            f"the router's submodule is '{name}', which is not a submodule of {kind}: {suggestion(modules, name)}."
        )
    module = modules[name]

    def found(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise _Found(module(*args, **kwargs))

    output = None
    with intercepted({module: found}):
        try:
            call(backbone, parameters, (x,))
        except _Found as stop:
            output = stop.output
    tensors = tensors_in(output)
    if not tensors:
        raise ConfigurationError(
            f"the router's submodule '{name}' of {kind} is never called or returns no tensor: name one whose "
            "output depends on the instances."
        )
    return tensors[0]
