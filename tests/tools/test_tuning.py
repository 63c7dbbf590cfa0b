"""The search for the settings of the methods that are compared."""

from itertools import pairwise

from tools.tuning import SETTINGS, Runs, search


class Known(Runs):
    """Runs whose accuracy is the number of settings at their last value but one."""

    trained = 0

    def _train(self, method, chosen):
        self.trained += 1
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
