"""Lightning's weight averaging over rounds: the server's average is what is evaluated, saved and personalized."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from flow_pl.cli import run
from tests.test_cli import config  # noqa: F401 (a fixture)

AVERAGED = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.75", "--trainer.max_epochs=4"]
RECORDED = ["--trainer.callbacks+=tests.callbacks.test_weight_averaging.Recorder"]


class Recorder(Callback):
    """Records the server's model after each round's step, and the one that is validated."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.trained):
            self.trained.append(_copy(pl_module.state_dict()))

    def on_validation_end(self, trainer, pl_module):
        self.after = _copy(pl_module.state_dict())

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0 and not trainer.sanity_checking:
            self.validated.append(_copy(pl_module.state_dict()))


def _copy(state):
    return {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}


def _averages(models, decay):
    """The exponential moving averages of the models, beginning with the first one itself."""
    averages = [models[0]]
    for model in models[1:]:
        averages.append({name: decay * averages[-1][name] + (1 - decay) * model[name] for name in model})
    return averages


def _assert_same(state, expected, **tolerance):
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, **tolerance)


@pytest.mark.parametrize("method", ["Flow", pytest.param("EvidenceFlow", marks=pytest.mark.slow)])
def test_the_average_over_rounds_is_validated_and_saved(config, tmp_path, method):  # noqa: F811
    """Clients still train from the model of the round before; only what is evaluated and shipped is the average."""
    cli = run(["fit", "--config", str(config), f"--model.method={method}", *AVERAGED, *RECORDED])
    recorder = next(callback for callback in cli.trainer.callbacks if isinstance(callback, Recorder))
    averages = _averages(recorder.trained, 0.75)
    assert len(averages) == len(recorder.validated) == 4
    for validated, average in zip(recorder.validated, averages, strict=True):
        _assert_same(validated, average)
    _assert_same(recorder.after, recorder.trained[-1], rtol=0, atol=0)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    _assert_same(saved["state_dict"], averages[-1])
    _assert_same(cli.model.state_dict(), averages[-1])


def test_a_resumed_fit_ends_with_the_same_average(config, tmp_path):  # noqa: F811
    whole = run(["fit", "--config", str(config), *AVERAGED, f"--trainer.default_root_dir={tmp_path / 'whole'}"])
    run(["fit", "--config", str(config), *AVERAGED, "--trainer.max_epochs=2"])
    resumed = run(["fit", "--config", str(config), *AVERAGED, "--ckpt_path=last"])
    assert resumed.trainer.global_step == 4
    _assert_same(resumed.model.state_dict(), _copy(whole.model.state_dict()), rtol=0, atol=0)
