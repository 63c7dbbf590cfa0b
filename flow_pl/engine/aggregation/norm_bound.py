"""The mean of updates whose norms are bounded."""

from __future__ import annotations

import torch
from torch import Tensor

from flow_pl.engine.aggregation.base import Aggregation
from flow_pl.engine.client_norms import group_norms, shrink_factors
from flow_pl.utils.groups import Groups
from flow_pl.utils.validation import require_positive


class NormBound(Aggregation):
    """Averages updates, weighted, after scaling larger ones down to a norm; no update is stored.

    Norm thresholding of Sun et al., Can You Really Backdoor Federated Learning? (2019), without noise: a bad client can
    still push, but no harder than `norm`.

    Args:
        norm: largest L2 norm of a client's whole update.

    Raises:
        ConfigurationError: `norm` is not positive.
    """

    def __init__(self, norm: float = 1.0) -> None:
        require_positive(norm=norm)
        self.norm = norm

    def factors(self, difference: Groups) -> Tensor | None:
        """See `Aggregation.factors`."""
        return shrink_factors(torch.linalg.vector_norm(group_norms(difference), dim=0), self.norm)
