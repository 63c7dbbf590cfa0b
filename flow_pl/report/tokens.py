"""Prepare texts for the page, with tokens coloured by their routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flow_pl.report.instances import probability_color, probability_range, token_probabilities
from flow_pl.report.names import tokens_of, visible
from flow_pl.report.routes import Instance


class Token(NamedTuple):
    """A token, with visible white space, and the colour (#rrggbb) of its probability."""

    text: str
    color: str


class Text(NamedTuple):
    """The tokens of an instance, without padding, and the line below them."""

    tokens: list[Token]
    caption: str


class TokenLists(NamedTuple):
    """Texts with coloured tokens.

    Attributes:
        lists: the most local and the most global texts, by title.
        range: probabilities of the local branch at both ends of the colour scale.
        scale: colours at its start, middle and end.
        words: whether tokens are words; characters are shown without spaces between them.
    """

    lists: dict[str, list[Text]]
    range: tuple[float, float]
    scale: list[str]
    words: bool


def token_lists(
    local: Sequence[Instance], global_: Sequence[Instance], names: Sequence[str] | None, clients: Mapping[int, str]
) -> TokenLists:
    """Colour the most local and the most global texts.

    Args:
        local: instances, the most local first.
        global_: instances, the most global first.
        names: names of the tokens; None for their numbers.
        clients: client names by index.
    """
    low, high = probability_range([*local, *global_])
    lists = {
        title: [_text(instance, names, clients[instance.client], low, high) for instance in instances]
        for title, instances in (("Most local", local), ("Most global", global_))
    }
    scale = [probability_color(low + (high - low) * place, low, high) for place in (0, 0.5, 1)]
    return TokenLists(lists, (low, high), scale, words=names is None or max(map(len, names[4:]), default=0) > 1)


def _text(instance: Instance, names: Sequence[str] | None, client: str, low: float, high: float) -> Text:
    tokens = [
        Token(visible(token), probability_color(float(np.clip(probability, low, high)), low, high))
        for token, probability in zip(tokens_of(instance.x, names), token_probabilities(instance), strict=True)
        if not np.isnan(probability)
    ]
    right = f"{instance.generalized[instance.mask].sum()} with w_g and {instance.personalized[instance.mask].sum()}"
    caption = f"{client}: {100 * instance.share:.0f} % local; {right} with its own model of {instance.mask.sum()} right"
    return Text(tokens, caption)
