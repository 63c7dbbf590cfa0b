"""Tasks: define the loss and what counts as correct, for one client's examples.

Written for one client without a client axis; the federated loop vectorizes it.
"""

from flow_pl.tasks.base import Objective
from flow_pl.tasks.classification import Classification
from flow_pl.tasks.multi_label import MultiLabel
from flow_pl.tasks.next_token import NextToken
from flow_pl.tasks.regression import Regression

__all__ = ["Classification", "MultiLabel", "NextToken", "Objective", "Regression"]
