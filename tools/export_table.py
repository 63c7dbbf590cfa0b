"""Exported models beside ours, for every method and backbone: `python -m tools.export_table`.

A client's model of each method is trained for a moment on random examples, written in each format, and run by that
format's runtime on batches of one, two and four instances. Each cell has the largest difference of the outputs from
ours, relative for outputs above 1; "refused" where the model cannot be personalized or exported, with the messages
below the table. The backbones are small copies of the published ones: the same layers at lower widths.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

from flow_pl import FederatedLoop, FederatedModule
from flow_pl.errors import FlowError
from flow_pl.export import FORMATS, export_model
from flow_pl.methods import FedBN, Flow
from flow_pl.models.routers import SequenceRouter
from flow_pl.serving import personalize
from flow_pl.tasks import Classification, NextToken
from tests import test_serving
from tests.test_export import BACKBONES, reloaded

METHODS: dict[str, Any] = {**test_serving.METHODS, "fedbn": FedBN}
SHOWN = {"mlp": "MLP", "cnn": "CNN", "resnet": "ResNet-18", "words": "word LSTM", "characters": "character LSTM"}
RUNTIMES = {"torch_export": "torch", "onnx": "onnxruntime", "executorch": "executorch"}
"""The package that runs each format."""


def main() -> None:
    """Print a Markdown table for each format whose runtime is installed."""
    parser = argparse.ArgumentParser(prog="python -m tools.export_table", description=__doc__)
    found = [form for form, package in RUNTIMES.items() if importlib.util.find_spec(package) is not None]
    parser.add_argument("--formats", nargs="+", default=found, choices=[form for form in FORMATS if form in RUNTIMES])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--backbones", nargs="+", default=list(SHOWN), choices=SHOWN)
    given = parser.parse_args()
    torch.set_num_threads(1)
    refused: dict[str, list[str]] = {}
    print("| method | " + " | ".join(SHOWN[name] for name in given.backbones) + " |")
    print("|---|" + "---|" * len(given.backbones), flush=True)
    for method in given.methods:
        cells = []
        for backbone in given.backbones:
            try:
                cells.append(
                    ", ".join(f"{each:.0e}" if each else "0" for each in differences(method, backbone, given.formats))
                )
            except FlowError as error:
                cells.append("refused")
                refused.setdefault(str(error), []).append(f"{method} with {SHOWN[backbone]}")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    print(f"\nIn each cell: {', '.join(given.formats)}.")
    for message, where in refused.items():
        print(f"\n{', '.join(where)}: {message}")


def differences(method: str, backbone: str, formats: list[str]) -> list[float]:
    """The largest difference of the outputs of each format from ours."""
    make, examples = BACKBONES[backbone]
    x, y = examples()
    torch.manual_seed(0)
    tokens = y.ndim > 1
    made = METHODS[method]()
    if tokens and isinstance(made, Flow):
        made = Flow(
            router=lambda blocks: SequenceRouter(blocks, (5,), (4,)),
            **{name: getattr(made, name) for name in ("routing", "split", "route_by")},
        )
    task = NextToken() if tokens else Classification()
    loop = FederatedLoop(1, None, 4, lambda p: torch.optim.SGD(p, lr=0.05))
    model = personalize(FederatedModule(make(), made, loop, task), x, y)
    found = []
    for form in formats:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            export_model(model, path, x, form)
            program = reloaded(str(path), form)
            pairs = [(program(x[:size]), model(x[:size])) for size in (1, 2, len(x))]
        found.append(max(float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in pairs))
    return found


if __name__ == "__main__":
    main()
