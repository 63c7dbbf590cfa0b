"""Count losses, steps and rows of a round, kept on the device until the round ends."""

from __future__ import annotations

import torch
from torch import Tensor


class TrainingStatistics:
    """Sums over the clients of a chunk, or of a round.

    Args:
        device: device on which losses are summed; nothing is read from it before the round ends.

    Attributes:
        skipped: client steps skipped because a gradient was not finite (16-mixed).
        rows: rows computed, padding included.
        examples: real examples among them.
    """

    def __init__(self, device: torch.device) -> None:
        self._losses: dict[str, list[Tensor]] = {}
        self.skipped = torch.zeros((), device=device)
        self.rows = 0
        self.examples = 0

    def add_step(self, group: str, losses: Tensor, keep: Tensor | None) -> None:
        """Count a step of the active clients.

        Args:
            group: the updated group.
            losses: [A] losses of the minibatch.
            keep: [A] bool, False for clients that skipped the step; None if none could.
        """
        if keep is not None:
            losses = losses.where(keep, torch.nan)  # left out of the mean
            self.skipped += (~keep).sum()
        self._losses.setdefault(group, []).append(losses)

    def add_rows(self, rows: int, examples: int) -> None:
        """Count the rows of a phase."""
        self.rows += rows
        self.examples += examples

    def losses(self, groups: tuple[str, ...]) -> Tensor:
        """Return, for each group, sum and number of its finite losses over clients and steps: [groups, 2]."""
        sums = []
        for group in groups:
            parts = self._losses.get(group)
            losses = torch.cat(parts) if parts else self.skipped.new_zeros(0)
            finite = losses.isfinite()
            sums.append(torch.stack([losses.where(finite, 0).sum(), finite.sum().to(losses.dtype)]))
        return torch.stack(sums) if sums else self.skipped.new_zeros(0, 2)
