"""Choose a router that suits a backbone, if the user names none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flow_pl.models.feature_router import FeatureRouter
from flow_pl.models.recurrent import Recurrent
from flow_pl.models.routers import InstanceRouter, Router, SequenceRouter


def fitting_router(blocks: Sequence[nn.Module], backbone: nn.Module | None = None) -> Router:
    """Create a router: per token for recurrent blocks, else per instance, by features if there is an embedding table.

    Args:
        blocks: the routed blocks, given by the method.
        backbone: backbone of the blocks, given by the method.
    """
    if any(isinstance(block, Recurrent) for block in blocks):
        return SequenceRouter(blocks)
    tables = (nn.Embedding, nn.EmbeddingBag)
    takes_ids = backbone is not None and any(isinstance(module, tables) for module in backbone.modules())
    return FeatureRouter(blocks) if takes_ids else InstanceRouter(blocks)
