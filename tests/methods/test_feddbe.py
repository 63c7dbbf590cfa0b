"""FedDBE against a plain loop of one client."""

import lightning
import pytest
import torch
from torch.nn import functional as F

from flow_pl.engine.compression import RESIDUAL, TopK
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedDBE
from tests.engine.test_rejected_clients import EmptyRounds
from tests.methods.helpers import TASKS, client_of, copied, filled, next_server, on_task
from tests.support import bound, chunk, flat, loop, minibatches, sgd, snapshot, train_alone
from tests.test_module import data, fitted, module, trainer

SIZES = (11, 6)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
HEAD = 3


def train(w, z, batch, client, consensus):
    """Two epochs on w and z."""
    steps = sgd([*w.parameters(), z])
    for rows in minibatches(batch, client, 2, 4):
        features = w[:HEAD](batch.train.x[client, rows])
        loss = F.cross_entropy(w[HEAD](features + z), batch.train.y[client, rows])
        loss = loss + 3.0 / 2 * (features.mean(0) - consensus).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()


def test_the_first_round_is_fedavg_and_collects_the_mean_features():
    method, batch = bound(FedDBE()), chunk(SIZES)
    server = snapshot(method)
    update = loop().train_clients(method.in_round(0, server), server, batch)
    assert not update.kept["bias"]["representation_bias"].any()
    for client in range(len(SIZES)):
        w = train_alone(filled(server["global"]), batch, client, 2, 4)
        sent = {name: p.detach() - server["global"][name] for name, p in w.named_parameters()}
        torch.testing.assert_close(client_of(update.difference["global"], client), sent, **CLOSE)
        real = batch.train.mask[client].bool()
        mean = w[:HEAD](batch.train.x[client][real]).detach().mean(0)
        torch.testing.assert_close(update.difference["consensus"]["mean"][client], mean, **CLOSE)


def test_two_rounds_and_evaluations_are_those_of_a_plain_loop():
    method, batch, kept = bound(FedDBE(regularization=3.0)), chunk(SIZES, heldout=20), None
    width = len(snapshot(method)["consensus"]["mean"])
    vectors = [torch.zeros(width)] * len(SIZES)
    for server in (next_server(snapshot(method)), next_server(next_server(snapshot(method)))):
        result = evaluate_clients(loop(), method, server, batch, None if kept is None else copied(kept))
        update = loop().train_clients(method.in_round(1, server), server, batch, kept=kept)
        kept = copied(update.kept)
        assert list(update.difference) == ["global"]
        for client in range(len(SIZES)):
            w, z = filled(server["global"]), vectors[client].clone().requires_grad_()
            train(w, z, batch, client, server["consensus"]["mean"])
            outputs = w[HEAD](w[:HEAD](batch.heldout.x[client]) + z)
            loss = F.cross_entropy(outputs, batch.heldout.y[client], reduction="sum")
            torch.testing.assert_close(result.personalized_loss[client], loss, **CLOSE)
            plain = filled(server["global"])(batch.heldout.x[client])
            loss = F.cross_entropy(plain, batch.heldout.y[client], reduction="sum")
            torch.testing.assert_close(result.generalized_loss[client], loss, **CLOSE)
            vectors[client] = z.detach()
            torch.testing.assert_close(kept["bias"]["representation_bias"][client], vectors[client], **CLOSE)
            sent = {name: p.detach() - server["global"][name] for name, p in w.named_parameters()}
            torch.testing.assert_close(client_of(update.difference["global"], client), sent, **CLOSE)


def test_the_consensus_is_collected_while_there_is_none():
    method = bound(FedDBE())
    server = snapshot(method)
    assert list(method.in_round(5, server).shared) == ["global", "consensus"]
    server["consensus"]["mean"][0] = 1.0
    assert method.in_round(0, server) is method


@pytest.mark.filterwarnings("ignore::flow_pl.module.EmptyRoundWarning")
def test_a_run_whose_first_round_has_no_client_collects_the_consensus_in_the_next(tmp_path):
    """Also when it is resumed in between; and not a second time in the last round."""

    def fit(rounds, checkpoint=None):
        lightning.seed_everything(0, verbose=False)
        model, run = module(FedDBE()), trainer(rounds, limit_val_batches=0)
        clients = data(tmp_path / "cache")
        clients.availability = EmptyRounds((0,))
        run.fit(model, datamodule=clients, ckpt_path=checkpoint)
        return model, run

    first, run = fit(1)
    run.save_checkpoint(tmp_path / "one.ckpt")
    second, _ = fit(2)
    whole, _ = fit(3)
    resumed, _ = fit(3, str(tmp_path / "one.ckpt"))
    assert not first.server["consensus"].mean.any()
    assert second.server["consensus"].mean.any()
    assert torch.equal(second.server["consensus"].mean, whole.server["consensus"].mean)
    assert torch.equal(flat(dict(resumed.server.named_parameters())), flat(dict(whole.server.named_parameters())))


def test_what_is_sent_once_is_compressed_without_error_feedback(tmp_path):
    """The consensus has no residual: a client keeps its vector, and what its model's update left out."""
    model, _ = fitted(tmp_path, FedDBE(), rounds=2, module_settings={"compression": TopK(0.5)})
    layout = {name for name, _, _ in model.states.state_dict(str)["layout"]}
    assert layout == {"bias", RESIDUAL}
    assert model.server["consensus"].mean.any()


def test_other_tasks():
    for task in TASKS:
        update, result = on_task(FedDBE(), task)
        assert update.finite()
        assert (result.personalized_loss < result.generalized_loss).all()


def test_bad_settings_are_refused():
    with pytest.raises(ConfigurationError, match="regularization is -1"):
        FedDBE(-1.0)
