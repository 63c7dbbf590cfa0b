"""Compare the memory of clients side by side with adapters of a frozen text encoder, or copies of all its weights.

python -m tools.adapter_memory FOLDER

Trains 1 and 6 clients of 8 texts for a step of Adam, each in its own process. Prints the memory per client, which
follows from the shapes, and the peak of the process, which depends on torch and the machine.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from itertools import product

import torch

from flow_pl.checks import check_fit
from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.server_round import server_groups
from flow_pl.methods import FedAvg, Flow
from flow_pl.models import LoRA, TextEncoder
from flow_pl.tasks import Classification

TEXTS, TOKENS, CLASSES = 8, 24, 4


def clients(count: int) -> ClientBatch:
    """Create clients with random texts."""
    x, y = torch.randint(1, 1000, (count, TEXTS, TOKENS)), torch.randint(CLASSES, (count, TEXTS))
    mask = torch.ones(count, TEXTS, dtype=torch.bool)
    order = torch.arange(TEXTS).expand(count, 2, TEXTS).clone()
    part, numbers = torch.full((count, TEXTS), 3, dtype=torch.uint8), torch.arange(count)
    return ClientBatch(numbers, Examples(x, y, mask, (TEXTS,) * count), part, order, None, 0, numbers)


def measure(folder: str, kind: str, name: str, count: int) -> None:
    """Train clients and print a line of the results."""
    torch.set_num_threads(1)
    backbone = TextEncoder(folder, CLASSES, dropout=0.0)
    method = {"FedAvg": FedAvg, "Flow": Flow}[name]().bind(
        LoRA(backbone) if kind == "adapters" else backbone, Classification()
    )
    check_fit(method, torch.ones(1, TOKENS, dtype=torch.long), CLASSES)
    loop = FederatedLoop(1, batch_size=TEXTS, client_optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
    groups, _ = loop.run(method, server_groups(method), clients(count), training=True)
    own = sum(4 * p[0].numel() for group in groups.stacked for p in groups.groups[group].values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    print(f"{name}, {kind}: {own / 1e6:.2f} MB for each client; {peak:.0f} MiB at most with {count}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the encoder")
    parser.add_argument("run", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        measure(given.folder, given.run[0], given.run[1], int(given.run[2]))
    else:
        for case in product(("adapters", "everything"), ("FedAvg", "Flow"), "16"):
            subprocess.run([sys.executable, "-m", "tools.adapter_memory", given.folder, *case], check=True)
