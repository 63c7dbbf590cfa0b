"""Fixtures of deployed runs without a network."""

import pytest


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    """Let nodes run in this process."""
    pytest.importorskip("flwr")
    from flwr.supercore.task_identity import TaskIdentity

    monkeypatch.setenv("FLOW_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("flow_pl.deploy.nodes.PAUSE", 0.01)
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower's own process would have set them
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def start(tmp_path, in_process):
    """Write an app on the digits with three clients, and return a grid to its nodes."""
    from flow_pl.deploy.command import deploy
    from tests.deploy.grid import SETTINGS, Grid

    def make(method="apfl", *settings):
        deploy(["-c", "task/digits", "-c", f"method/{method}", "--out", str(tmp_path / "app"), *SETTINGS, *settings])
        return Grid(tmp_path / "app" / "flow_app" / "config.yaml", tmp_path / "states")

    return make
