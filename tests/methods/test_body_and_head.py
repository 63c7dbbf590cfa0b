"""FedRep and LG-FedAvg: what clients send, what they keep, and what predicts."""

import pytest
import torch
from torch.nn import functional as F

from flow_pl.engine.server_round import sent_parameters, server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedAvg, FedRep, LGFedAvg
from flow_pl.models import LogisticRegression
from tests.methods.helpers import TASKS, client_of, copied, filled, next_server, on_task
from tests.models import test_sequences
from tests.support import CLASSES, FEATURES, bound, chunk, delta, flat, loop, select, sgd, snapshot, train_alone
from tests.test_module import data, fitted, module, trainer
from tests.test_module import parameters as module_parameters

SIZES = (11, 6, 1)
BODY, HEAD = 0, 3
"""Blocks of the backbone of these tests."""


def parameters(backbone):
    return {name: p.detach() for name, p in backbone.named_parameters()}


def parts(model):
    """Parameters of body and head."""
    body, head = ({k: p for k, p in model.items() if k.startswith(f"{block}.")} for block in (BODY, HEAD))
    return body, head


def train_block(backbone, block, batch, client, epochs, first=0):
    """Plain training of one block, the other frozen."""
    optimizer = lambda _: sgd(list(backbone[block].parameters()))  # noqa: E731
    return train_alone(backbone, batch, client, epochs, 4, optimizer=optimizer, first=first)


def check_losses(result, batch, client, generalized, personalized):
    """An evaluation against models of one client."""
    for found, model in ((result.generalized_loss, generalized), (result.personalized_loss, personalized)):
        loss = F.cross_entropy(model(batch.heldout.x[client]), batch.heldout.y[client], reduction="sum")
        torch.testing.assert_close(found[client], loss, rtol=1e-4, atol=1e-5)


def test_fedrep_trains_the_head_then_the_body_and_keeps_the_head():
    """Two rounds, the second from the kept heads, against loops with the other part out of the optimizer."""
    method, batch, kept = bound(FedRep(head_epochs=1)), chunk(SIZES), None
    heads = [parts(snapshot(method)["global"])[1]] * len(SIZES)
    for server in (snapshot(method), next_server(snapshot(method))):
        body = parts(server["global"])[0]
        expected = torch.zeros_like(flat(body))
        update = loop().train_clients(method, server, batch, kept=kept)
        kept = copied(update.kept)
        for client, n in enumerate(SIZES):
            alone = train_block(filled({**body, **heads[client]}), HEAD, batch, client, 1, first=2)
            trained, heads[client] = parts(parameters(train_block(alone, BODY, batch, client, 2)))
            expected += n * (flat(trained) - flat(body))
            torch.testing.assert_close(client_of(kept["head"], client), heads[client], atol=1e-5, rtol=1e-5)
        assert update.difference["global"].keys() == body.keys()
        torch.testing.assert_close(flat(delta(update)["global"]), expected, atol=1e-5, rtol=1e-5)


def test_fedrep_predicts_with_the_servers_body_under_the_clients_head():
    method, batch = bound(FedRep()), chunk(SIZES, heldout=20)
    kept = loop(local_epochs=1).train_clients(method, snapshot(method), batch).kept
    server = next_server(snapshot(method))
    for state in (None, kept):
        result = evaluate_clients(loop(), method, server, batch, None if state is None else copied(state))
        for client in range(len(SIZES)):
            body, head = parts(server["global"])
            head = head if state is None else client_of(state["head"], client)
            tuned = train_block(filled({**body, **head}), HEAD, batch, client, 2)
            check_losses(result, batch, client, filled(server["global"]), tuned)


