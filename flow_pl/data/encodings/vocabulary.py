"""Vocabularies: the tokens that have numbers, and the special numbers.

Four numbers are the same in every vocabulary, so that losses and accuracies can rely on them: a target equal to `PAD`
is no target, and `OOV` and `EOS` are targets that some accuracies exclude.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flow_pl.errors import DataError, brief

PAD, OOV, BOS, EOS = range(4)
"""Numbers of padding, of a token that is not in the vocabulary, and of a text's start and end."""

SPECIAL = 4
"""Number of special numbers, which come before that of the first token."""


class Vocabulary:
    """Numbers tokens: `SPECIAL` for the first one, and so on.

    Args:
        tokens: the tokens, each once, in the order of their numbers.

    Attributes:
        tokens: the tokens in the order of their numbers.
        dtype: the smallest integer type that holds every number.

    Raises:
        DataError: there are no tokens, or one occurs twice.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = tuple(tokens)
        self._numbers = {token: number for number, token in enumerate(self.tokens, start=SPECIAL)}
        if not self.tokens:
            raise DataError("the vocabulary is empty: the training clients have no text; check the source of the data.")
        if len(self._numbers) < len(self.tokens):
            twice = next(token for token, count in Counter(self.tokens).items() if count > 1)
            raise DataError(f"the vocabulary has the token {twice!r} more than once: list every token once.")
        self.dtype: np.dtype[np.signedinteger] = np.dtype(np.int16 if len(self) <= np.iinfo(np.int16).max else np.int32)

    def __len__(self) -> int:
        """Return the number of tokens and special numbers together; every number is smaller."""
        return len(self.tokens) + SPECIAL

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Return the numbers of tokens, `OOV` for those that are not in the vocabulary."""
        numbers = self._numbers
        return [numbers.get(token, OOV) for token in tokens]

    def rows(self, sequences: Sequence[Sequence[int]], length: int) -> NDArray[np.signedinteger]:
        """Return sequences of numbers as rows of equal length, padded with `PAD`.

        Args:
            sequences: n sequences, none longer than `length`.
            length: length of a row.

        Returns:
            [n, length] of type `dtype`.
        """
        rows = np.full((len(sequences), length), PAD, dtype=self.dtype)
        for row, numbers in zip(rows, sequences, strict=True):
            row[: len(numbers)] = numbers
        return rows


def most_frequent(counts: Counter[str], size: int) -> list[str]:
    """Return the most frequent tokens, in order of decreasing frequency, ties in alphabetical order.

    Args:
        counts: how often each token occurs.
        size: largest number of tokens.

    Returns:
        The tokens.
    """
    return sorted(counts, key=lambda token: (-counts[token], token))[:size]


def read_tokens(path: Path, size: int) -> list[str]:
    """Read the first tokens of a published list.

    Args:
        path: a JSON object of counts, like TensorFlow Federated's `stackoverflow.tag_count`, of which the most
            frequent are taken; or lines that start with a token, in the order of the vocabulary, like its
            `stackoverflow.word_count`.
        size: largest number of tokens.

    Returns:
        The tokens.

    Raises:
        DataError: the file cannot be read or lists no token.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("{"):
            tokens = most_frequent(Counter(json.loads(text)), size)
        else:
            tokens = [line.split(maxsplit=1)[0] for line in text.splitlines() if line.strip()][:size]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a list of tokens ({brief(error)}): give lines, or a JSON object of counts."
        ) from error
    if not tokens:
        raise DataError(f"{path} lists no token: give lines that start with one, or a JSON object of counts.")
    return tokens
