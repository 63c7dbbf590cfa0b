"""Examples that are a mapping, through whole runs: workers, chunks, resuming, serving and exported files."""

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from flow_pl import FederatedLoop, FederatedModule
from flow_pl.__main__ import main
from flow_pl.callbacks import GeneralizedAccuracy, PersonalizedAccuracy, RoutingReport
from flow_pl.data import ArrayData
from flow_pl.engine.attacks import Backdoor
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.export import export_model
from flow_pl.methods import Ditto, EvidenceFlow, FedAvg, FineTuning, Flow
from flow_pl.models import MLP
from flow_pl.models.feature_router import FeatureRouter
from flow_pl.models.routers import InstanceRouter
from flow_pl.serving import ServerModel, personalize
from flow_pl.utils.inputs import take
from tests.named_inputs import CLASSES, LENGTH, TOKENS, encoder, tokens, write_npz

X = take(tokens((9,), seed=4, longest=9), 0)
Y = X["input_ids"][:, 0] % CLASSES


def data(folder, **settings):
    file = folder / "sentences.npz"
    if not file.exists():
        write_npz(str(file), clients=10)
    columns = {"input_ids": "ids", "attention_mask": "mask"}
    settings = {"cohort_size": 4, "chunk_size": 2, "feature_columns": columns, **settings}
    return ArrayData(str(file), cache_dir=str(folder / "cache"), **settings)


def flow(**settings):
    return Flow(router=lambda blocks: FeatureRouter(blocks, hidden=(4,)), **settings)


def module(method=None, backbone=None, trace_after=50, **settings):
    torch.manual_seed(3)
    loop = FederatedLoop(1, None, 5, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), trace_after=trace_after)
    return FederatedModule(encoder() if backbone is None else backbone, method or flow(), loop, **settings)


def trainer(rounds=2, callbacks=(), **settings):
    return lightning.Trainer(
        max_epochs=rounds, accelerator="cpu", devices=1, inference_mode=False, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, logger=False,
        **{"enable_checkpointing": False, **settings},
        callbacks=[GeneralizedAccuracy(), PersonalizedAccuracy(), *callbacks],
    )  # fmt: skip


def fitted(folder, method=None, rounds=2, trainer_settings=None, ckpt_path=None, trace_after=50, **settings):
    lightning.seed_everything(0, verbose=False)
    model, run = module(method, trace_after=trace_after), trainer(rounds, **(trainer_settings or {}))
    run.fit(model, datamodule=data(folder, **settings), ckpt_path=ckpt_path)
    return model, run


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.server.parameters()])


