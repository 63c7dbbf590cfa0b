"""Split a client's examples into pieces, for computations over all of them."""

from __future__ import annotations

from collections.abc import Iterator

from flow_pl.methods.steps import Minibatch
from flow_pl.utils.inputs import take

ROWS = 64
"""Number of examples in a piece. A language model's outputs for 1,000 sentences of 20 words at once take 0.8 GB."""


def pieces(examples: Minibatch) -> Iterator[Minibatch]:
    """Split examples [N, ...] into pieces of `ROWS`; one empty piece if there are none."""
    for start in range(0, max(1, examples.mask.shape[0]), ROWS):
        cut = slice(start, start + ROWS)
        yield Minibatch(take(examples.x, cut), examples.y[cut], examples.mask[cut])
