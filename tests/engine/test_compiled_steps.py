"""Steps compiled by `torch.compile`: the numbers of the others, up to rounding, or a clear refusal."""

import shutil
import warnings

import pytest
import torch

from flow_pl.engine import tracing
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg
from tests.support import PublishedFlow, bound, chunk, delta, flat, loop
from tests.test_module import data, module, trainer


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler is installed")
@pytest.mark.parametrize("clients", [pytest.param(1, marks=pytest.mark.extended), 3])
def test_compiled_steps_equal_the_others(clients, monkeypatch):
    """Router and global steps of Flow, with dropout, of a client alone too; the losses of all steps are kept."""
    calls, compiled = [], tracing.compiled
    monkeypatch.setattr("flow_pl.engine.trace_cache.compiled", lambda *args: calls.append(1) or compiled(*args))
    batch = chunk((16,) * clients, epochs=4)
    method = bound(PublishedFlow())
    assert method.router.exits.dropout.p > 0
    eager = loop(local_epochs=4, trace_after=None).train_clients(method, server_groups(method), batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a step cannot be compiled")
        found = loop(local_epochs=4, trace_after=0, compile_mode="default").train_clients(
            method, server_groups(method), batch
        )
    assert len(calls) == 3, "the local, the router's and the global step"
    for name in method.shared:
        torch.testing.assert_close(flat(delta(found)[name]), flat(delta(eager)[name]), atol=1e-5, rtol=1e-4)
    moved = ("local", "router", "global")
    torch.testing.assert_close(found.statistics.losses(moved), eager.statistics.losses(moved), atol=1e-4, rtol=1e-4)


@pytest.fixture
def no_compiler(tmp_path):
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))}):
        yield


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_refused_before_training(tmp_path, no_compiler):
    federated = module(FedAvg())
    federated.loop = FederatedLoop(1, batch_size=5, compile_mode="default")
    with pytest.raises(
        ConfigurationError, match=r"compile_mode is default, but nothing can be compiled on this machine"
    ):
        trainer().fit(federated, datamodule=data(tmp_path))


@pytest.mark.slow
def test_a_step_that_cannot_be_compiled_is_replayed_and_says_so(no_compiler):
    method, batch = bound(FedAvg()), chunk((12, 12))
    with pytest.warns(UserWarning, match="a step cannot be compiled and runs uncompiled"):
        found = loop(trace_after=0, compile_mode="default").train_clients(method, server_groups(method), batch)
    eager = loop(trace_after=None).train_clients(method, server_groups(method), batch)
    assert torch.equal(flat(delta(found)["global"]), flat(delta(eager)["global"]))


def test_compiled_steps_are_traced_ones():
    with pytest.raises(ConfigurationError, match="compile_mode is default and trace_after null"):
        FederatedLoop(compile_mode="default", trace_after=None)
