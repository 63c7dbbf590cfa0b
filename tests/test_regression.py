"""Regression from a file to predictions: mean squared error and R² against plain computations."""

import csv
import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import nn

from flow_pl import methods
from flow_pl.__main__ import main
from flow_pl.checks import check_fit
from flow_pl.cli import run
from flow_pl.data import ArrayData
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.evaluation.metrics import ClientAccuracy
from flow_pl.export import export_model
from flow_pl.methods import Method
from flow_pl.module import FederatedModule
from flow_pl.serving import personalize
from flow_pl.tasks import Regression
from tests.support import FEATURES, chunk, loop

MEAN, STD = 100.0, 20.0


def test_loss_and_score_are_those_of_the_plain_formulas():
    outputs, y = torch.tensor([[0.5], [-1.0], [2.0]]), torch.tensor([112.0, 70.0, torch.nan])
    task, mask = Regression(MEAN, STD), torch.tensor([True, True, True])
    values = np.array([110.0, 80.0])
    assert task.predictions(outputs)[:2].tolist() == values.tolist()
    assert task.counted(y, mask).tolist() == [True, True, False]
    assert task.losses(outputs, y).tolist() == [4.0, 100.0, 0.0]
    torch.testing.assert_close(task.loss(outputs, y, mask), torch.tensor(52.0 / STD**2))
    # R² as others define it, where the labels' own mean and deviation are those of the task
    y = torch.tensor([80.0, 120.0])
    expected = r2_score(y.numpy(), values)
    assert Regression(MEAN, STD).correct(outputs[:2], y).mean().item() == pytest.approx(expected)