def test_fedrep_without_head_epochs_is_fedavg_with_a_frozen_head():
    """FedBABU: the body moves as FedAvg's with a learning rate of 0 for the head."""

    def frozen_head(params):
        body, head = params[:2], params[2:]
        settings = {"momentum": 0.9, "weight_decay": 0.01}
        return torch.optim.SGD([{"params": body}, {"params": head, "lr": 0.0}], lr=0.1, **settings)

    batch, fedrep, fedavg = chunk(SIZES), bound(FedRep(head_epochs=0)), bound(FedAvg())
    update = loop().train_clients(fedrep, server_groups(fedrep), batch)
    expected = delta(loop(client_optimizer=frozen_head).train_clients(fedavg, server_groups(fedavg), batch))["global"]
    sent = delta(update)["global"]
    torch.testing.assert_close(sent, {name: expected[name] for name in sent})
    assert flat(parts(expected)[1]).abs().sum() == 0


def test_lg_fedavg_trains_everything_sends_the_head_and_keeps_the_body():
    """Two rounds, the second from the kept bodies, against loops over the whole model."""
    method, batch, kept = bound(LGFedAvg()), chunk(SIZES), None
    bodies = [parts(snapshot(method)["global"])[0]] * len(SIZES)
    for server in (snapshot(method), next_server(snapshot(method))):
        head = parts(server["global"])[1]
        expected = torch.zeros_like(flat(head))
        update = loop().train_clients(method, server, batch, kept=kept)
        kept = copied(update.kept)
        for client, n in enumerate(SIZES):
            alone = train_alone(filled({**bodies[client], **head}), batch, client, 2, 4)
            bodies[client], trained = parts(parameters(alone))
            expected += n * (flat(trained) - flat(head))
            torch.testing.assert_close(client_of(kept["body"], client), bodies[client], atol=1e-5, rtol=1e-5)
        assert update.difference["global"].keys() == head.keys()
        torch.testing.assert_close(flat(delta(update)["global"]), expected, atol=1e-5, rtol=1e-5)


def test_lg_fedavg_predicts_with_the_clients_body_and_the_head_trained_on():
    method, batch = bound(LGFedAvg()), chunk(SIZES, heldout=20)
    kept = loop(local_epochs=1, personal_epochs=2).train_clients(method, snapshot(method), batch).kept
    server = next_server(snapshot(method))
    for state in (None, kept):
        result = evaluate_clients(
            loop(local_epochs=1, personal_epochs=2), method, server, batch, None if state is None else copied(state)
        )
        for client in range(len(SIZES)):
            body, head = parts(server["global"])
            body = body if state is None else client_of(state["body"], client)
            tuned = train_alone(filled({**body, **head}), batch, client, 2, 4)
            check_losses(result, batch, client, filled(server["global"]), tuned)


def test_lg_fedavg_in_a_clients_first_round_is_fedavg():
    batch, local_global, fedavg = chunk(SIZES), bound(LGFedAvg()), bound(FedAvg())
    update = loop().train_clients(local_global, server_groups(local_global), batch)
    groups, _ = loop().run(fedavg, server_groups(fedavg), batch, training=True)
    whole = groups.groups["global"]
    for name, p in update.kept["body"].items():
        assert torch.equal(p, whole[name])
    for name, p in update.difference["global"].items():
        assert torch.equal(p, whole[name] - server_groups(fedavg)["global"][name])


def test_lg_fedavg_may_start_from_a_model_of_fedavg(tmp_path):
    """Two rounds that are FedAvg's; in the third the head alone is sent, and bodies are kept."""
    fedavg, _ = fitted(tmp_path, FedAvg(), rounds=2)
    pretrained, run = fitted(tmp_path, LGFedAvg(1, pretrain_rounds=2), rounds=2)
    assert torch.equal(module_parameters(pretrained), module_parameters(fedavg))
    assert run.callback_metrics["train/clients_with_state"] == 0
    gone_on, run = fitted(tmp_path, LGFedAvg(1, pretrain_rounds=2), rounds=3)
    before, after = dict(fedavg.backbone.named_parameters()), dict(gone_on.backbone.named_parameters())
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head"}
    assert run.callback_metrics["train/clients_with_state"] == 6
    assert run.callback_metrics["val/personalized_accuracy"] != run.callback_metrics["val/generalized_accuracy"]


