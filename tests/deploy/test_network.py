"""Real SuperLink and SuperNodes on this machine: the rounds are those of the simulation of the same clients."""

import time

import pytest
import torch

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

from flow_pl.cli import run
from flow_pl.deploy.command import deploy
from tests.deploy.network import Network, wait_for_file

METHODS = ("fedavg", "flow", "apfl")

SETTINGS = (
    "--data.init_args.num_clients=2",
    "--data.init_args.cohort_size=2",
    "--trainer.max_epochs=3",
    "--model.loop.init_args.batch_size=50",
    "--model.loop.init_args.local_epochs=1",
)


@pytest.mark.slow
@pytest.mark.deploy
def test_three_rounds_over_a_network_equal_the_simulation(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOW_PL_CACHE", str(tmp_path / "cache"))
    for method in METHODS:
        configs = ["-c", "task/digits", "-c", f"method/{method}"]
        deploy([*configs, "--out", str(tmp_path / method), *SETTINGS])
        run(["fit", *configs, *SETTINGS, f"--trainer.default_root_dir={tmp_path / 'simulated' / method}"])
    with Network(tmp_path / "network") as network:
        network.start_node(0)
        network.start_node(1)
        for method in METHODS:  # one after the other: a node answers one message at a time
            folder = tmp_path / "deployed" / method
            network.run(tmp_path / method, folder=str(folder), round_timeout=300.0, test=False)
            wait_for_rounds(folder / "checkpoints" / "last.ckpt", 3, 600, network)
    for method in METHODS:
        deployed, simulated = (
            torch.load(tmp_path / kind / method / "checkpoints" / "last.ckpt", weights_only=True)
            for kind in ("deployed", "simulated")
        )
        assert deployed["global_step"] == simulated["global_step"] == 3
        assert deployed["nodes"]["taken"] == {0: 2, 1: 2}
        for name, tensor in simulated["state_dict"].items():
            torch.testing.assert_close(deployed["state_dict"][name], tensor, rtol=0, atol=1e-6)
    # what clients of APFL keep lies on their nodes, and equals what the simulation keeps
    kept = simulated["client_states"]
    for number, row in enumerate(kept["rows"]):
        (path,) = (tmp_path / "network" / f"state-{number}").rglob("round-2.pt")
        groups = torch.load(path, weights_only=True)
        mine = torch.cat([groups[group][key].flatten() for group, key, _ in kept["layout"]])
        torch.testing.assert_close(mine, row, rtol=0, atol=1e-6)


def wait_for_rounds(path, rounds, seconds, network):
    end = time.monotonic() + seconds
    while True:
        wait_for_file(path, end - time.monotonic(), network)
        if torch.load(path, weights_only=True)["global_step"] == rounds:
            return
        assert time.monotonic() < end, network.log()[-3000:]
        time.sleep(1)