def test_a_prediction_that_is_not_a_number_is_never_right():
    y = torch.tensor([112.0, 70.0, torch.nan, 90.0])
    outputs = torch.tensor([torch.nan, -1.0, torch.nan, torch.inf]).requires_grad_()
    task, mask = Regression(MEAN, STD), torch.ones(4)
    assert task.losses(outputs, y).nan_to_num(-1).tolist()[:3] == [-1.0, 100.0, 0.0]
    assert task.losses(outputs, y)[3].isinf()
    assert task.correct(outputs, y).isnan().tolist() == [True, False, False, True]
    assert task.loss(outputs, y, mask).isnan()
    # errors of -2 and 10 over the deviation of 20; without a label, nothing reaches the gradient
    outputs = torch.tensor([0.5, -1.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(task.loss(outputs, y[:3], mask[:3]), outputs)
    torch.testing.assert_close(gradient, torch.tensor([-0.1, 0.5, 0.0]))


def test_a_personal_model_that_diverged_makes_the_score_undefined():
    """The labels of the first client are so far off that its personal model overflows."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1))
    method = methods.FineTuning().bind(backbone, Regression())
    check_fit(method, torch.zeros(1, FEATURES), 1, (), real_valued=True)
    batch = chunk((7, 5))
    y = batch.train.x.sum(-1).where(batch.train.mask, 0.0)
    y[0] = 1e30
    batch = replace(batch, train=replace(batch.train, y=y), heldout=replace(batch.heldout, y=batch.heldout.x.sum(-1)))
    found = evaluate_clients(loop(), method, server_groups(method), batch)
    assert found.personalized.isfinite().tolist() == found.personalized_loss.isfinite().tolist() == [False, True]
    assert found.generalized.isfinite().all()
    metric = ClientAccuracy()
    metric.update(found.count, found.personalized, found.personalized_loss, found.loss_count)
    assert all(metric.compute()[name].isnan() for name in ("accuracy", "loss", "accuracy_p10"))


def test_settings_that_are_not_those_of_the_labels_are_refused_with_the_right_ones():
    Regression(101.0, 21.0).check_labels(MEAN, STD)
    with pytest.raises(ConfigurationError, match=r"mean 100 and standard deviation 20.*objective.init_args.std to 20"):
        Regression().check_labels(MEAN, STD)
    with pytest.raises(ConfigurationError, match="std is 0"):
        Regression(std=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_an_exported_program_gives_values_in_the_unit_of_the_labels(tmp_path, routing):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1))
    module = FederatedModule(backbone, methods.Flow(routing=routing), objective=Regression(MEAN, STD))
    x = torch.randn(6, FEATURES)
    model = personalize(module, x, torch.randn(6) * STD + MEAN)
    export_model(model, tmp_path / "model.pt2", x)
    found = torch.export.load(tmp_path / "model.pt2").module()(x)
    torch.testing.assert_close(found, MEAN + STD * model(x))


METHODS = [
    name
    for name, value in vars(methods).items()
    if inspect.isclass(value)
    and issubclass(value, Method)
    and not inspect.isabstract(value)
    and name != "FedBN"  # asks for batch normalization
]
NEED_CLASSES = {"EvidenceFlow", "FedRoD", "KNNPer"}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_takes_real_values_or_says_that_it_needs_classes(name):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1))
    if name in NEED_CLASSES:
        with pytest.raises(ConfigurationError, match="the task Regression has a real value for an example"):
            getattr(methods, name)().bind(backbone, Regression())
        return
    method = getattr(methods, name)().bind(backbone, Regression())
    check_fit(method, torch.zeros(1, FEATURES), 1, (), real_valued=True)
    batch = chunk((7, 5), epochs=15)  # Local takes 30

    def real(part):
        return replace(part, y=part.x.sum(-1).where(part.mask, 0.0))

    batch = replace(batch, train=real(batch.train), heldout=real(batch.heldout))
    update = loop().train_clients(method, server_groups(method), batch)
    moved = [p for group in update.difference.values() for p in group.values()]
    assert all(p.isfinite().all() for p in moved)
    found = evaluate_clients(loop(), method, server_groups(method), batch)
    # a score of each example is 1 minus its squared error, as the deviation is 1
    torch.testing.assert_close(found.personalized, found.count - found.personalized_loss)
    torch.testing.assert_close(found.generalized, found.count - found.generalized_loss)


def write(folder, unlabelled=True):
    """Labels that are linear in the features but for an offset of each client; some rows have none."""
    random = np.random.default_rng(0)
    client = np.repeat(np.arange(40), 20)
    x = random.normal(size=(len(client), 4)).astype(np.float32)
    y = MEAN + STD * (x @ [0.5, -0.5, 0.2, 0.1] + random.normal(size=40)[client] * 0.7)
    if unlabelled:
        y[::10] = np.nan
    np.savez(folder / "values.npz", x=x, y=y, client=client)
    with (folder / "values.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["client", "y", *"abcd"])
        labels = ["" if np.isnan(label) else repr(float(label)) for label in y]
        rows.writerows([c, label, *v] for c, label, v in zip(client, labels, x.tolist(), strict=True))
    return float(np.nanmean(y)), float(np.nanstd(y))


def test_examples_of_a_client_have_their_values(tmp_path):
    """Not values that are cut to whole numbers."""
    write(tmp_path)
    data = ArrayData(str(tmp_path / "values.npz"), labels="values", cache_dir=str(tmp_path), test_fraction=0.3)
    data.prepare_data()
    data.setup()
    stored = np.load(tmp_path / "values.npz")
    parts = [data.examples(3, part)[1] for part in ("train", "val", "test", "unlabelled")]
    assert all(part.dtype == torch.float32 for part in parts)
    y = stored["y"][stored["client"] == int(data.client_name(3))].astype(np.float32)
    np.testing.assert_array_equal(np.sort(torch.cat(parts).numpy()), np.sort(y))


def options(folder, mean, std, name="values.npz"):
    return [
        *("-c", "task/array", "-c", "method/fine_tuning", "--data.path", str(folder / name), "--data.labels", "values"),
        *("--model.objective", "Regression", "--model.objective.mean", str(mean), "--model.objective.std", str(std)),
        *("--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "2", "--trainer.accelerator", "cpu"),
        *("--trainer.default_root_dir", str(folder / "run"), "--data.cache_dir", str(folder / "cache")),
        *("--trainer.callbacks+=ResultsTable", "--trainer.callbacks.path", "results.csv"),
    ]


@pytest.mark.parametrize("name", [pytest.param("values.npz", marks=pytest.mark.slow), "values.csv"])
def test_from_a_file_to_predictions(tmp_path, capsys, caplog, name):
    mean, std = write(tmp_path)
    settings = options(tmp_path, mean, std, name)
    run(["fit", *settings])
    run(["test", *settings])
    said = capsys.readouterr().out + caplog.text
    assert "real-valued labels" in said
    assert "accuracy: R²" in said
    run(["predict", *settings])
    with (tmp_path / "run" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row["label"] == "" for row in rows), "rows without a label are predicted"
    error = [
        (float(row["prediction"]) - float(row["label"])) ** 2
        for row in rows
        if row["label"] and row["population"] == "seen"
    ]
    with (tmp_path / "run" / "results.csv").open() as file:
        results = {row["metric"]: row["seen"] for row in csv.DictReader(file)}
    assert float(results["personalized_loss"]) == pytest.approx(np.mean(error), rel=1e-4)
    assert float(results["personalized_accuracy"]) == pytest.approx(1 - np.mean(error) / std**2, rel=1e-3)
    assert float(results["personalized_accuracy"]) > float(results["generalized_accuracy"])


def test_the_examples_of_a_client_have_real_values(tmp_path):
    """Those that a model is personalized with; a row without a label has none here either."""
    write(tmp_path)
    data = ArrayData(str(tmp_path / "values.npz"), labels="values", cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup()
    client = int(data.federation.seen[0])
    x, y = data.examples(client, "train")
    of_client = np.load(tmp_path / "values.npz")
    stored = {row.tobytes(): label for row, label in zip(of_client["x"], of_client["y"], strict=True)}
    expected = [stored[row.tobytes()] for row in x.numpy()]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float32))
    assert data.examples(client, "unlabelled")[1].isnan().all()


def test_what_does_not_fit_is_said_in_one_line(tmp_path):
    mean, std = write(tmp_path)
    settings = options(tmp_path, mean, std)
    cases = {
        ("--data.labels", "classes"): "For real values, set labels to values",
        ("--model.objective", "Classification"): "the labels of the data are real values, which Classification",
        ("--model.objective.std", "1.0"): "the training labels have mean",
        ("--model.method", "KNNPer"): "neighbours vote for a class",
        ("--model.attack", "LabelFlip"): "LabelFlip changes an instance's class",
    }
    for change, expected in cases.items():
        with pytest.raises((ConfigurationError, DataError), match=expected):
            run(["fit", *settings, *change])


def test_real_values_have_no_number_of_classes():
    with pytest.raises(ConfigurationError, match="num_classes is 3, but labels is values"):
        ArrayData("values.npz", labels="values", num_classes=3)


@pytest.mark.slow
def test_a_comparison_names_the_accuracy(tmp_path):
    mean, std = write(tmp_path)
    main([
        *("compare", "-c", "task/array", "--methods", "method/fedavg", "--out", str(tmp_path / "out"), "--jobs", "1"),
        *("--data.path", str(tmp_path / "values.csv"), "--data.labels", "values", "--model.objective", "Regression"),
        *("--model.objective.mean", str(mean), "--model.objective.std", str(std), "--trainer.max_epochs", "1"),
        *("--trainer.accelerator", "cpu", "--data.cache_dir", str(tmp_path / "cache")),
    ])  # fmt: skip
    assert "Test R² in percent" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert json.loads(next(tmp_path.glob("out/runs/*/*/results.json")).read_text())["accuracy"] == "R²"
