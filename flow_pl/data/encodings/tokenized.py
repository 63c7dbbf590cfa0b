"""Encode texts as token ids and their mask, by a tokenizer of the transformers library, for text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.encodings.encoding import Encoding, Rows, Vocabularies
from flow_pl.data.encodings.values import Columns, class_numbers, texts
from flow_pl.data.store.cache import file_identity
from flow_pl.errors import ConfigurationError, DataError, brief
from flow_pl.utils.optional import import_optional
from flow_pl.utils.validation import given, require_count, require_some

IDS, MASK, SEGMENTS = "input_ids", "attention_mask", "token_type_ids"
"""Names of a model's inputs, as in the transformers library."""


class TokenizedTexts(Encoding):
    """Encodes texts, or pairs of them, with a label, as a mapping with `input_ids` and `attention_mask` [n, length].

    Longer texts are cut, and shorter ones padded with the tokenizer's padding token, for which the mask is 0. For
    pairs, the mapping also has `token_type_ids` if the tokenizer uses them.

    Args:
        tokenizer: folder of a tokenizer, as `save_pretrained` of the transformers library writes it (`tokenizer.json`),
            or its name on the Hugging Face hub; use the tokenizer of the encoder.
        text: column of the texts.
        label: column of the labels.
        length: number of tokens of a row, including special ones; a model's time grows with it.
        second: column of the second texts of pairs; null = no pairs.
        num_classes: number of classes; null = the largest label + 1.
        classes: names of the classes in the order of their numbers, if labels are texts; null = labels are numbers.

    Raises:
        ConfigurationError: a setting is out of its range, transformers is not installed, or there is no such tokenizer.
    """

    def __init__(
        self,
        tokenizer: str,
        text: str = "x",
        label: str = "y",
        length: int = 64,
        second: str | None = None,
        num_classes: int | None = None,
        classes: list[str] | None = None,
    ) -> None:
        require_count(length=length, **given(num_classes=num_classes))
        require_some(**given(classes=classes))
        self.tokenizer = tokenizer
        self.text = text
        self.label = label
        self.length = length
        self.second = second
        self.num_classes = num_classes
        self.classes = classes

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of texts and labels."""
        return (self.text, *given(second=self.second).values(), self.label)

    def options(self) -> dict[str, Any]:
        """Return the settings, and the sizes and modification times of the files of a tokenizer's folder."""
        folder = Path(self.tokenizer).expanduser()
        files = sorted(file for file in folder.glob("*") if file.is_file() and _is_of_tokenizer(file))
        return {**super().options(), "files": [file_identity(file) for file in files]}

    def class_count(self, vocabularies: Vocabularies) -> int | None:
        """Return the configured number of classes, if any."""
        return self.num_classes

    def token_names(self) -> Sequence[str]:
        """Return the tokenizer's tokens in the order of their numbers."""
        tokenizer = load_tokenizer(self.tokenizer)
        names: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        return names

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Encode token ids and their mask [n, length], and labels [n]; see `Encoding.encode`."""
        tokenizer = load_tokenizer(self.tokenizer)
        parts = [texts(columns, name) for name in (self.text, *given(second=self.second).values())]
        try:
            found = tokenizer(
                *parts,
                truncation=True,
                padding="max_length",
                max_length=self.length,
                return_attention_mask=True,
                return_tensors="np",
            )
        except Exception as error:  # the length may leave no room beside the special tokens
            raise DataError(
                f"has texts that cannot be tokenized ({brief(error)}): raise length, which is {self.length}."
            ) from error
        # half the space, if every id fits
        ids = np.int16 if len(tokenizer) <= np.iinfo(np.int16).max else np.int32
        x: dict[str, NDArray[Any]] = {IDS: found[IDS].astype(ids), MASK: found[MASK].astype(np.int8)}
        if self.second is not None and SEGMENTS in found:
            x[SEGMENTS] = found[SEGMENTS].astype(np.int8)
        return Rows(x, class_numbers(columns[self.label], self.label, self.classes))


@cache
def load_tokenizer(name: str) -> Any:
    """Load a tokenizer, once for all callers; no code of a tokenizer is run.

    Args:
        name: folder of the tokenizer, or its name on the Hugging Face hub.

    Returns:
        A `transformers.PreTrainedTokenizerBase` that pads on the right.

    Raises:
        ConfigurationError: transformers is not installed, there is no such tokenizer, or it has no padding token.
    """
    library = import_optional("transformers", "transformers", "TokenizedTexts")
    folder = Path(name).expanduser()
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else name, trust_remote_code=False, padding_side="right"
        )
    except Exception as error:  # folders and the hub may raise anything
        raise ConfigurationError(
            f"tokenizer is {name}, which cannot be loaded ({brief(error)}): give a folder with tokenizer.json, as "
            "save_pretrained writes it, or the name of a model on the Hugging Face hub."
        ) from error
    if tokenizer.pad_token_id is None:
        raise ConfigurationError(
            f"tokenizer is {name}, which has no padding token for short texts: give that of an encoder, or set "
            "pad_token in its tokenizer_config.json."
        )
    return tokenizer


def _is_of_tokenizer(file: Path) -> bool:
    """Return whether a file in a model's folder belongs to its tokenizer."""
    return file.suffix in (".json", ".txt", ".model") and file.name not in ("model.safetensors.index.json",)