def test_a_run_killed_in_pretraining_ends_as_one_that_was_not(tmp_path):
    settings = {"trainer_settings": {"enable_checkpointing": True, "default_root_dir": str(tmp_path)}}
    whole, _ = fitted(tmp_path, LGFedAvg(1, pretrain_rounds=2), rounds=3)
    _, run = fitted(tmp_path, LGFedAvg(1, pretrain_rounds=2), rounds=1, **settings)
    run.save_checkpoint(tmp_path / "one.ckpt")
    resumed, again = module(LGFedAvg(1, pretrain_rounds=2)), trainer(3)
    again.fit(resumed, datamodule=data(tmp_path / "cache"), ckpt_path=str(tmp_path / "one.ckpt"))
    assert torch.equal(module_parameters(resumed), module_parameters(whole))


@pytest.mark.parametrize("make", [FedRep, LGFedAvg])
def test_clients_of_a_chunk_are_those_of_chunks_of_one(make):
    """Kept and sent, from the server's values and from kept ones; the server is never written."""
    method, batch = bound(make()), chunk(SIZES, epochs=3)
    server, before = server_groups(method), snapshot(method)
    kept = loop(local_epochs=3).train_clients(method, server, batch).kept
    for state in (None, kept):
        together = loop(local_epochs=3).train_clients(
            method, server, batch, kept=None if state is None else copied(state)
        )
        for i in range(len(SIZES)):
            own = (
                None
                if state is None
                else {g: {k: p[i : i + 1].clone() for k, p in s.items()} for g, s in state.items()}
            )
            alone = loop(local_epochs=3).train_clients(method, server, select(batch, [i]), kept=own)
            for ours, theirs in ((alone.kept, together.kept), (alone.difference, together.difference)):
                for name, group in ours.items():
                    torch.testing.assert_close(client_of(group, 0), client_of(theirs[name], i), atol=1e-5, rtol=1e-4)
    assert torch.equal(flat(server["global"]), flat(before["global"]))


@pytest.mark.parametrize(
    ("make", "sent", "stays"),
    [(FedRep, ["embedding", "lstm"], ["linear", "head"]), (LGFedAvg, ["linear", "head"], ["embedding", "lstm"])],
)
def test_language_models_are_cut_behind_any_block(make, sent, stays):
    """Embedding tables belong to the body."""
    method, batch = test_sequences.bound(make(head_blocks=2)), test_sequences.batch((6, 5), 3)
    server = server_groups(method)
    assert {name.split(".")[0] for name in sent_parameters(method)["global"]} == set(sent)
    update = loop(local_epochs=3).train_clients(method, server, batch)
    (kept,) = update.kept.values()
    assert {name.split(".")[0] for name in kept} == set(stays)
    initial = server["global"]
    assert all((p - initial[name]).abs().sum() > 0 for name, p in kept.items())
    assert all(p.abs().sum() > 0 for p in update.difference["global"].values())
    assert evaluate_clients(loop(local_epochs=3), method, server, batch, copied(update.kept)).personalized.shape == (2,)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("make", [FedRep, LGFedAvg])
def test_other_tasks_are_trained(make, task):
    update, result = on_task(make(), task)
    assert all(p.isfinite().all() for p in update.difference["global"].values())
    assert (result.personalized_loss < result.generalized_loss).all()


@pytest.mark.parametrize("make", [FedRep, LGFedAvg])
def test_bad_settings_are_refused(make):
    with pytest.raises(ConfigurationError, match="head_blocks is 0, expected a whole number of 1 or more"):
        make(head_blocks=0)
    with pytest.raises(ConfigurationError, match="head_blocks is 2, expected 1 to 1"):
        bound(make(head_blocks=2))
    with pytest.raises(ConfigurationError, match=rf"{make.__name__} .* LogisticRegression has a single block .* Ditto"):
        bound(make(), LogisticRegression(FEATURES, CLASSES))


def test_head_epochs_are_none_or_more():
    with pytest.raises(ConfigurationError, match="head_epochs is -1, expected a whole number of 0 or more"):
        FedRep(head_epochs=-1)
