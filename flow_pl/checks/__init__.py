"""Find errors before training starts."""

from flow_pl.checks.backbone import check_backbone
from flow_pl.checks.configuration import check_checkpoint, check_class_paths
from flow_pl.checks.fit import (
    check_fit,
    check_gradients,
    check_label_moments,
    check_label_range,
    check_several_labels,
    check_trainer,
)
from flow_pl.checks.server_optimizer import check_server_optimizer

__all__ = [
    "check_backbone",
    "check_checkpoint",
    "check_class_paths",
    "check_fit",
    "check_gradients",
    "check_label_moments",
    "check_label_range",
    "check_server_optimizer",
    "check_several_labels",
    "check_trainer",
]
