"""Flower's ServerApp around the command."""

import pytest

pytest.importorskip("flwr")

from flwr.app import Context, RecordDict

from flow_pl.deploy.server_app import make_server_app


def test_a_failed_run_ends_with_an_exception_that_flower_reports(start, tmp_path, capsys):
    """Flower ends a run, and sends its log, on an Exception; on SystemExit it waits until heartbeats are missing."""
    grid = start("fedavg")
    grid.numbers = {}
    config = {"folder": str(tmp_path / "run"), "start-timeout": 0.0, "wait": 0.0}
    app = make_server_app(grid.config)
    with pytest.raises(Exception, match="0 nodes with a client are connected, expected at least 1") as failed:
        app(grid, Context(1, 1, {}, RecordDict(), config))
    assert failed.value.__suppress_context__
    assert "error: 0 nodes with a client are connected" in capsys.readouterr().err
