"""The search for the settings of the methods that are compared."""

import logging
from itertools import pairwise

import pytest

from flow_pl.compare.settings import resolve
from flow_pl.shipped import find
from tools.tuning import SETTINGS, Runs, main, search, write_config


class Known(Runs):
    """Runs whose accuracy is the number of settings at their last value but one."""

    trained = 0

    def _train(self, method, chosen, split):
        self.trained += 1
        if split is not None:
            return split / 100
        values = dict(word.removeprefix("--model.method.init_args.").split("=") for word in chosen)
        return sum(float(value) == SETTINGS[method][name][-2] for name, value in values.items())


def test_each_setting_is_tried_with_the_best_values_of_those_before(tmp_path):
    runs = Known(tmp_path / "runs.csv", "task/digits", ["--trainer.max_epochs=2"])
    for method, settings in SETTINGS.items():
        assert len(settings) <= 2
        tried = search(runs, method)
        assert [name for name, _ in tried] == list(settings)
        for name, found in tried:
            assert list(found) == list(settings[name])
            assert len(found) == 5
            assert max(found, key=found.get) == settings[name][-2]
        for (_, before), (_, after) in pairwise(tried):
            assert (max(before.values()), min(after.values()), max(after.values())) == (100, 100, 200)


def test_finished_runs_are_not_trained_again(tmp_path):
    first = Known(tmp_path / "runs.csv", "task/digits", [])
    tried = search(first, "ditto")
    again = Known(tmp_path / "runs.csv", "task/digits", [])
    assert search(again, "ditto") == tried
    assert (first.trained, again.trained) == (10, 0)
    other = Known(tmp_path / "runs.csv", "task/digits", ["--data.split_seed=1"])
    search(other, "ditto")
    assert other.trained == 10


def test_the_accuracy_is_the_mean_over_the_splits(tmp_path):
    runs = Known(tmp_path / "runs.csv", "task/digits", [], [0, 2, 7])
    assert runs("ditto", {"regularization": 0.1}) == pytest.approx(3)
    again = Known(tmp_path / "runs.csv", "task/digits", [], [0, 2])
    assert again("ditto", {"regularization": 0.1}) == pytest.approx(1)
    assert (runs.trained, again.trained) == (3, 0)


def test_a_configuration_with_the_best_values_can_be_compared(tmp_path):
    write_config(tmp_path / "tuned", "ditto", {"regularization": 0.03, "personal_lr_scale": 3.0})
    settings = resolve([find("task/digits"), tmp_path / "tuned" / "ditto.yaml"], [])
    shipped = resolve([find("task/digits"), find("method/ditto")], [])
    shipped["model"]["method"]["init_args"] |= {"regularization": 0.03, "personal_lr_scale": 3.0}
    assert settings == shipped


def test_further_options_reach_every_run_also_those_that_begin_like_the_tools_own(
    tmp_path, monkeypatch, capsys, caplog
):
    caplog.set_level(logging.ERROR, logger="lightning.pytorch")  # as the tool does; undone after the test
    seen = []
    monkeypatch.setattr(Runs, "_train", lambda self, method, chosen, split: seen.append(self.options) or 0.5)
    out = ["--rounds", "2", "--out", str(tmp_path / "runs.csv"), "--methods", "fine_tuning"]
    main(["task/cifar10_npz", *out, "--config", "federation/dirichlet_0.5", "--data.chunk_size", "3"])
    assert len(seen) == 5
    for options in seen:
        assert options[-2:] == ["--config=federation/dirichlet_0.5", "--data.chunk_size=3"]
    assert "| `fine_tuning` | `personal_lr_scale` | **0.03: 50.00**" in capsys.readouterr().out
    assert not (tmp_path / "federation").exists()


@pytest.mark.slow
def test_a_split_is_that_of_compare(tmp_path):
    options = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    tuned = Runs(tmp_path / "runs.csv", "task/digits", options, [3])
    given = Runs(tmp_path / "runs.csv", "task/digits", [*options, "--data.split_seed=3"])
    other = Runs(tmp_path / "runs.csv", "task/digits", options)
    assert tuned("fine_tuning", {}) == given("fine_tuning", {}) != other("fine_tuning", {})
