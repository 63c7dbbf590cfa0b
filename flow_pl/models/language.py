"""Language models of the Stack Overflow, Reddit and Shakespeare experiments, as sequences of blocks.

Inputs are token ids [N, T]; outputs [N, T, tokens] predict the next token at every position.
"""

from __future__ import annotations

from torch import nn

from flow_pl.models.recurrent import LSTM
from flow_pl.utils.validation import require_count


class NextWordLSTM(nn.Sequential):
    """Embedding, LSTM, projection and vocabulary: 4,053,428 parameters with the published sizes.

    Routed blocks: lstm, linear, head; the embedding table is shared.

    Args:
        num_tokens: words and special tokens (published: 10,000 + 4).
        embedding: width of the embedding (published: 96).
        hidden: width of the LSTM (published: 670).
        projection: width of the linear block after it (published: 96).
    """

    def __init__(self, num_tokens: int = 10_004, embedding: int = 96, hidden: int = 670, projection: int = 96) -> None:
        require_count(num_tokens=num_tokens, embedding=embedding, hidden=hidden, projection=projection)
        super().__init__()
        self.add_module("embedding", nn.Embedding(num_tokens, embedding))
        self.add_module("lstm", LSTM(embedding, hidden))
        self.add_module("linear", nn.Linear(hidden, projection))
        self.add_module("head", nn.Linear(projection, num_tokens))


class NextCharacterLSTM(nn.Sequential):
    """Embedding, two LSTM layers and vocabulary: 822,570 parameters with the published sizes.

    Routed blocks: lstm1, lstm2, head; the embedding table is shared.

    Args:
        num_tokens: characters and special tokens (published: 86 + 4).
        embedding: width of the embedding (published: 8).
        hidden: width of each LSTM layer (published: 256).
    """

    def __init__(self, num_tokens: int = 90, embedding: int = 8, hidden: int = 256) -> None:
        require_count(num_tokens=num_tokens, embedding=embedding, hidden=hidden)
        super().__init__()
        self.add_module("embedding", nn.Embedding(num_tokens, embedding))
        self.add_module("lstm1", LSTM(embedding, hidden))
        self.add_module("lstm2", LSTM(hidden, hidden))
        self.add_module("head", nn.Linear(hidden, num_tokens))
