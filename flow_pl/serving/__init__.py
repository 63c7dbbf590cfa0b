"""Serve: load a trained server model from its files, and personalize it for a client by its own examples."""

from flow_pl.serving.inputs import as_inputs, as_tensor
from flow_pl.serving.loading import instantiate, load
from flow_pl.serving.models import PersonalModel, ServedModel, ServerModel
from flow_pl.serving.personalization import load_kept, personalize
from flow_pl.serving.run_format import RunFormat, load_format

__all__ = [
    "PersonalModel",
    "RunFormat",
    "ServedModel",
    "ServerModel",
    "as_inputs",
    "as_tensor",
    "instantiate",
    "load",
    "load_format",
    "load_kept",
    "personalize",
]
