"""Measure exported models: size, and processor time per instance; `python -m tools.benchmarks.export`.

FedAvg, and Flow with soft and with hard routing, with backbones of published sizes, personalized for a client with
random examples. The programs of a row run in turn, and each time is the median of the turns: processor time of all
threads, so work of other processes on the machine distorts it little.
"""

from __future__ import annotations

import argparse
import statistics
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
from flow_pl.serving import ServedModel, personalize
from flow_pl.tasks import Classification, NextToken
from tests.test_export import reloaded
from tools.export_table import RUNTIMES

Program = Callable[[Tensor], Tensor]

BACKBONES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: MLP(784, 10), (784,), 0),
    "cnn": (EMNISTCNN, (1, 28, 28), 0),
    "resnet18": (ResNet18, (3, 32, 32), 0),
    "next word": (NextWordLSTM, (20,), 10_004),
    "next character": (NextCharacterLSTM, (80,), 90),
}
"""Factory, shape of an instance, and number of tokens if it is a sequence."""


TURNS = 15
"""Number of times that each program of a row is timed."""

TURN = 0.02
"""Processor time of a turn in seconds, at least."""


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.export", description=__doc__)
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=BACKBONES)
    parser.add_argument("--formats", nargs="+", default=["torch_export", "onnx"], choices=RUNTIMES)
    parser.add_argument("--batch", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| backbone | model | plain torch, ms | " + " | ".join(f"{form}: MB, ms" for form in given.formats) + " |")
    print("|---|---|---|" + "---|" * len(given.formats), flush=True)
    for name in given.backbones:
        make, shape, tokens = BACKBONES[name]
        for kind in ("plain", "soft", "hard"):
            model, x = _personal(make, shape, tokens, kind)
            x = x[:1].expand(given.batch, *shape).contiguous()
            programs: list[Program] = [model]
            sizes = []
            for form in given.formats:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "model"
                    export_model(model, path, x, form, max_batch=given.batch if form == "executorch" else None)
                    programs.append(reloaded(str(path), form))
                    sizes.append(path.stat().st_size / 1e6)
            plain, *times = (1000 * seconds / given.batch for seconds in _medians(programs, x))
            cells = [f"{size:.2f}, {ms:.2f}" for size, ms in zip(sizes, times, strict=True)]
            print(f"| {name} | {kind} | {plain:.2f} | {' | '.join(cells)} |", flush=True)


def _personal(
    make: Callable[[], nn.Module], shape: tuple[int, ...], tokens: int, kind: str
) -> tuple[ServedModel, Tensor]:
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
def _medians(programs: list[Program], x: Tensor) -> list[float]:
    """Return the median processor time of a call of each program, in seconds; they take turns."""
    calls = []
    for program in programs:
        program(x)
        calls.append(max(1, round(TURN / _each(program, x, 2))))
    turns = [[_each(program, x, count) for program, count in zip(programs, calls, strict=True)] for _ in range(TURNS)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def _each(program: Program, x: Tensor, calls: int) -> float:
    """Return the processor time of a call in seconds, averaged over some calls."""
    start = time.process_time()
    for _ in range(calls):
        program(x)
    return max(time.process_time() - start, 1e-9) / calls


if __name__ == "__main__":
    main()
