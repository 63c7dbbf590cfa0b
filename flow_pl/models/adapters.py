"""Low-rank adapters of a frozen backbone: Hu et al., LoRA (ICLR 2022), by the peft library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from flow_pl.errors import ConfigurationError, brief
from flow_pl.models.blocks import suggestion
from flow_pl.utils.optional import import_optional
from flow_pl.utils.validation import given, require_count, require_fraction, require_positive, require_some


class LoRA(nn.Module):
    """Trains adapters of a backbone instead of its weights: W x becomes W x + alpha / r * B A x, with W frozen.

    Frozen weights are one copy for all clients, neither stacked nor sent. The adapters, and the modules named in
    `train`, are averaged, copied and routed like any parameters: the blocks are those of the backbone that have some.
    An adapter's dropout is drawn for each client separately, as all dropout is.

    Args:
        backbone: the model, with the weights to freeze.
        r: rank of the adapters.
        alpha: scale of the adapters' outputs (times 1 / r).
        target_modules: names of the layers that get an adapter, or endings of their names, such as query; null =
            all linear layers that are not in `train`.
        dropout: share of an adapter's inputs dropped in training.
        train: names of submodules of the backbone that are trained in full, such as a new head.

    Raises:
        ConfigurationError: peft is not installed, a name is not that of a submodule, or a layer already has
            an adapter or cannot have one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        r: int = 8,
        alpha: float = 16.0,
        target_modules: Sequence[str] | None = None,
        dropout: float = 0.0,
        train: Sequence[str] = ("head",),
    ) -> None:
        require_count(r=r)
        require_positive(alpha=alpha)
        require_fraction(dropout=dropout)
        require_some(**given(target_modules=target_modules))
        if any(hasattr(module, "peft_config") for module in backbone.modules()):
            raise ConfigurationError(
                f"the backbone {type(backbone).__name__} already has adapters, expected one without: wrap it in LoRA "
                "once."
            )
        super().__init__()
        peft = import_optional("peft", "transformers", "LoRA")
        whole = _trained_whole(backbone, train)
        targets = _linear_layers(backbone, whole) if target_modules is None else list(target_modules)
        settings = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout)
        try:
            adapted: nn.Module = peft.inject_adapter_in_model(settings, backbone)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"target_modules is {targets}, but these layers of {type(backbone).__name__} "
                f"cannot have adapters ({brief(error)}): name linear or convolution layers."
            ) from error
        for p in (p for module in whole for p in module.parameters()):
            p.requires_grad = True  # not requires_grad_, which layers without a shape refuse
        self.backbone = adapted

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Compute the outputs of the backbone with its adapters."""
        outputs: Tensor = self.backbone(x)
        return outputs


def _trained_whole(backbone: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    modules = dict(backbone.named_modules())
    for name in names:
        if not name or name not in modules:
            raise ConfigurationError(
                f"train names '{name}', which is not a submodule of {type(backbone).__name__}: "
                f"{suggestion(modules, name)}."
            )
    return [modules[name] for name in names]


def _linear_layers(backbone: nn.Module, whole: Sequence[nn.Module]) -> list[str]:
    """Return the names of the linear layers with a shape that are outside of these modules."""
    inside = {part for module in whole for part in module.modules()}
    return [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module.weight, nn.UninitializedParameter)
        if module not in inside
    ]
