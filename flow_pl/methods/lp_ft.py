"""LP-FT: Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution (ICLR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.methods.steps import Derive, Phase, Step
from flow_pl.utils.validation import require_count


class LPFT(BodyAndHead):
    """Trains as FedAvg; a client fine-tunes w_g's head first, then the whole model, so features are not distorted.

    Sends w_g. Stateless.

    Args:
        head_blocks: how many of the last blocks with parameters are the head, or the names of the submodules
            that are.
        head_epochs: epochs of the head alone, before those of the whole model, on top of the budget; 0 is FineTuning.
        personal_lr_scale: factor on the client optimizer's learning rate for both.

    Raises:
        ConfigurationError: a value is out of range.
    """

    server_is_trained: ClassVar[bool] = True

    def __init__(
        self, head_blocks: int | Sequence[str] = 1, head_epochs: int = 1, personal_lr_scale: float = 1.0
    ) -> None:
        super().__init__(head_blocks, personal_lr_scale)
        require_count(0, head_epochs=head_epochs)
        self.head_epochs = head_epochs

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train w_g on all the data."""
        return (Phase("all", (self.train_step("global"),)),)

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Fine-tune the head on w_g's body, then the whole model."""
        head = Step("head", lambda groups, minibatch: self.loss(minibatch, groups["body"], groups["head"]))
        probing = (Phase("all", (self.personal_step(head),), self.head_epochs),) if self.head_epochs else ()
        return (*probing, *self.train_jointly(self.personal_step(self.train_step("model"))))
