"""Where a client's instances differ in which concept they follow, routing beats any fixed mixture of the two models."""

import pytest

from flow_pl.cli import run

SMALLER = ["--data.num_clients=100", "--data.num_features=10", "--data.num_classes=4", "--data.cohort_size=25"]
SMALLER += ["--model.backbone.in_features=10", "--model.backbone.num_classes=4", "--trainer.max_epochs=60"]
QUIET = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
QUIET += ["--trainer.limit_val_batches=0", "--trainer.accelerator=cpu", "--trainer.devices=1"]


def personalized(config, folder, *options):
    """Personalized accuracy on clients seen in training and on new ones."""
    words = ["-c", "task/synthetic", "-c", f"tuned/synthetic/{config}", f"--data.cache_dir={folder / 'cache'}"]
    cli = run(["fit", *words, f"--trainer.default_root_dir={folder / 'run'}", *SMALLER, *QUIET, *options])
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    metrics = cli.trainer.callback_metrics
    return [float(metrics[f"test/{population}/personalized_accuracy"]) for population in ("seen", "new")]


@pytest.mark.slow
def test_routing_beats_interpolation_on_synthetic_data_with_a_shared_concept(tmp_path):
    """The shipped configurations, smaller: alpha fixed at one half, and alpha chosen by each client."""
    seen, new = personalized("flow", tmp_path)
    for alpha in ("0.5", "chosen"):
        fixed_seen, fixed_new = personalized("interpolation", tmp_path, f"--model.method.alpha={alpha}")
        print(f"flow {seen:.3f} {new:.3f}  interpolation ({alpha}) {fixed_seen:.3f} {fixed_new:.3f}")
        assert seen > fixed_seen + 0.005
        assert new > fixed_new
