"""Measure exported models: size, and time per instance on one CPU thread; `python -m tools.benchmarks.export`.

Flow with soft and with hard routing, with backbones of published sizes, personalized for a client with random examples.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from flow_pl import FederatedLoop, FederatedModule
from flow_pl.export import export_model
from flow_pl.methods import FedAvg, Flow, Method
from flow_pl.models import EMNISTCNN, MLP, NextCharacterLSTM, NextWordLSTM, ResNet18
from flow_pl.models.routers import SequenceRouter
from flow_pl.serving import personalize
from flow_pl.tasks import Classification, NextToken
from tests.test_export import reloaded

BACKBONES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: MLP(784, 10), (784,), 0),
    "cnn": (EMNISTCNN, (1, 28, 28), 0),
    "resnet18": (ResNet18, (3, 32, 32), 0),
    "next word": (NextWordLSTM, (20,), 10_004),
    "next character": (NextCharacterLSTM, (80,), 90),
}
"""Factory, shape of an instance, and number of tokens if it is a sequence."""


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.export", description=__doc__)
    parser.add_argument("--backbones", nargs="+", default=["mlp", "cnn", "resnet18"], choices=BACKBONES)
    parser.add_argument("--formats", nargs="+", default=["torch_export", "onnx"])
    parser.add_argument("--batch", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| backbone | model | plain torch, ms | " + " | ".join(f"{form}: MB, ms" for form in given.formats) + " |")
    print("|---|---|---|" + "---|" * len(given.formats))
    for name in given.backbones:
        make, shape, tokens = BACKBONES[name]
        for kind in ("plain", "soft", "hard"):
            model, x = _personal(make, shape, tokens, kind)
            x = x[:1].expand(given.batch, *shape).contiguous()
            cells = [f"{1000 * _seconds(model, x) / given.batch:.2f}"]
            for form in given.formats:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "model"
                    export_model(model, path, x, form, max_batch=given.batch if form == "executorch" else None)
                    program = reloaded(str(path), form)
                    ms = 1000 * _seconds(program, x) / given.batch
                    cells.append(f"{path.stat().st_size / 1e6:.2f}, {ms:.2f}")
            print(f"| {name} | {kind} | {' | '.join(cells)} |", flush=True)


def _personal(
    make: Callable[[], nn.Module], shape: tuple[int, ...], tokens: int, kind: str
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    torch.manual_seed(0)
    backbone = make()
    x = torch.randint(4, tokens, (4, *shape)) if tokens else torch.rand(4, *shape)
    y = torch.randint(4, tokens, (4, *shape)) if tokens else torch.arange(4)
    method: Method = FedAvg()
    if kind != "plain":
        router = {"router": SequenceRouter} if tokens else {}
        method = Flow(1, routing=kind, **router)  # type: ignore[arg-type]
    task = NextToken() if tokens else Classification()
    return personalize(FederatedModule(backbone, method, FederatedLoop(1, batch_size=4), task), x, y), x


@torch.no_grad()
def _seconds(program: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the seconds of the fastest of some calls, after two warm-up calls."""
    times = []
    while len(times) < 5 or (sum(times) < 2 and len(times) < 200):
        start = time.perf_counter()
        program(x)
        times.append(time.perf_counter() - start)
    return min(times[2:])


if __name__ == "__main__":
    main()
