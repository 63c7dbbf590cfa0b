"""Encode texts as LEAF publishes them: already cut into windows of characters or sequences of words.

Source: Caldas et al., *LEAF: A Benchmark for Federated Settings* (arXiv 1812.01097), github.com/TalwalkarLab/leaf,
`data/shakespeare` and `data/reddit`. The numbers of tokens are those of `flow_pl.data.encodings.text`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flow_pl.data.encodings.encoding import Rows, Vocabularies, VocabularySource
from flow_pl.data.encodings.text import CHARACTER, CHARACTERS, WORDS, NextCharacter, NextToken, usable_rows
from flow_pl.data.encodings.values import Columns, texts
from flow_pl.data.encodings.vocabulary import BOS, EOS, PAD, Vocabulary
from flow_pl.errors import DataError
from flow_pl.utils.validation import require_count

MARKS = {"<PAD>": PAD, "<BOS>": BOS, "<EOS>": EOS}
"""Special tokens in LEAF's Reddit."""


class CharacterAfterWindow(NextCharacter):
    """Encodes windows of characters and the character that follows each, as in LEAF's Shakespeare.

    Only this character is a target: windows overlap, so the others are targets elsewhere.

    Args:
        text: column of the windows, texts of `length` characters.
        target: column of the characters that follow them.
        length: number of characters of a window.
        characters: the characters of the vocabulary; null = those of the training clients.
        vocab_size: largest number of characters, if they are counted over the training clients.
    """

    def __init__(
        self,
        text: str = "x",
        target: str = "y",
        length: int = 80,
        characters: str | None = CHARACTERS,
        vocab_size: int = 86,
    ) -> None:
        super().__init__(text, length, characters, vocab_size)
        self.target = target

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of windows and following characters."""
        return self.text, self.target

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Encode windows [n, length], and targets [n, length] that are `PAD` except the last; see `Encoding.encode`."""
        characters = vocabularies[CHARACTER]
        windows, following = texts(columns, self.text), texts(columns, self.target)
        for row, (window, character) in enumerate(zip(windows, following, strict=True)):
            if len(window) != self.length or len(character) != 1:
                raise DataError(
                    f"has {len(window)} characters followed by {len(character)} in row {row}, expected {self.length} "
                    "followed by 1"
                )
        x = characters.rows([characters.encode(window) for window in windows], self.length)
        y = np.full_like(x, PAD)
        y[:, -1] = characters.encode(following)
        return usable_rows(Rows(x, y))


class TokenSequences(NextToken):
    """Encodes comments that are already cut into sequences of tokens, as in LEAF's Reddit.

    A comment is a list of sequences; its entry in the targets holds the following tokens, under `target_tokens`.

    Args:
        text: column of the comments.
        target: column of the targets.
        vocab_size: number of words in the vocabulary.
        length: number of tokens of a sequence.
        vocabulary: file with the words in the order of their numbers; null = the most frequent words of the training
            clients.
    """

    def __init__(
        self,
        text: str = "x",
        target: str = "y",
        vocab_size: int = 10_000,
        length: int = 10,
        vocabulary: str | None = None,
    ) -> None:
        require_count(vocab_size=vocab_size, length=length)
        self.text = text
        self.target = target
        self.vocab_size = vocab_size
        self.length = length
        self.vocabulary = vocabulary

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of comments and targets."""
        return self.text, self.target

    def vocabularies(self) -> dict[str, VocabularySource]:
        """Return the source of the vocabulary of words."""
        return {WORDS: VocabularySource(self.vocab_size, path=self.vocabulary)}

    def tokens(self, columns: Columns) -> Iterable[tuple[str, Iterable[str]]]:
        """Yield the words of the comments, without the special tokens."""
        for comment in columns[self.text]:
            for sequence in self._sequences(comment):
                yield WORDS, (token for token in sequence if token not in MARKS)

    def class_count(self, vocabularies: Vocabularies) -> int:
        """Return the number of words and special tokens."""
        return len(vocabularies[WORDS])

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Encode tokens [n, length] and the tokens that follow, one row per sequence; see `Encoding.encode`."""
        words = vocabularies[WORDS]
        x: list[list[int]] = []
        y: list[list[int]] = []
        for row, (comment, entry) in enumerate(zip(columns[self.text], columns[self.target], strict=True)):
            sequences = self._sequences(comment)
            targets = self._sequences(entry.get("target_tokens") if isinstance(entry, dict) else None)
            if len(sequences) != len(targets):
                raise DataError(f"has {len(sequences)} sequences but {len(targets)} of targets in row {row}")
            x += [_numbers(words, sequence) for sequence in sequences]
            y += [_numbers(words, sequence) for sequence in targets]
        return usable_rows(Rows(words.rows(x, self.length), words.rows(y, self.length)))

    def _sequences(self, value: Any) -> Sequence[Sequence[str]]:
        if not isinstance(value, list) or not all(isinstance(entry, list) for entry in value):
            raise DataError("has a comment or `target_tokens` that is not a list of sequences of tokens")
        if not all(isinstance(token, str) for sequence in value for token in sequence):
            raise DataError("has a token that is not a text")
        wrong = {len(sequence) for sequence in value} - {self.length}
        if wrong:
            raise DataError(f"has a sequence of {min(wrong)} tokens, expected {self.length}: set length")
        return value


def _numbers(words: Vocabulary, sequence: Sequence[str]) -> list[int]:
    return [MARKS.get(token, number) for token, number in zip(sequence, words.encode(sequence), strict=True)]
