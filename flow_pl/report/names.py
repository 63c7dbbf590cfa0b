"""Choose how to show instances, and name classes and tokens, from the data module and the features' shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flow_pl.data import EncodedData, FederatedDataModule
from flow_pl.data.encodings.tags import TAGS
from flow_pl.data.encodings.tokenized import IDS
from flow_pl.data.encodings.vocabulary import SPECIAL, Vocabulary
from flow_pl.tasks import Objective
from flow_pl.utils.inputs import Inputs, first

Kind = Literal["image", "text", "vector"]

SPECIAL_NAMES = ("<pad>", "<oov>", "<bos>", "<eos>")

WHITE = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}
"""Visible signs for white space."""


def kind_of(data: FederatedDataModule, objective: Objective) -> Kind:
    """Return how an instance is shown: as pixels, tokens, or numbers."""
    example = shown(data.example())
    shape = tuple(example.shape[1:])
    if objective.positions or (len(shape) == 1 and not example.is_floating_point() and token_names(data)):
        return "text"
    return "image" if len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)) else "vector"


def shown(x: Inputs) -> Tensor:
    """Return what is shown of instances: of several inputs the token ids, or else the first."""
    return x[IDS] if isinstance(x, dict) and IDS in x else first(x)


def token_names(data: FederatedDataModule) -> list[str] | None:
    """Return the token names by index, including special ones; None if the data module has no vocabulary."""
    own = data.token_names() if isinstance(data, EncodedData) else ()
    if own:
        return list(own)
    vocabularies = data.vocabularies if isinstance(data, EncodedData) else {}
    tokens = next((vocabulary for name, vocabulary in vocabularies.items() if name != TAGS), None)
    return None if tokens is None else _numbered(tokens)


def class_names(data: FederatedDataModule, objective: Objective) -> list[str]:
    """Return the class names; their numbers if the data module does not name them."""
    vocabularies = data.vocabularies if isinstance(data, EncodedData) else {}
    names: Sequence[str] = data.class_names
    if TAGS in vocabularies:
        names = vocabularies[TAGS].tokens
    elif objective.positions:
        names = token_names(data) or ()
    classes = range(count_classes(data, objective))
    return [names[number] if number < len(names) else str(number) for number in classes]


def count_classes(data: FederatedDataModule, objective: Objective) -> int:
    """Return the number of classes; of labels where an example has several, whose zeros and ones are no classes."""
    return data.federation.store.label_shape[-1] if objective.several_labels else data.num_classes


def visible(token: str) -> str:
    """Replace each white-space character of a token by a visible sign."""
    return "".join(WHITE.get(character, character) for character in token)


def tokens_of(x: NDArray[Any], names: Sequence[str] | None) -> list[str]:
    """Return the T tokens of a row by name; their numbers if they have no names."""
    numbers = np.asarray(x).reshape(-1).tolist()
    return [names[int(n)] if names is not None and 0 <= n < len(names) else str(int(n)) for n in numbers]


def _numbered(vocabulary: Vocabulary) -> list[str]:
    assert len(SPECIAL_NAMES) == SPECIAL
    return [*SPECIAL_NAMES, *vocabulary.tokens]
