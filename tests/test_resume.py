"""A run that is resumed or tested with other settings: what is refused, what is told, what is followed."""

import warnings

import pytest
import torch

from flow_pl.errors import ConfigurationError
from flow_pl.resume import ChangedSettingWarning, check_class_names, check_features
from tests.test_cli import config, fails  # noqa: F401 (a fixture)
from tests.test_runs import command, weights


@pytest.mark.parametrize(
    "option",
    [
        "split_seed=1",
        "num_clients=9",
        *(
            pytest.param(option, marks=pytest.mark.slow)
            for option in ("test_fraction=0.3", "val_fraction=0.3", "new_client_fraction=0.5", "mean_log_size=2.5")
        ),
    ],
)
def test_a_fit_does_not_go_on_with_other_rows_or_another_split(config, finished, capsys, option):  # noqa: F811
    before = weights(finished / "checkpoints" / "last.ckpt")
    code, error = fails(capsys, "fit", "--config", config, "--ckpt_path", "last", f"--data.{option}")
    assert code == 1
    assert "the checkpoint was trained on another" in error
    assert "test examples would be used for training" in error
    name, value = option.split("=")
    if name not in ("num_clients", "mean_log_size"):
        assert f"data.{name} is {value}, was" in error
    assert torch.equal(weights(finished / "checkpoints" / "last.ckpt"), before)


@pytest.mark.parametrize(
    "name", ["test", *(pytest.param(name, marks=pytest.mark.slow) for name in ("validate", "predict"))]
)
def test_examples_that_were_trained_on_are_not_tested(config, finished, capsys, name):  # noqa: F811
    code, error = fails(capsys, name, "--config", config, "--data.split_seed=1")
    assert code == 1
    assert "data.split_seed is 1, was 0" in error
    assert "would include some of its training examples" in error


def test_other_data_are_tested_with_a_word_of_warning(config, finished):  # noqa: F811
    with pytest.warns(ChangedSettingWarning, match="was trained on other data"):
        command(config, "test", "--data.num_clients=9")


def test_a_fit_goes_on_where_only_speed_or_the_number_of_rounds_is_another(config, finished):  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter("error", ChangedSettingWarning)
        command(config, "fit", "--ckpt_path=last", "--trainer.max_epochs=3", "--data.chunk_size=1")


SGD = ["--model.server_optimizer=torch.optim.SGD", "--model.server_optimizer.momentum=0.5"]


def test_another_server_optimizer_or_scheduler_is_refused(config, finished, capsys):  # noqa: F811
    adam = ["--model.server_optimizer=torch.optim.Adam", "--model.server_optimizer.lr=0.1"]
    schedule = ["--model.server_scheduler=torch.optim.lr_scheduler.StepLR", "--model.server_scheduler.step_size=1"]
    for role, options in (("optimizer", adam), ("scheduler", schedule)):
        code, error = fails(capsys, "fit", "--config", config, "--ckpt_path=last", *options)
        assert code == 1
        assert f"model.server_{role} is torch.optim." in error
        assert "but the checkpoint was trained with" in error


def test_another_learning_rate_of_the_server_is_used_and_told(config):  # noqa: F811
    command(config, "fit", *SGD, "--model.server_optimizer.lr=1.0")
    more = ["--ckpt_path=last", "--trainer.max_epochs=3", "--model.server_optimizer.lr=0.25"]
    with pytest.warns(ChangedSettingWarning, match=r"model.server_optimizer.lr is 0.25, was 1.0"):
        cli = command(config, "fit", *SGD, *more)
    (optimizer,) = cli.trainer.optimizers
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.25, 0.5)
    assert all("momentum_buffer" in state for state in optimizer.state.values()), "what it has learned stays"


@pytest.mark.slow
def test_another_schedule_is_followed_as_if_it_had_been_from_the_first_round(config):  # noqa: F811
    """0.5 * gamma ** rounds, with gamma 0.1 in the first two rounds and 0.9 from then on."""
    schedule = ["--model.server_scheduler=torch.optim.lr_scheduler.ExponentialLR"]
    command(config, "fit", *SGD, "--model.server_optimizer.lr=1.0", *schedule, "--model.server_scheduler.gamma=0.1")
    more = ["--ckpt_path=last", "--trainer.max_epochs=3", "--model.server_optimizer.lr=0.5"]
    with pytest.warns(ChangedSettingWarning, match=r"model.server_scheduler.gamma is 0.9, was 0.1"):
        cli = command(config, "fit", *SGD, *schedule, "--model.server_scheduler.gamma=0.9", *more)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * 0.9**3)


def test_other_settings_that_change_numbers_are_told(config, finished):  # noqa: F811
    changed = ["--model.method.regularization=0.5", "--data.cohort_size=2", "--seed_everything=3"]
    with pytest.warns(ChangedSettingWarning, match="began with") as told:
        command(config, "fit", "--ckpt_path=last", "--trainer.max_epochs=3", *changed)
    (said,) = [str(warning.message) for warning in told if warning.category is ChangedSettingWarning]
    assert "model.method.regularization is 0.5, was" in said
    assert "data.cohort_size is 2, was 3; " in said or "data.cohort_size is 2, was 3." in said
    assert "seed_everything is 3, was 1" in said


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (["dog", "fox"], "class 0 was 'cat' and is 'dog'"),
        (["cat", "dog"], "class 2 was 'fox' and is no class"),
        (["cat", "dog", "fox", "gnu"], "class 3 was no class and is 'gnu'"),
    ],
)
def test_classes_keep_their_numbers(now, words):
    saved = {"class_names": ["cat", "dog", "fox"]}
    with pytest.raises(ConfigurationError, match=f"classes are cat, dog, fox, .* {words}. .* by data.classes"):
        check_class_names(saved, {"class_names": now})
    for same in (saved, {"class_names": []}, {}):
        check_class_names(saved, same)
        check_class_names(same, saved)


@pytest.mark.parametrize(("was", "is_now"), [("uint8", "float32"), ("uint8", "bool"), ("float32", "int64")])
def test_features_are_read_as_in_training(was, is_now):
    """A model of scaled pixels would get 0 to 255, or 1 for what was 1 / 255."""
    with pytest.raises(
        ConfigurationError, match=rf"trained with features of type {was} .*, in the data they are {is_now}"
    ):
        check_features({"features": was}, {"features": is_now})
    with pytest.raises(ConfigurationError, match=rf"with features 'b' of type {was}"):
        check_features({"features": {"a": was, "b": was}}, {"features": {"a": was, "b": is_now}})
    for alike in (("int16", "int64"), ("float32", "float64"), (was, was)):
        check_features(*({"features": kind} for kind in alike))
    for unknown in ({}, {"features": {"a": is_now}}):
        check_features(unknown, {"features": is_now})
        check_features({"features": was}, unknown)
