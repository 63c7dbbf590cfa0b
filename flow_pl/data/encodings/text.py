"""Encode texts as rows of numbers, for models that predict the next word or character.

A row's target at a position is the token that follows, or `PAD` if there is nothing to predict. Rows without a target
are left out.

Source of words and characters: the preprocessing of TensorFlow Federated's Stack Overflow and Shakespeare
simulations (github.com/google-research/federated, `utils/datasets`), with other numbers for the special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from flow_pl.data.encodings.encoding import Encoding, Rows, Vocabularies, VocabularySource
from flow_pl.data.encodings.values import Columns, texts
from flow_pl.data.encodings.vocabulary import BOS, EOS, OOV, PAD, Vocabulary
from flow_pl.data.store.client_checks import UnusableError
from flow_pl.utils.validation import require_count, require_some

CHARACTERS = "dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"
"""The 86 characters of TensorFlow Federated's Shakespeare simulation."""

WORDS = "words"
CHARACTER = "characters"


class NextToken(Encoding):
    """The base class of encodings whose targets are tokens."""

    def can_be_learned_from(self, rows: Rows) -> bool:
        """Return whether any target is a token of the vocabulary."""
        return bool(np.isin(rows.y, (PAD, OOV, EOS), invert=True).any())


class NextWord(NextToken):
    """Encodes sentences of words separated by spaces, cut at a length; every word and the end are targets.

    A row is the start token and the sentence's first `length` - 1 words; a shorter sentence is padded.

    Args:
        text: column of the sentences.
        vocab_size: number of words in the vocabulary.
        length: largest number of words of a sentence, which is the length of a row.
        vocabulary: file with the words in the order of their numbers, such as the published
            `stackoverflow.word_count`; null = the most frequent words of the training clients.
    """

    def __init__(
        self, text: str = "tokens", vocab_size: int = 10_000, length: int = 20, vocabulary: str | None = None
    ) -> None:
        require_count(vocab_size=vocab_size, length=length)
        self.text = text
        self.vocab_size = vocab_size
        self.length = length
        self.vocabulary = vocabulary

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the name of the column of sentences."""
        return (self.text,)

    def vocabularies(self) -> dict[str, VocabularySource]:
        """Return the source of the vocabulary of words."""
        return {WORDS: VocabularySource(self.vocab_size, path=self.vocabulary)}

    def tokens(self, columns: Columns) -> Iterable[tuple[str, Iterable[str]]]:
        """Yield the words of the sentences, including those cut off."""
        return ((WORDS, sentence.split()) for sentence in texts(columns, self.text))

    def class_count(self, vocabularies: Vocabularies) -> int:
        """Return the number of words and special tokens."""
        return len(vocabularies[WORDS])

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Encode words [n, length] and the words that follow them [n, length]; see `Encoding.encode`."""
        words = vocabularies[WORDS]
        sentences = (sentence.split()[: self.length] for sentence in texts(columns, self.text))
        # as published, the end is a target only in sentences that are not cut
        numbered = [[BOS, *words.encode(sentence), EOS][: self.length + 1] for sentence in sentences if sentence]
        return _next_tokens(words, numbered, self.length)


class NextCharacter(NextToken):
    """Encodes texts, cut into windows of characters; every character and the end are targets.

    A text with its start and end tokens is cut into pieces of `length` + 1, of which the last one is padded; a piece's
    first `length` characters are a row, its last `length` characters the targets.

    Args:
        text: column of the texts.
        length: number of characters of a row.
        characters: the characters of the vocabulary; null = those of the training clients.
        vocab_size: largest number of characters, if they are counted over the training clients.
    """

    def __init__(
        self,
        text: str = "snippets",
        length: int = 80,
        characters: str | None = CHARACTERS,
        vocab_size: int = 86,
    ) -> None:
        require_count(length=length, vocab_size=vocab_size)
        if characters is not None:
            require_some(characters=characters)
        self.text = text
        self.length = length
        self.characters = characters
        self.vocab_size = vocab_size

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the name of the column of texts."""
        return (self.text,)

    def vocabularies(self) -> dict[str, VocabularySource]:
        """Return the source of the vocabulary of characters."""
        return {CHARACTER: VocabularySource(self.vocab_size, self.characters)}

    def tokens(self, columns: Columns) -> Iterable[tuple[str, Iterable[str]]]:
        """Yield the characters of the texts."""
        return ((CHARACTER, text) for text in texts(columns, self.text))

    def class_count(self, vocabularies: Vocabularies) -> int:
        """Return the number of characters and special tokens."""
        return len(vocabularies[CHARACTER])

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Encode characters [n, length] and the characters that follow [n, length]; see `Encoding.encode`."""
        characters, size = vocabularies[CHARACTER], self.length + 1
        numbered = ([BOS, *characters.encode(text), EOS] for text in texts(columns, self.text) if text)
        pieces = [numbers[start : start + size] for numbers in numbered for start in range(0, len(numbers), size)]
        return _next_tokens(characters, pieces, self.length)


def _next_tokens(vocabulary: Vocabulary, sequences: Sequence[Sequence[int]], length: int) -> Rows:
    """Return rows [n, length] of sequences of at most `length` + 1 numbers, and the numbers that follow."""
    rows = vocabulary.rows(sequences, length + 1)
    return usable_rows(Rows(rows[:, :-1], rows[:, 1:]))


def usable_rows(rows: Rows) -> Rows:
    """Select the rows that have a target.

    Args:
        rows: x and y [n, T], numbers of tokens.

    Returns:
        These rows, at least one.

    Raises:
        UnusableError: no row has a target.
    """
    some = (rows.y != PAD).any(axis=1)
    if not some.any():
        raise UnusableError("has no usable text")
    return Rows(rows.x[some], rows.y[some])
