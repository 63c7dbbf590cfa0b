"""Export a model to a file that needs no flow_pl: for torch, ONNX Runtime or ExecuTorch, or only its weights."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from flow_pl.errors import ConfigurationError, brief
from flow_pl.serving import ServedModel, as_inputs
from flow_pl.utils.files import write_bytes
from flow_pl.utils.inputs import Inputs, in_order, leaves, map_inputs, names_of, take
from flow_pl.utils.optional import import_optional
from flow_pl.utils.validation import given, require_choice, require_count
from flow_pl.version import __version__

LARGEST_BATCH = 2**20
"""Largest batch of a program whose runtime allocates memory as needed."""
PLANNED_BATCH = 16
"""Default largest batch for ExecuTorch, which plans the memory for it in advance."""
LARGEST_ONNX = 2**31 - 1
"""Largest size of a protobuf file in bytes."""
TOLERANCE = 1e-5
"""Largest difference of outputs between a program and its model, relative for outputs larger than 1."""


def export_model(
    model: ServedModel,
    path: str | os.PathLike[str],
    example: Tensor | ArrayLike | Mapping[str, Tensor | ArrayLike],
    format: str = "torch_export",  # noqa: A002  # the name used by these libraries
    max_batch: int | None = None,
) -> None:
    """Write a model as a file that needs no flow_pl.

    A program takes instances x [batch, ...] like the model (`FederatedDataModule.transform`) and returns its outputs,
    those of a regression in the unit of the labels. Several inputs by name are one mapping, or separate inputs in ONNX.
    The batch size is free; all other axes are fixed to those of the example, including the length of a sequence. Hard
    routing computes both copies of a block and selects one of them.

    Args:
        model: the model, from `personalize` or a `ServerModel`.
        path: the file; replaced if it exists.
        example: some instances [n, ...], for their shape and type; a mapping if the model takes several inputs.
        format: "torch_export" (`torch.export.load`), "onnx" (input "x", or one per input name; output "outputs"),
            "executorch" (method "forward"), or "safetensors": only the weights, by the backbone's own names for a
            single model, otherwise as group.name.
        max_batch: largest batch of a program; None for 16 in ExecuTorch, which plans its memory for it, and for
            practically no limit elsewhere.

    Raises:
        ConfigurationError: the format is unknown, a package is missing, or the model cannot be exported.
        FlowError: the file cannot be written.
    """
    check_format(format)
    require_count(**given(max_batch=max_batch))
    model, x = copy.deepcopy(model).cpu(), in_order(map_inputs(torch.Tensor.cpu, as_inputs("example", example)))
    for part in leaves(x):
        if not part.ndim or not len(part):
            shape = list(part.shape)
            raise ConfigurationError(f"the example has shape {shape}, expected at least one instance [n, ...].")
    write_bytes(Path(path), FORMATS[format](model, take(x, slice(1)), max_batch))


def check_format(format: str) -> None:  # noqa: A002
    """Check that a format is known and its packages are installed.

    Raises:
        ConfigurationError: the format is unknown or a package is missing.
    """
    require_choice(tuple(FORMATS), format=format)
    for package, extra in PACKAGES[format].items():
        import_optional(package, extra, f"the format {format}")


def _torch_export(model: ServedModel, x: Inputs, max_batch: int | None) -> bytes:
    file = io.BytesIO()
    torch.export.save(_program(model, x, max_batch or LARGEST_BATCH), file)
    return file.getvalue()


def _onnx(model: ServedModel, x: Inputs, max_batch: int | None) -> bytes:
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    if size > LARGEST_ONNX:
        raise ConfigurationError(
            f"the model has {size:,} bytes of weights, an ONNX file can hold {LARGEST_ONNX:,}: use torch_export."
        )
    program = _program(model, x, max_batch or LARGEST_BATCH)
    with _refused("onnx"), _quiet():
        names = list(names_of(x) or ["x"])
        made = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=names, output_names=["outputs"])
        assert made is not None
        proto = made.model_proto
    axes = [value.type.tensor_type.shape.dim[0] for value in (*proto.graph.input, *proto.graph.output)]
    symbol = axes[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == symbol:
                axis.dim_param = "batch"
    content: bytes = proto.SerializeToString()
    return content


def _executorch(model: ServedModel, x: Inputs, max_batch: int | None) -> bytes:
    program = _program(model, x, max_batch or PLANNED_BATCH)
    exir = import_optional("executorch.exir", "executorch", "the format executorch")
    xnnpack = import_optional(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch", "the format executorch"
    )
    # votes are counted in float64, which XNNPACK lacks, so use ExecuTorch's own kernels
    doubles = any(getattr(node.meta.get("val"), "dtype", None) is torch.float64 for node in program.graph.nodes)
    with _refused("executorch"), _quiet():
        edge = exir.to_edge_transform_and_lower(
            program,
            partitioner=None if doubles else [xnnpack.XnnpackPartitioner()],
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),  # otherwise it rejects float64
        )
        content: bytes = bytes(edge.to_executorch().buffer)
    return content


def _safetensors(model: ServedModel, x: Inputs, max_batch: int | None) -> bytes:
    library = import_optional("safetensors.torch", "export", "the format safetensors")
    content: bytes = library.save(model.weights(), metadata={"flow_pl": __version__, **_described(model)})
    return content


def _described(model: ServedModel) -> dict[str, str]:
    """Describe the method for readers of the weights, as texts."""
    method = model.method
    settings = {key: value for key, value in vars(method).items() if isinstance(value, bool | int | float | str)}
    return {
        "model": type(model).__name__,
        "method": type(method).__name__,
        "backbone": type(method.model.backbone).__name__,
        "settings": json.dumps(settings, sort_keys=True),
    }


FORMATS: dict[str, Callable[[ServedModel, Inputs, int | None], bytes]] = {
    "torch_export": _torch_export,
    "onnx": _onnx,
    "executorch": _executorch,
    "safetensors": _safetensors,
}
"""Functions that create the content of a file: (model, one instance [1, ...], largest batch)."""

PACKAGES: dict[str, dict[str, str]] = {
    "torch_export": {},
    "onnx": {"onnx": "export", "onnxscript": "export"},
    "executorch": {"executorch.exir": "executorch"},
    "safetensors": {"safetensors": "export"},
}
"""Packages that a format needs, each with its group of optional dependencies."""


class _InUnit(nn.Module):
    """Returns a model's outputs in the unit of the labels.

    Args:
        model: the model, of a task with real values.
    """

    def __init__(self, model: ServedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Inputs) -> Tensor:
        """Compute the outputs for instances x [N, ...]."""
        return self.model.method.objective.in_unit(self.model(x))


def _program(served: ServedModel, x: Inputs, largest: int) -> ExportedProgram:
    """Export the model to a program of tensor operations, and check it against the model for another batch size."""
    model = _InUnit(served) if served.method.objective.real_valued else served
    batch = {0: Dim("batch", min=1, max=largest)} if largest > 1 else None
    shapes = (map_inputs(lambda t: batch, x),)
    two = _repeated(x, min(2, largest))
    with torch.no_grad(), _quiet():
        expected = model(two)  # a model that cannot be computed fails here, with its own error
        with _refused("a program"):
            program = torch.export.export(model, (two,), dynamic_shapes=shapes, strict=False)
            # with a batch of three, a program that has fixed the batch to two differs
            found = program.module()(_repeated(x, min(3, largest)))[: len(expected)]
    if not torch.allclose(found.double(), expected.double(), rtol=TOLERANCE, atol=TOLERANCE):
        raise ConfigurationError(
            "the exported program gives other outputs than the model: a block of the backbone draws random numbers, "
            "keeps state or mixes the instances of a batch. Use safetensors, or another block."
        )
    return program


def _repeated(x: Inputs, times: int) -> Inputs:
    """Repeat one instance [1, ...] several times."""
    return map_inputs(lambda t: t.expand(times, *t.shape[1:]).contiguous(), x)


@contextmanager
def _refused(form: str) -> Iterator[None]:
    """Turn a library's error on a model that it does not support into one message."""
    try:
        yield
    except Exception as error:
        raise ConfigurationError(
            f"the model cannot be exported as {form} ({type(error).__name__}: {brief(error)}): the Python code "
            "of a block must not depend on the values or the number of instances (use `x.shape[0]`, not `len(x)`). "
            "safetensors can store the weights of any model."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of libraries to their own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


__all__ = ["FORMATS", "check_format", "export_model"]
