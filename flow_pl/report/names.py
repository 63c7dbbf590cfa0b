"""How instances look and what classes are called: by what the data module knows, and by the shape of the features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flow_pl.data import EncodedData, FederatedDataModule
from flow_pl.data.encodings.tags import TAGS
from flow_pl.data.encodings.vocabulary import SPECIAL, Vocabulary
from flow_pl.tasks import Objective
from flow_pl.utils.inputs import first

Kind = Literal["image", "text", "vector"]

SPECIAL_NAMES = ("<pad>", "<oov>", "<bos>", "<eos>")

WHITE = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}
"""Signs for tokens that could not be seen."""


def kind_of(data: FederatedDataModule, objective: Objective) -> Kind:
    """How an instance is shown: pixels, tokens, or numbers."""
    example = first(data.example())  # of several features, the first ones are shown
    shape = tuple(example.shape[1:])
    if objective.positions or (len(shape) == 1 and not example.is_floating_point() and token_names(data)):
        return "text"
    return "image" if len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)) else "vector"


def token_names(data: FederatedDataModule) -> list[str] | None:
    """The tokens by their numbers, special ones included; None where the data module has no vocabulary of its rows."""
    own = data.token_names() if isinstance(data, EncodedData) else ()
    if own:
        return list(own)
    vocabularies = data.vocabularies if isinstance(data, EncodedData) else {}
    tokens = next((vocabulary for name, vocabulary in vocabularies.items() if name != TAGS), None)
    return None if tokens is None else _numbered(tokens)


def class_names(data: FederatedDataModule, objective: Objective) -> list[str]:
    """What the classes are called; their numbers, where the data module does not say."""
    vocabularies = data.vocabularies if isinstance(data, EncodedData) else {}
    names: Sequence[str] = ()
    if TAGS in vocabularies:
        names = vocabularies[TAGS].tokens
    elif objective.positions:
        names = token_names(data) or ()
    return [names[number] if number < len(names) else str(number) for number in range(data.num_classes)]


def visible(token: str) -> str:
    """A token with a sign for each white space."""
    return "".join(WHITE.get(character, character) for character in token)


def tokens_of(x: NDArray[Any], names: Sequence[str] | None) -> list[str]:
    """The tokens of a row, [T]; their numbers where they have no names."""
    numbers = np.asarray(x).reshape(-1).tolist()
    return [names[int(n)] if names is not None and 0 <= n < len(names) else str(int(n)) for n in numbers]


def _numbered(vocabulary: Vocabulary) -> list[str]:
    assert len(SPECIAL_NAMES) == SPECIAL
    return [*SPECIAL_NAMES, *vocabulary.tokens]
