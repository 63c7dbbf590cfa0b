"""The Python interface, cell by cell: everything that the command line does, with Lightning's Trainer.

Runs in an editor that supports `# %%` cells, as a notebook (`jupytext --to notebook`), or as a script:
`python examples/python_api.py`. It needs `pip install "flow-pl[digits,compare]"` and a minute.
"""

# %% The data: handwritten digits, divided among 30 writers.
import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.optim import SGD

from flow_pl import FederatedLoop, FederatedModule, callbacks, personalize
from flow_pl.data import DigitsData
from flow_pl.methods import Flow
from flow_pl.models import MLP
from flow_pl.models.routers import InstanceRouter

FOLDER = "runs/python_api"
seed_everything(0)
torch.set_num_threads(1)  # small tensors: a second thread costs more than it gains
data = DigitsData(num_clients=30, cohort_size=10, chunk_size=10, new_client_fraction=0.2)

# %% The module: a backbone, a method, and the training of a client.
module = FederatedModule(
    MLP(in_features=64, num_classes=10, hidden=[32]),
    Flow(router=lambda blocks: InstanceRouter(blocks, hidden=[16])),
    FederatedLoop(
        local_epochs=3,
        personal_epochs=8,
        batch_size=5,
        client_optimizer=lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    ),
)


# %% Your own callback is any Lightning callback: this one collects a metric.
class Curve(Callback):
    """Collects the personalized accuracy after each validation of the fit."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: FederatedModule) -> None:
        """Record the accuracy."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.values.append(trainer.callback_metrics["val/personalized_accuracy"].item())


# %% The trainer. Validation and test personalize clients by gradient steps, so they must allow gradients.
curve = Curve()
trainer = Trainer(
    max_epochs=10,  # rounds
    check_val_every_n_epoch=5,
    inference_mode=False,
    use_distributed_sampler=False,
    enable_model_summary=False,
    enable_progress_bar=False,
    log_every_n_steps=1,
    default_root_dir=FOLDER,
    callbacks=[
        callbacks.GeneralizedAccuracy(),
        callbacks.PersonalizedAccuracy(),
        callbacks.PersonalizationGain(),
        callbacks.RoutingStatistics(),
        callbacks.ResultsTable(),
        callbacks.PredictionWriter(),
        ModelCheckpoint(f"{FOLDER}/checkpoints", "best", monitor="val/personalized_accuracy", mode="max"),
        curve,
    ],
)

# %% Fit, then validate, test and predict with the best round.
trainer.fit(module, datamodule=data)
trainer.validate(module, datamodule=data, ckpt_path="best", verbose=False)
tested = trainer.test(module, datamodule=data, ckpt_path="best", verbose=False)[0]  # of seen and of new clients
trainer.predict(module, datamodule=data, ckpt_path="best", return_predictions=False)
print("personalized accuracy over the rounds:", [round(value, 3) for value in curve.values])
print("of new clients:", round(tested["test/new/personalized_accuracy"], 3))

# %% Draw the curve, and compare the clients' own models with the server's.
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot([5, 10], [100 * value for value in curve.values], marker="o")
left.set(xlabel="round", ylabel="personalized accuracy (%)", title="Validation", ylim=(0, 100))
names = ["seen", "new"]
for offset, model in ((-0.2, "generalized"), (0.2, "personalized")):
    heights = [100 * tested[f"test/{name}/{model}_accuracy"] for name in names]
    right.bar([place + offset for place in range(2)], heights, 0.4, label=model)
right.set(xticks=[0, 1], xticklabels=[f"{name} clients" for name in names], title="Test", ylim=(0, 100))
right.legend()
plt.show()

# %% Serve one client that was never sampled: its own model from its training examples.
client = int(data.federation.new[0])
model = personalize(module, *data.examples(client, "train"))
x, y = data.examples(client, "test")
print(f"{data.client_name(client)}: {int((model(x).argmax(-1) == y).sum())} of {len(y)} test examples right")