@pytest.mark.parametrize(
    ("change", "trace_after"),
    [
        pytest.param({"chunk_size": 1}, 3, marks=pytest.mark.slow),
        ({"chunk_size": "auto"}, 50),
        pytest.param({"num_workers": 2}, 50, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_chunks_and_workers_change_nothing(tmp_path, change, trace_after):
    reference, run = fitted(tmp_path, trace_after=trace_after)
    other, other_run = fitted(tmp_path, trace_after=trace_after, **change)
    assert parameters(reference).isfinite().all()
    torch.testing.assert_close(parameters(other), parameters(reference), atol=1e-5, rtol=1e-4)
    for name in ("val/generalized_accuracy", "val/personalized_accuracy"):
        assert other_run.callback_metrics[name] == run.callback_metrics[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "trace_after"), [(flow, 50), pytest.param(Ditto, 3, marks=pytest.mark.slow)], ids=["flow", "ditto"]
)
def test_a_resumed_run_is_bit_identical(tmp_path, method, trace_after):
    whole, _ = fitted(tmp_path, method(), rounds=3, trace_after=trace_after)
    saved = {"callbacks": [ModelCheckpoint(tmp_path / "ckpt", save_last=True)], "enable_checkpointing": True}
    fitted(tmp_path, method(), rounds=2, trainer_settings=saved, trace_after=trace_after)
    last = str(tmp_path / "ckpt" / "last.ckpt")
    resumed, run = fitted(tmp_path, method(), rounds=3, ckpt_path=last, trace_after=trace_after)
    assert run.global_step == 3
    assert torch.equal(parameters(resumed), parameters(whole))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"backbone": MLP(LENGTH, CLASSES)},
            r"several features by name \(attention_mask .*which MLP cannot take",
        ),
        ({"method": Flow(router=InstanceRouter)}, r"the router is InstanceRouter, .* use FeatureRouter"),
        ({"attack": Backdoor()}, r"Backdoor puts its trigger into one tensor"),
    ],
    ids=["backbone", "router", "attack"],
)
def test_what_takes_one_tensor_is_refused_before_training(tmp_path, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        trainer(1).fit(module(**settings), datamodule=data(tmp_path))


class KeptReport(RoutingReport):
    """Keeps what it has counted."""

    def on_test_epoch_end(self, trainer, pl_module):
        self.counted = list(self._routes)
        super().on_test_epoch_end(trainer, pl_module)


@pytest.mark.slow
def test_a_report_shows_the_token_ids(tmp_path):
    report, source = KeptReport(), data(tmp_path, new_client_fraction=0)
    trainer(1, [report], default_root_dir=tmp_path).test(module(), datamodule=source, verbose=False)
    (routes,), federation = report.counted, source.federation
    assert routes.decisions == int(federation.test_sizes.sum())
    for instance in (*routes.most_local, *routes.most_global):
        ids = federation.store.read(instance.client).x["input_ids"][federation.split(instance.client).test]
        assert instance.x.tolist() in ids.tolist()
    assert (tmp_path / "report.html").exists()


KINDS = {"plain": FineTuning, "soft": flow, "hard": lambda: flow(routing="hard"), "votes": EvidenceFlow}


def served(kind):
    """A client's model; of mappings as lists and arrays too."""
    model = module(KINDS[kind]())
    x = {"input_ids": X["input_ids"].tolist(), "attention_mask": X["attention_mask"].numpy()}
    return personalize(model, x, Y.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_a_personalized_model_is_that_of_an_evaluation(kind):
    model = served(kind)
    assert model(X).shape == (9, CLASSES)
    one = torch.cat([model(take(X, slice(i, i + 1))) for i in range(9)])
    torch.testing.assert_close(model(X), one, atol=1e-5, rtol=1e-4)
    # the order of the names is of no matter
    torch.testing.assert_close(model(dict(reversed(X.items()))), model(X))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch_export", "onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_takes_the_features_by_name(tmp_path, kind, form):
    model, path = served(kind), tmp_path / "model"
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    export_model(model, path, X, form)
    if form == "onnx":
        session = runtime.InferenceSession(path.read_bytes())
        assert [entry.name for entry in session.get_inputs()] == sorted(X)
        found = torch.from_numpy(session.run(["outputs"], {name: t.numpy() for name, t in X.items()})[0])
    else:
        program = torch.export.load(path).module()
        found = program(dict(sorted(X.items())))
    torch.testing.assert_close(found, model(X), atol=1e-5, rtol=1e-4)


def test_the_server_s_model_is_exported_too(tmp_path):
    model = ServerModel(module(FedAvg()))
    export_model(model, tmp_path / "model", X)
    torch.testing.assert_close(torch.export.load(tmp_path / "model").module()(X), model(X))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            {**X, "attention_mask": X["attention_mask"][:5]},
            DataError,
            r"x has shape \{'attention_mask': \[5, 4\], 'in",
        ),
        ({**X, "attention_mask": ["a"] * 9}, DataError, r"x\['attention_mask'\] has values of type <U1"),
        ({"input_ids": X["input_ids"]}, ConfigurationError, r"it uses 'attention_mask', which is not among them"),
        (
            X["input_ids"],
            ConfigurationError,
            r"Sequential takes a mapping with 'attention_mask', the data has a single",
        ),
        ({}, DataError, r"x has shape \{\}"),
    ],
    ids=["lengths", "texts", "missing", "one tensor", "none"],
)
def test_examples_that_do_not_fit_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        personalize(module(FineTuning()), x, Y)


BACKBONE = f"""
from torch import nn

class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding({TOKENS}, 5)
        self.head = nn.Linear(5, {CLASSES})

    def forward(self, x):
        mask = x["attention_mask"].float().unsqueeze(-1)
        return self.head((self.table(x["input_ids"]) * mask).sum(1) / mask.sum(1))
"""


@pytest.mark.slow
def test_the_commands_take_arrays_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FLOW_PL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my_mean_of_tokens.py").write_text(BACKBONE)
    write_npz("sentences.npz", clients=10)
    columns = "--data.feature_columns={input_ids: ids, attention_mask: mask}"
    options = ["--data.path=sentences.npz", columns, "--data.cohort_size=3", "--model.backbone=my_mean_of_tokens.Mean"]
    small = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.check_val_every_n_epoch=1"]
    main(["fit", "-c", "task/array", "-c", "method/fine_tuning", *options, *small])
    (checkpoint,) = tmp_path.glob("runs/**/best.ckpt")
    np.savez("client.npz", **{name: t.numpy() for name, t in X.items()}, y=Y.numpy(), client=["ann"] * len(Y))
    given = ["--config", str(checkpoint.parents[1] / "config.yaml"), "--ckpt_path", str(checkpoint), *options]
    main(["personalize", *given, "--data", "client.npz", "--out", "client.pt2"])
    takes = "takes attention_mask [batch, 4] of torch.float32, input_ids [batch, 4] of torch.int64."
    assert takes in capsys.readouterr().out
    main(["export", *given, "--out", "server.pt2"])
    as_stored = {**X, "attention_mask": X["attention_mask"].float()}  # truth values, in the run's file
    for name in ("client.pt2", "server.pt2"):
        assert torch.export.load(name).module()(as_stored).shape == (9, CLASSES)
