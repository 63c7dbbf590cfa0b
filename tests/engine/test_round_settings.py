"""The options of the server's round in runs of the trainer: logged, resumed, refused, and free of chunks."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from flow_pl import FederatedLoop, FederatedModule
from flow_pl.callbacks import BackdoorSuccess
from flow_pl.checks import check_fit
from flow_pl.cli import run as command
from flow_pl.data import SyntheticData
from flow_pl.engine.aggregation import CoordinateMedian, GeometricMedian, MultiKrum, NormBound
from flow_pl.engine.attacks import Attack, Backdoor, SignFlip
from flow_pl.engine.compression import StochasticRounding, TopK
from flow_pl.engine.privacy import AdaptiveClipping, FixedClipping, GaussianMechanism, PrivacyBudgetError
from flow_pl.engine.privacy.accounting import Accountant
from flow_pl.errors import ConfigurationError
from flow_pl.methods import Ditto, FedAvg, FineTuning, Flow, HypCluster
from flow_pl.models import MLP
from flow_pl.models.routers import InstanceRouter

pytest.importorskip("dp_accounting")


def data(cache, **settings):
    settings = {"num_clients": 24, "num_features": 8, "num_classes": 3, "cohort_size": 6, "chunk_size": 3, **settings}
    sizes = {"mean_log_size": 2.0, "sigma_log_size": 0.6, "min_size": 6, "max_size": 40}
    return SyntheticData(cache_dir=str(cache), **{"sampling": "poisson", **sizes, **settings})


def flow():
    return Flow(router=lambda blocks: InstanceRouter(blocks, hidden=(6,), dropout=0.0))


def private(**settings):
    settings = {"noise_multiplier": 1.0, "clipping": AdaptiveClipping(0.2, count_noise=3.0), **settings}
    return GaussianMechanism(1e-3, accountant="rdp", **settings)


def module(method=None, weighting="uniform", **settings):
    torch.manual_seed(3)
    loop = FederatedLoop(1, None, 5, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), weighting)
    model = FederatedModule(MLP(8, 3, (6,)), FedAvg() if method is None else method, loop, **settings)
    check_fit(model.method, torch.zeros(1, 8), num_classes=3)
    return model


def trainer(rounds=3, **settings):
    return lightning.Trainer(**{
        "max_epochs": rounds, "accelerator": "cpu", "devices": 1, "inference_mode": False, "logger": False,
        "use_distributed_sampler": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "enable_checkpointing": False, **settings,
    })  # fmt: skip


def fitted(tmp_path, model, rounds=3, ckpt_path=None, trainer_settings=None, **settings):
    lightning.seed_everything(0, verbose=False)
    run = trainer(rounds, **(trainer_settings or {}))
    run.fit(model, datamodule=data(tmp_path / "cache", **settings), ckpt_path=ckpt_path)
    return model, run


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.server.parameters()])


class _Epsilons(Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(float(trainer.callback_metrics["privacy/epsilon"]))


def test_epsilon_grows_from_round_to_round(tmp_path):
    seen = _Epsilons()
    model, run = fitted(tmp_path, module(privacy=private()), trainer_settings={"callbacks": [seen]})
    assert 0 < seen.seen[0] < seen.seen[1] < seen.seen[2] == pytest.approx(model.privacy.epsilon)
    assert run.callback_metrics["train/clip_norm"] != 0.2
    assert model.privacy.ledger.rounds == 3


OPTIONS = {
    "privacy": lambda: {"privacy": private()},
    "norm_bound": lambda: {"aggregation": NormBound(0.1)},
    "median": lambda: {"aggregation": CoordinateMedian("disk"), "attack": SignFlip(0.3, 2.0)},
    "geometric_median": lambda: {"aggregation": GeometricMedian(), "compression": StochasticRounding()},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("method", [FedAvg, pytest.param(flow, marks=pytest.mark.slow)], ids=["fedavg", "flow"])
def test_chunks_change_nothing(tmp_path, option, method):
    def once(chunk_size):
        made = method() if method is flow else FedAvg()
        settings = {"default_root_dir": str(tmp_path)}
        return fitted(
            tmp_path, module(made, **OPTIONS[option]()), trainer_settings=settings, rounds=2, chunk_size=chunk_size
        )

    model, run = once(1)
    other, other_run = once(4)
    torch.testing.assert_close(parameters(other), parameters(model), atol=1e-5, rtol=1e-4)
    for name, value in run.callback_metrics.items():
        if name.startswith(("train/bytes", "train/attack", "privacy")):
            torch.testing.assert_close(other_run.callback_metrics[name], value, atol=1e-6, rtol=1e-5)


SCRIPT = """
import sys, torch, lightning
from pathlib import Path
from tests.engine.test_round_settings import OPTIONS, module, data, flow
lightning.seed_everything(0, verbose=False)
model = module(flow(), **OPTIONS[sys.argv[2]]())
run = lightning.Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", inference_mode=False,
    logger=False, enable_checkpointing=False, use_distributed_sampler=False, enable_progress_bar=False,
    enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=str(Path(sys.argv[1]).parent))
