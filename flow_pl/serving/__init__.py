"""Serve: load a trained server model from its files, and personalize it for a client by its own examples."""

from flow_pl.serving.inputs import as_inputs, as_tensor
from flow_pl.serving.loading import instantiate, load
from flow_pl.serving.models import PersonalModel, ServedModel, ServerModel
from flow_pl.serving.personalization import load_kept, personalize

__all__ = [
    "PersonalModel",
    "ServedModel",
    "ServerModel",
    "as_inputs",
    "as_tensor",
    "instantiate",
    "load",
    "load_kept",
    "personalize",
]
