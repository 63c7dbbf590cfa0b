"""Client-level differential privacy: clipping, noise and accounting of the server's rounds."""

from flow_pl.engine.privacy.accounting import Accountant, Ledger, Sampling
from flow_pl.engine.privacy.banded import BandedMatrixFactorization
from flow_pl.engine.privacy.checks import check_private
from flow_pl.engine.privacy.clipping import AdaptiveClipping, Clipping, FixedClipping
from flow_pl.engine.privacy.mechanism import GaussianMechanism, PrivacyBudgetError

__all__ = [
    "Accountant",
    "AdaptiveClipping",
    "BandedMatrixFactorization",
    "Clipping",
    "FixedClipping",
    "GaussianMechanism",
    "Ledger",
    "PrivacyBudgetError",
    "Sampling",
    "check_private",
]
