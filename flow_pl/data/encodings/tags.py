"""Encode tag prediction: which of the most frequent tags a text has, given its words.

Source: tag prediction on Stack Overflow in TensorFlow Federated's simulations (github.com/google-research/federated,
`utils/datasets/stackoverflow_tag_prediction.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from flow_pl.data.encodings.encoding import Encoding, Rows, Vocabularies, VocabularySource
from flow_pl.data.encodings.text import WORDS
from flow_pl.data.encodings.values import Columns, texts
from flow_pl.data.encodings.vocabulary import OOV, PAD, SPECIAL
from flow_pl.data.store.client_checks import UnusableError
from flow_pl.utils.validation import require_count, require_some

TAGS = "tags"


class TagPrediction(Encoding):
    """Encodes texts as bags of words, and their tags as zeros and ones (multi-hot).

    A text's words are stored by number. On the device they become the share of each word among the text's words,
    including unknown ones: [..., vocab_size] in the order of the vocabulary; the shares sum to 1 if all words are
    known.

    Args:
        text: columns of the texts, which are joined.
        tags: column of the tags, separated by `|`.
        vocab_size: number of words in the vocabulary, each with its own column.
        num_tags: number of tags to predict; a text with only other tags has no label, and is kept.
        length: largest number of words of a text; the rest is cut.
        vocabulary: file with the words in the order of their columns, such as the published
            `stackoverflow.word_count`; null = the most frequent words of the training clients.
        tag_vocabulary: file with the tags, such as the published `stackoverflow.tag_count`; null = the most frequent
            tags of the training clients.
    """

    def __init__(
        self,
        text: tuple[str, ...] = ("tokens", "title"),
        tags: str = "tags",
        vocab_size: int = 10_000,
        num_tags: int = 500,
        length: int = 128,
        vocabulary: str | None = None,
        tag_vocabulary: str | None = None,
    ) -> None:
        require_count(vocab_size=vocab_size, num_tags=num_tags, length=length)
        require_some(text=text)
        self.text = tuple(text)
        self.tags = tags
        self.vocab_size = vocab_size
        self.num_tags = num_tags
        self.length = length
        self.vocabulary = vocabulary
        self.tag_vocabulary = tag_vocabulary

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of texts and tags."""
        return *self.text, self.tags

    def vocabularies(self) -> dict[str, VocabularySource]:
        """Return the sources of the vocabularies of words and tags."""
        return {
            WORDS: VocabularySource(self.vocab_size, path=self.vocabulary),
            TAGS: VocabularySource(self.num_tags, path=self.tag_vocabulary),
        }

    def tokens(self, columns: Columns) -> Iterable[tuple[str, Iterable[str]]]:
        """Yield the words of the texts and the tags."""
        for name in self.text:
            yield from ((WORDS, text.split()) for text in texts(columns, name))
        yield from ((TAGS, _tags(entry)) for entry in texts(columns, self.tags))

    def class_count(self, vocabularies: Vocabularies) -> int:
        """Return the configured number of tags, even if fewer occur."""
        return self.num_tags

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Encode words by number [n, length] and tags as zeros and ones [n, num_tags]; see `Encoding.encode`."""
        words, tags = vocabularies[WORDS], vocabularies[TAGS]
        joined = zip(*(texts(columns, name) for name in self.text), strict=True)
        numbers = [words.encode(" ".join(parts).split()[: self.length]) for parts in joined]
        labels = [tags.encode(_tags(entry)) for entry in texts(columns, self.tags)]
        kept = [row for row, found in enumerate(numbers) if found]
        if not kept:
            raise UnusableError("has no usable text")
        x = words.rows([numbers[row] for row in kept], self.length)
        y = np.zeros((len(kept), self.num_tags), dtype=np.int8)
        for target, row in zip(y, kept, strict=True):
            target[[number - SPECIAL for number in labels[row] if number != OOV]] = 1
        return Rows(x, y)

    def can_be_learned_from(self, rows: Rows) -> bool:
        """Return whether any word is in the vocabulary."""
        return bool((np.asarray(rows.x) >= SPECIAL).any())

    def unpack(self, x: Tensor) -> Tensor:
        """Turn numbers of words [..., length] into shares [..., vocab_size], float32."""
        numbers = x.long()
        known = (numbers >= SPECIAL).float()
        # words without a column add zero to the first column
        columns = (numbers - SPECIAL).clamp_min(0)
        counts = torch.zeros(*x.shape[:-1], self.vocab_size, device=x.device).scatter_add(-1, columns, known)
        return counts / (numbers != PAD).sum(-1, keepdim=True).clamp_min(1)


def _tags(entry: str) -> list[str]:
    return [tag for tag in entry.split("|") if tag]