run.fit(model, datamodule=data(sys.argv[1]))
if run.is_global_zero:
    metrics = {k: float(v) for k, v in run.callback_metrics.items()}
    torch.save((torch.cat([p.detach().reshape(-1) for p in model.server.parameters()]), metrics), sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [
        pytest.param(name, marks=[pytest.mark.extended] if name in ("norm_bound", "geometric_median") else [])
        for name in OPTIONS
    ],
)
def test_two_processes_give_the_numbers_of_one(tmp_path, option):
    settings = {"default_root_dir": str(tmp_path)}
    model, run = fitted(tmp_path, module(flow(), **OPTIONS[option]()), rounds=2, trainer_settings=settings)
    script, out = tmp_path / "run.py", tmp_path / "out.pt"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(script), str(tmp_path / "cache"), option, str(out)]
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    together, metrics = torch.load(out)
    torch.testing.assert_close(together, parameters(model), atol=1e-5, rtol=1e-4)
    for name, value in run.callback_metrics.items():
        if name.startswith(("train/bytes", "train/attack", "train/clients", "privacy")):
            assert metrics[name] == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.slow
def test_a_resumed_private_run_is_bit_identical_and_goes_on_with_the_ledger(tmp_path):
    whole, run = fitted(tmp_path, module(flow(), privacy=private()), rounds=4)
    saving = {"callbacks": [ModelCheckpoint(tmp_path / "ckpt", save_last=True)], "enable_checkpointing": True}
    fitted(tmp_path, module(flow(), privacy=private()), rounds=2, trainer_settings=saving)
    path = str(tmp_path / "ckpt" / "last.ckpt")
    assert torch.load(path, weights_only=False)["privacy"]["ledger"][0]["rounds"] == 2
    resumed, again = fitted(tmp_path, module(flow(), privacy=private()), rounds=4, ckpt_path=path)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert again.callback_metrics["privacy/epsilon"] == run.callback_metrics["privacy/epsilon"]
    assert resumed.privacy.clipping.norm == whole.privacy.clipping.norm


@pytest.mark.slow
def test_resuming_counts_the_rounds_of_the_checkpoint_against_the_budget(tmp_path):
    """The noise that is calibrated for 2 rounds has spent epsilon when they are over."""
    saving = {"callbacks": [ModelCheckpoint(tmp_path / "ckpt", save_last=True)], "enable_checkpointing": True}
    budget = {"noise_multiplier": None, "epsilon": 3.0, "clipping": FixedClipping(0.2)}
    fitted(tmp_path, module(privacy=private(**budget)), rounds=2, trainer_settings=saving)
    with pytest.raises(PrivacyBudgetError, match=r"set trainer.max_epochs to 2 or less"):
        fitted(tmp_path, module(privacy=private(**budget)), rounds=4, ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))


@pytest.mark.parametrize("first", [True, False])
def test_private_rounds_and_others_are_not_mixed(tmp_path, first):
    saving = {"callbacks": [ModelCheckpoint(tmp_path / "ckpt", save_last=True)], "enable_checkpointing": True}
    settings = [{"privacy": private()}, {}]
    before, after = settings if first else settings[::-1]
    fitted(tmp_path, module(**before), rounds=1, trainer_settings=saving)
    with pytest.raises(ConfigurationError, match="would void the guarantee"):
        fitted(tmp_path, module(**after), rounds=2, ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))


