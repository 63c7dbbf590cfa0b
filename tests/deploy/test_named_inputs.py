"""Nodes whose examples are several tensors by name: shapes and names travel, examples do not."""

import pytest
import torch

pytest.importorskip("flwr")

from flow_pl.deploy.command import deploy
from flow_pl.deploy.messages import FEATURES, NUMBERS, TEXTS
from flow_pl.deploy.nodes import NodeLeftOutWarning
from tests.deploy.grid import Grid, run_fit
from tests.named_inputs import write_npz
from tests.test_named_inputs import BACKBONE


@pytest.fixture
def grid(tmp_path, in_process, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_networked_mean.py").write_text(BACKBONE)
    path = write_npz(str(tmp_path / "sentences.npz"), clients=3)
    options = [f"--data.path={path}", "--data.cohort_size=3", "--model.backbone=my_networked_mean.Mean"]
    options += ["--data.feature_columns={input_ids: ids, attention_mask: mask}", "--data.new_client_fraction=0"]
    options += ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"]
    deploy(["-c", "task/array", "-c", "method/fedavg", "--out", str(tmp_path / "app"), *options])
    return Grid(tmp_path / "app" / "flow_app" / "config.yaml", tmp_path / "states")


def test_nodes_train_on_several_features(grid, tmp_path):
    cli = run_fit(grid, tmp_path)
    assert cli.trainer.global_step == 2
    assert list(cli.datamodule.example()) == ["attention_mask", "input_ids"]
    assert all(tensor.isfinite().all() for tensor in cli.model.state_dict().values())
    assert 0 <= cli.trainer.callback_metrics["val/generalized_accuracy"] <= 1
    assert torch.equal(cli.datamodule.example()["input_ids"], torch.ones(1, 4, dtype=torch.int64))


def renamed(reply):
    reply.config_records[TEXTS][FEATURES] = ["input_ids"]
    return reply


def reshaped(reply):
    reply.metric_records[NUMBERS]["feature_shape/attention_mask"] = [1, 5]
    return reply


def doubled(reply):
    reply.config_records[TEXTS][FEATURES] = ["input_ids", "input_ids"]
    return reply


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(
            renamed,
            r"its examples have shape input_ids \[4\] \(.*\) and .* attention_mask \[4\] \(.*\), input_ids \[4\] \(",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            reshaped,
            r"its examples have shape attention_mask \[5\] \(.*\), input_ids \[4\] \(tokens\) and",
            marks=pytest.mark.slow,
        ),
        (doubled, r"features is input_ids, input_ids, expected 1 to 16 names"),
    ],
)
def test_a_node_with_other_features_is_left_out(grid, tmp_path, spoil, said):
    grid.spoil = lambda client, kind, round_, reply: spoil(reply) if (client, kind) == (2, "query") else reply
    with pytest.warns(NodeLeftOutWarning, match=f"is left out: .*{said}"):
        run_fit(grid, tmp_path)
