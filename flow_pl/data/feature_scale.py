"""Warn of features whose scale stops a network from learning."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn

from flow_pl.utils.inputs import Inputs

LARGEST_SCALE = 10.0
"""Root mean square of the features above which a warning is given; that of standardized features is 1."""


class FeatureScaleWarning(UserWarning):
    """The features are much larger than what a network learns from."""


def warn_of_large_features(inputs: Inputs) -> None:
    """Warn if features are so large that the first steps of training would saturate or break a network.

    Args:
        inputs: some examples as passed to a model, [n, ...]; tokens, which are whole numbers, have no scale.
    """
    for name, x in (inputs if isinstance(inputs, dict) else {"": inputs}).items():
        if not x.is_floating_point():
            continue
        scale = float(x.double().square().mean().sqrt())
        if scale > LARGEST_SCALE:
            largest = int(torch.argmax(x.double().abs().amax(0).flatten()))
            where = f", in feature {largest} counted from 0" if x[0].numel() > 1 else ""
            rank_zero_warn(
                f"the features{f' {name}' if name else ''} have a root mean square of {scale:.3g} (standardized ones: "
                f"1) and go up to {float(x.abs().max()):.4g}{where}: training may diverge, or learn only the commonest "
                "class. Standardize them before writing the file: subtract each feature's mean and divide by its "
                "standard deviation.",
                category=FeatureScaleWarning,
            )
