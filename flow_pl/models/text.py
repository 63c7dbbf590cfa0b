"""Classify texts by any Hugging Face encoder: the mean over real tokens, and a linear head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flow_pl.errors import ConfigurationError, FlowError, brief
from flow_pl.models.lazy import outputs
from flow_pl.models.pooling import MASK, pooled, token_mask
from flow_pl.utils.optional import import_optional
from flow_pl.utils.validation import given, require_count, require_fraction

IDS = "input_ids"
"""Name of the token ids, among several inputs."""


class TextEncoder(nn.Module):
    """An encoder of the transformers library, followed by the mean over real tokens and a linear head.

    Takes token ids [N, T] with a padding token, or a mapping with `input_ids` and `attention_mask` [N, T] and any other
    input of this shape that the encoder takes (`token_type_ids`). Routed blocks: the
    encoder's layers, and the head; embedding tables are shared. The encoder's pooler, if it has one, is left out.

    Args:
        model: folder with `config.json` and weights, or a name on the Hugging Face hub.
        num_classes: number of classes; null = that of the data.
        pretrained: whether to load the weights; false = use only the configuration, with random weights.
        padding: the padding token; null = the encoder's own.
        dropout: share dropped in training wherever the encoder uses dropout; null = the encoder's own shares.

    Raises:
        ConfigurationError: transformers is not installed, there is no such model, or it is not an encoder that attends
            to the whole text.
    """

    def __init__(
        self,
        model: str,
        num_classes: int | None = None,
        pretrained: bool = True,
        padding: int | None = None,
        dropout: float | None = None,
    ) -> None:
        require_count(**given(num_classes=num_classes))
        require_count(0, **given(padding=padding))
        require_fraction(**given(dropout=dropout))
        super().__init__()
        self.encoder: nn.Module = _load(model, pretrained, dropout)
        config: Any = self.encoder.config
        own = getattr(config, "pad_token_id", None)
        self.padding = own if padding is None else padding
        self._additive = _takes_additive_masks(self.encoder, model)
        self.head = outputs(config.hidden_size, num_classes)

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Compute outputs [N, classes] for token ids [N, T], alone or with their mask."""
        inputs = dict(x) if isinstance(x, Mapping) else {IDS: x}
        mask = token_mask(inputs if MASK in inputs else inputs[IDS], self.padding)
        mask = torch.ones_like(inputs[IDS], dtype=torch.bool) if mask is None else mask
        inputs[MASK] = _prepared(mask, self._additive)
        hidden = self.encoder(**inputs).last_hidden_state
        result: Tensor = self.head(pooled(hidden, mask))
        return result


def _load(model: str, pretrained: bool, dropout: float | None) -> nn.Module:
    library = import_optional("transformers", "transformers", "TextEncoder")
    folder = Path(model).expanduser()
    source = str(folder) if folder.is_dir() else model
    try:
        with _quiet(library):
            config = library.AutoConfig.from_pretrained(source)
            if dropout is not None:
                shares = [key for key, value in config.to_dict().items() if "drop" in key and isinstance(value, float)]
                config.update(dict.fromkeys(shares, dropout))
            made = _make(library.AutoModel, source if pretrained else None, config)
    except FlowError:
        raise
    except Exception as error:  # folders, the hub and configurations may raise anything
        raise ConfigurationError(
            f"model is {model}, which cannot be loaded ({brief(error)}): give a folder with config.json and "
            "the weights, as save_pretrained writes it, or the name of a model on the Hugging Face hub."
        ) from error
    made.train()  # like any new module; a loaded one is in evaluation mode
    if isinstance(getattr(made, "pooler", None), nn.Module):
        made._modules["pooler"] = None  # the mean over the tokens does not use it
    return made


def _make(library: Any, source: str | None, config: Any) -> nn.Module:
    """Create the encoder; if it supports torch's attention, with that, which the engine replaces for many clients."""
    make = library.from_config if source is None else library.from_pretrained
    what = {"config": config} if source is None else {"pretrained_model_name_or_path": source, "config": config}
    try:
        made: nn.Module = make(**what, attn_implementation="sdpa", dtype=torch.float32)
    except ValueError:  # the encoder does not support it
        made = make(**what, attn_implementation="eager", dtype=torch.float32)
    return made


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Suppress progress bars for a file that is read at once."""
    logging = library.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _prepared(mask: Tensor, additive: bool) -> Tensor:
    """Expand a mask [N, T] to all heads and queries, [N, 1, 1, T].

    Encoders that expand it themselves read its values, which vmap does not allow and which stalls the device.
    """
    look = mask[:, None, None, :]
    if not additive:
        return look
    return torch.zeros_like(look, dtype=torch.float32).masked_fill(~look, torch.finfo(torch.float32).min)


def _takes_additive_masks(encoder: nn.Module, name: str) -> bool:
    """Return whether an encoder's expanded masks are added to the scores, rather than bool; by comparing its outputs.

    Raises:
        ConfigurationError: neither kind gives the encoder's outputs, for instance if it attends only to earlier tokens.
    """
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    training = encoder.training
    encoder.eval()
    problem: Exception | str = "its outputs depend only on earlier tokens, or its masks are of another kind"
    try:
        with torch.no_grad():
            expected = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
            for additive in (False, True):
                found = encoder(input_ids=ids, attention_mask=_prepared(mask.bool(), additive)).last_hidden_state
                if torch.allclose(found[mask.bool()], expected, rtol=1e-4, atol=1e-5):
                    return additive
    except Exception as error:  # an architecture may raise anything for a mask that it does not take
        problem = error
    finally:
        encoder.train(training)
    raise ConfigurationError(
        f"model is {name}, a {type(encoder).__name__}, expected an encoder that attends to the whole text and returns "
        f"a vector for each token, such as BERT, MPNet or ModernBERT ({brief(problem)}): choose such a model."
    )