@pytest.mark.slow
def test_a_run_without_end_stops_at_the_budget(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("flow_pl.module.server_step.rank_zero_info", said.append)
    model, run = fitted(tmp_path, module(privacy=private(epsilon=6.0)), rounds=-1)
    accountant, ledger = Accountant("rdp", model.privacy.delta), model.privacy.ledger
    assert run.global_step == ledger.rounds > 1
    assert model.privacy.epsilon <= 6.0
    assert accountant.epsilon(ledger.extended(ledger.entries[-1].sampling, 1.0, 1)) > 6.0
    assert f"epsilon is {model.privacy.epsilon:.4g} of 6 after {ledger.rounds} rounds" in said[-1]


@pytest.mark.slow
def test_a_checkpoint_of_more_noise_leaves_more_of_the_budget(tmp_path):
    """20 rounds of noise 1 are beyond epsilon 5; two of noise 1 behind 18 of noise 4 are not."""
    saving = {"callbacks": [ModelCheckpoint(tmp_path / "ckpt", save_last=True)], "enable_checkpointing": True}
    clipping = {"clipping": FixedClipping(0.2)}
    budget = {"epsilon": 5.0, **clipping}
    fitted(tmp_path, module(privacy=private(noise_multiplier=4.0, **clipping)), rounds=18, trainer_settings=saving)
    with pytest.raises(PrivacyBudgetError):
        fitted(tmp_path, module(privacy=private(**budget)), rounds=20)
    path = str(tmp_path / "ckpt" / "last.ckpt")
    model, _ = fitted(tmp_path, module(privacy=private(**budget)), rounds=20, ckpt_path=path)
    assert [entry.rounds for entry in model.privacy.ledger.entries] == [18, 2]


def test_more_rounds_than_the_budget_allows_are_refused_before_training(tmp_path):
    with pytest.raises(PrivacyBudgetError, match=r"model.privacy.epsilon is 1, but after 50 more rounds"):
        fitted(tmp_path, module(privacy=private(epsilon=1.0)), rounds=50)


def test_a_poisson_round_without_clients_still_adds_noise(tmp_path):
    """Of 24 clients each comes with probability 1 / 22, so that some of these rounds are empty."""
    model, start = module(privacy=private(clipping=FixedClipping(0.2))), parameters(module())
    moved, cohorts = [start], []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            moved.append(parameters(pl_module))
            cohorts.append(float(trainer.callback_metrics["train/clients"]))

    fitted(tmp_path, model, rounds=8, trainer_settings={"callbacks": [Watch()]}, cohort_size=1, new_client_fraction=0.1)
    assert 0 in cohorts
    assert max(cohorts) > 1
    empty = cohorts.index(0)
    step = moved[empty + 1] - moved[empty]
    assert float(step.std()) == pytest.approx(0.2, rel=0.4)
    assert model.privacy.ledger.rounds == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"privacy": private(), "weighting": "examples"}, "weighting to uniform"),
        ({"privacy": private(), "method": HypCluster()}, "HypCluster"),
        ({"privacy": private(), "aggregation": NormBound()}, "leave out either model.privacy or model.aggregation"),
        ({"aggregation": MultiKrum(0.45)}, "data.cohort_size"),
        ({"aggregation": MultiKrum(0.1), "attack": Attack(0.5)}, "expected to attack"),
        ({"compression": TopK()}, "error_feedback"),
        ({"attack": Backdoor(size=9)}, "at most 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, settings, said):
    model = module(**settings)
    before = parameters(model)
    with pytest.raises(ConfigurationError, match=said):
        fitted(tmp_path, model)
    assert torch.equal(parameters(model), before)


def test_bytes_are_those_of_the_clients_that_were_trained(tmp_path):
    model, run = fitted(tmp_path, module(), rounds=1, sampling="fixed")
    size = 4 * len(parameters(model))
    assert run.callback_metrics["train/bytes_up"] == 6 * size
    assert run.callback_metrics["train/bytes_down"] == 6 * size
    _, run = fitted(tmp_path, module(HypCluster(clusters=2)), rounds=1, sampling="fixed")
    assert run.callback_metrics["train/bytes_up"] == 6 * size
    assert run.callback_metrics["train/bytes_down"] == 12 * size
    _, run = fitted(tmp_path, module(compression=StochasticRounding()), rounds=1, sampling="fixed")
    assert run.callback_metrics["train/bytes_up"] == 6 * (size // 4 + 4 * 4)
    _, run = fitted(tmp_path, module(), rounds=1, sampling="fixed", dropout=0.5)
    trained = float(run.callback_metrics["train/clients"])
    assert 0 < trained < 6
    assert run.callback_metrics["train/bytes_up"] == trained * size
    assert run.callback_metrics["train/bytes_down"] == 6 * size


@pytest.mark.slow
def test_error_feedback_is_kept_with_what_clients_keep(tmp_path):
    """Killed after 2 of 4 rounds and resumed: what was not sent is in the checkpoint."""
    settings = {"default_root_dir": str(tmp_path)}
    whole, _ = fitted(tmp_path, module(Ditto(), compression=TopK(0.2)), rounds=4, trainer_settings=settings)
    plain, _ = fitted(tmp_path, module(Ditto(), compression=TopK(0.2, False)), rounds=4, trainer_settings=settings)
    assert not torch.equal(parameters(whole), parameters(plain))
    saving = {"callbacks": [ModelCheckpoint(tmp_path / "ckpt", save_last=True)], "enable_checkpointing": True}
    fitted(tmp_path, module(Ditto(), compression=TopK(0.2)), rounds=2, trainer_settings={**settings, **saving})
    resumed, _ = fitted(
        tmp_path, module(Ditto(), compression=TopK(0.2)), rounds=4, trainer_settings=settings,
        ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"),
    )  # fmt: skip
    assert torch.equal(parameters(resumed), parameters(whole))


def test_attackers_are_not_evaluated_and_the_backdoor_is_measured(tmp_path):
    evaluated = []

    class Watch(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
            evaluated.extend(outputs.client.tolist())

    attack = Backdoor(0.3, size=3, scale=3.0)
    settings = {"callbacks": [Watch(), BackdoorSuccess()]}
    _, run = fitted(
        tmp_path, module(FineTuning(), attack=attack), rounds=2, trainer_settings=settings, val_fraction=0.3
    )
    assert evaluated
    assert not set(evaluated) & set(attack.clients.tolist())
    for name in ("val/backdoor_generalized", "val/backdoor_personalized"):
        assert 0 <= run.callback_metrics[name] <= 1
    assert 0 <= run.callback_metrics["train/attackers"] <= run.callback_metrics["train/clients"]


@pytest.mark.slow
def test_the_command_line_logs_epsilon_and_writes_it_with_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = [
        "--config=task/synthetic", "--config=method/fedavg",
        "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.devices=1",
        "--data.num_clients=20", "--data.cohort_size=4", "--data.sampling=poisson", "--data.cache_dir=cache",
        "--model.loop.init_args.weighting=uniform", "--model.privacy=GaussianMechanism",
        "--model.privacy.init_args.delta=1e-3", "--model.privacy.init_args.epsilon=5",
        "--model.privacy.init_args.clipping=FixedClipping", "--trainer.default_root_dir=run",
    ]  # fmt: skip
    spent = command(["fit", *common]).model.privacy.epsilon
    with open("run/logs/version_0/metrics.csv") as file:
        logged = [float(row["privacy/epsilon"]) for row in csv.DictReader(file) if row["privacy/epsilon"]]
    assert logged[-1] == pytest.approx(spent)
    assert len(logged) == 2
    assert 4.5 < spent <= 5
    table = ["--trainer.callbacks=ResultsTable", "--trainer.callbacks.path=results.csv"]
    command(["test", *common, *table, "--ckpt_path=run/checkpoints/last.ckpt"])
    assert f"epsilon {spent:.4g} at delta 0.001" in " ".join(capsys.readouterr().out.split())
    assert f"privacy/epsilon,{spent}" in Path("run/results.csv").read_text()
