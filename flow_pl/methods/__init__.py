"""Federated algorithms, one file each; each follows its paper's pseudocode.

The symbols w_g, w_l, w_p and psi are defined in docs/concepts.md.
"""

from flow_pl.methods.apfl import APFL
from flow_pl.methods.base import Method, Prediction
from flow_pl.methods.ditto import Ditto
from flow_pl.methods.fedala import FedALA
from flow_pl.methods.fedavg import FedAvg
from flow_pl.methods.fedbabu import FedBABU
from flow_pl.methods.fedbn import FedBN
from flow_pl.methods.fedcp import FedCP
from flow_pl.methods.feddbe import FedDBE
from flow_pl.methods.fedper import FedPer
from flow_pl.methods.fedprox import FedProx
from flow_pl.methods.fedrep import FedRep
from flow_pl.methods.fedrod import FedRoD
from flow_pl.methods.fine_tuning import FineTuning
from flow_pl.methods.flow import Flow
from flow_pl.methods.flow_evidence import EvidenceFlow
from flow_pl.methods.hypcluster import HypCluster
from flow_pl.methods.interpolation import Interpolation
from flow_pl.methods.knn_per import KNNPer
from flow_pl.methods.lg_fedavg import LGFedAvg
from flow_pl.methods.local import Local
from flow_pl.methods.lp_ft import LPFT
from flow_pl.methods.partialfed import PartialFed
from flow_pl.methods.per_fedavg import PerFedAvg
from flow_pl.methods.pfedme import PFedMe
from flow_pl.methods.scaffold import Scaffold
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step

__all__ = [
    "APFL",
    "LPFT",
    "Derive",
    "Ditto",
    "EvidenceFlow",
    "FedALA",
    "FedAvg",
    "FedBABU",
    "FedBN",
    "FedCP",
    "FedDBE",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedRoD",
    "FineTuning",
    "Flow",
    "HypCluster",
    "Interpolation",
    "KNNPer",
    "LGFedAvg",
    "Local",
    "Method",
    "Minibatch",
    "PFedMe",
    "PartialFed",
    "PerFedAvg",
    "Phase",
    "Prediction",
    "Scaffold",
    "Step",
]
