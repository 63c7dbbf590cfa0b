"""Configurations that nobody has thought of: each trains a round, or is refused before anything is trained.

60 of them; `FLOW_PL_CONFIGURATIONS=500` in the environment tries others, as many as it says.
"""

import logging
import os
import typing
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import nn

import flow_pl.methods
from flow_pl import FederatedLoop, FederatedModule
from flow_pl.callbacks import GeneralizedAccuracy, PersonalizationGain, PersonalizedAccuracy, RoutingStatistics
from flow_pl.data import ArrayData, FederatedDataModule, SyntheticData
from flow_pl.errors import FlowError
from flow_pl.models import EMNISTCNN, MLP, LogisticRegression, NextCharacterLSTM, NextWordLSTM
from flow_pl.models.feature_router import FeatureRouter
from flow_pl.models.routers import InstanceRouter, SequenceRouter
from flow_pl.tasks import Classification, MultiLabel, NextToken, Objective
from tests.test_settings import FROM_ZERO, alternatives, annotations, fits, trials

EXAMPLES = int(os.environ.get("FLOW_PL_CONFIGURATIONS", 60))
FEATURES, CLASSES, TOKENS, TAGS, SIDE = 4, 3, 7, 5, 8
METHODS = [getattr(flow_pl.methods, name) for name in flow_pl.methods.__all__]
METHODS = [m for m in METHODS if issubclass(m, flow_pl.methods.Method) and m is not flow_pl.methods.Method]
UNDEFINED = ("_client_gini",)
"""Figures that are NaN where no target is predicted right."""

FRACTIONS = [1e-6, 0.0, 0.1, 0.5, 0.9, 1.0, 1.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files of the user's own: pictures, sentences and tagged texts of six clients, some rows without a label."""
    root, random = tmp_path_factory.mktemp("any"), np.random.default_rng(0)
    client = np.arange(60) % 6
    pictures = random.integers(256, size=(60, 1, SIDE, SIDE), dtype=np.uint8)
    labels = random.integers(-1, CLASSES, size=60)
    labels[:6] = 0
    np.savez(root / "pictures.npz", x=pictures, y=labels, client=client)
    tokens = random.integers(TOKENS, size=(60, 6))
    np.savez(root / "sentences.npz", x=tokens[:, :-1], y=tokens[:, 1:], client=client)
    tags = random.integers(2, size=(60, TAGS))
    np.savez(root / "tags.npz", x=random.normal(size=(60, FEATURES)).astype("f4"), y=tags, client=client)
    return root


class Draw:
    """Draws settings of classes; at most one of them out of its range."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self.broken = self("break one setting", st.integers(0, 4)) == 4
        self.settings: dict[str, Any] = {}

    def __call__(self, label: str, strategy: st.SearchStrategy[Any]) -> Any:
        return self._data.draw(strategy, label)

    def one(self, label: str, *choices: Any) -> Any:
        return choices[self(label, st.integers(0, len(choices) - 1))]

    def of(self, cls: type, **own: st.SearchStrategy[Any]) -> dict[str, Any]:
        """Settings of a class by name: of a kind that is known or with a strategy of its own; some by default."""
        found = {}
        for name, hint in annotations(cls).items():
            valid = own[name] if name in own else _valid(cls, name, hint)
            if valid is None:
                continue
            refused = [value for value, in_range in trials(cls, name, hint) if not in_range]
            label = f"{cls.__name__}.{name}"
            if self.broken and refused and self(f"break {label}", st.integers(0, 11)) == 11:
                self.broken = False
                found[name] = self(label, st.sampled_from(refused))
            elif name in own or self(f"set {label}", st.booleans()):
                found[name] = self(label, valid)
        self.settings |= {f"{cls.__name__}.{name}": value for name, value in found.items()}
        return found

    def make(self, cls: type, **own: st.SearchStrategy[Any]) -> Any:
        return cls(**self.of(cls, **own))


def _valid(cls: type, name: str, hint: Any) -> st.SearchStrategy[Any] | None:
    """Small values of a setting that are in its range; None for a setting of another kind."""
    found: list[st.SearchStrategy[Any]] = []
    for kind in alternatives(hint):
        if kind is bool:
            found.append(st.booleans())
        elif kind is int:
            found.append(st.integers(0 if name in FROM_ZERO else 1, 3))
        elif kind is float:
            found.append(st.sampled_from([value for value in FRACTIONS if fits(cls, name, value)]))
        elif kind is type(None):
            found.append(st.none())
        elif typing.get_origin(kind) is Literal:
            found.append(st.sampled_from(typing.get_args(kind)))
        elif typing.get_origin(kind) in (tuple, list, Sequence) and typing.get_args(kind)[0] is int:
            found.append(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        else:
            return None
    return st.one_of(found)


def _seldom(draw: Draw, strategy: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly of one strategy, and once in ten of another."""
    return other if draw("seldom", st.integers(0, 9)) == 9 else strategy


def draw_data(draw: Draw, task: str, folder: Path) -> FederatedDataModule:
    shared = {
        "cohort_size": _seldom(draw, st.just(2), st.integers(1, 7)),
        "val_fraction": _seldom(draw, st.sampled_from([0.0, 0.2]), st.sampled_from([0.5, 0.9])),
        "test_fraction": _seldom(draw, st.sampled_from([0.0, 0.3]), st.sampled_from([0.5, 0.9])),
        "min_examples": _seldom(draw, st.integers(1, 2), st.just(9)),
        "val_clients": _seldom(draw, st.none(), st.integers(1, 7)),
        "cache_dir": st.just(str(folder / "cache")),
        "num_workers": st.just(0),
        "deadline": st.sampled_from([None, 1, 5]),
        "new_client_fraction": _seldom(draw, st.sampled_from([0.0, 0.1, 0.4]), st.just(0.9)),
    }
    if task == "numbers":
        sizes = {"mean_log_size": st.sampled_from([0.0, 1.0]), "max_size": st.sampled_from([None, 6, 9])}
        sizes |= {"min_size": st.integers(1, 6), "sigma_log_size": st.sampled_from([0.0, 0.5])}
        kind = {
            "num_clients": _seldom(draw, st.just(6), st.integers(1, 4)),
            "num_features": st.just(FEATURES),
            "num_classes": st.just(CLASSES),
        }
        return draw.make(SyntheticData, **sizes, **kind, **shared)
    own = {"path": st.just(str(folder / f"{task}.npz")), "num_classes": st.sampled_from([None, TOKENS])}
    if task == "pictures":
        own["num_classes"] = st.sampled_from([None, CLASSES])
    if task == "tags":
        own["num_classes"] = st.just(TAGS)
    return draw.make(ArrayData, **own, feature_shape=st.none(), feature_columns=st.none(), **shared)


def draw_backbone(draw: Draw, task: str) -> nn.Module:
    classes = {"pictures": CLASSES, "tags": TAGS}.get(task, CLASSES)
    shape = [1, SIDE, SIDE] if task == "pictures" else FEATURES
    flat = {"num_classes": st.just(classes), "in_features": st.just(shape)}
    if task == "sentences":
        cls = draw.one("backbone", NextWordLSTM, NextCharacterLSTM)
        return draw.make(cls, num_tokens=st.integers(TOKENS, TOKENS + 2))
    if task == "pictures" and draw.one("backbone", True, False):
        dropout = st.sampled_from([(0.0, 0.0), (0.3, 0.9)])
        return draw.make(EMNISTCNN, num_classes=st.just(classes), in_shape=st.just((1, SIDE, SIDE)), dropout=dropout)
    if draw.one("backbone", True, False, False):
        return draw.make(LogisticRegression, **flat)
    return draw.make(MLP, **flat, hidden=st.lists(st.integers(1, 5), max_size=2))


def draw_objective(draw: Draw, task: str) -> Objective:
    cls = {"sentences": NextToken, "tags": MultiLabel}.get(task, Classification)
    return draw.make(cls)


def draw_router(draw: Draw, task: str) -> Any:
    cls = draw.one("router", SequenceRouter if task == "sentences" else InstanceRouter, FeatureRouter)
    return partial(cls, **draw.of(cls, **({"submodule": st.none()} if cls is FeatureRouter else {})))


def draw_optimizer(draw: Draw, name: str) -> Any:
    if draw.broken and draw.one(f"break {name}", False, False, False, False, True):
        draw.broken = False
        return draw.one(
            name,
            partial(torch.optim.SGD, lr=float("nan")),
            partial(torch.optim.SGD, lr=-1.0),
            partial(torch.optim.SGD, lr=0.1, momentum=float("inf")),
            partial(torch.optim.Adam, betas=(0.9, 1.0)),
            torch.optim.LBFGS,
            torch.optim.SparseAdam,
        )
    return draw.one(
        name,
        partial(torch.optim.SGD, lr=0.0),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        partial(torch.optim.Adam, lr=0.01, amsgrad=True),
        partial(torch.optim.Adagrad, lr=0.01),
        partial(torch.optim.RMSprop, lr=0.01, centered=True),
    )


def draw_scheduler(draw: Draw, name: str) -> Any:
    if draw.broken and draw.one(f"break {name}", False, False, False, True):
        draw.broken = False
        return draw.one(
            name,
            partial(torch.optim.lr_scheduler.StepLR, step_size=0),
            partial(torch.optim.lr_scheduler.ExponentialLR, gamma=float("nan")),
            torch.optim.lr_scheduler.ReduceLROnPlateau,
            partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=0),
        )
    step = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    return draw.one(name, None, None, step, partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=1))


def draw_module(draw: Draw, folder: Path) -> tuple[FederatedModule, FederatedDataModule]:
    """A module and a data module; now and then of two tasks that do not go together."""
    task = draw.one("task", "numbers", "numbers", "pictures", "sentences", "tags")
    other = draw.one("another task", "numbers", "pictures", "sentences", "tags")
    mixed = draw("mix up", st.integers(0, 19))
    parts = {part: other if mixed == i else task for i, part in enumerate(("data", "backbone", "objective", "router"))}
    client_optimizer, server_optimizer = (
        draw_optimizer(draw, "client_optimizer"),
        draw_optimizer(draw, "server_optimizer"),
    )
    scheduler, client_scheduler = (draw_scheduler(draw, name) for name in ("server_scheduler", "client_scheduler"))
    data = draw_data(draw, parts["data"], folder)
    method = draw.one("method", *METHODS, flow_pl.methods.Flow)
    own = {"router": st.just(draw_router(draw, parts["router"]))} if method is flow_pl.methods.Flow else {}
    trace_after, never = st.sampled_from([None, 0, 1, 200]), st.none()  # compiling takes minutes
    loop_settings = draw.of(FederatedLoop, batch_size=st.integers(1, 9), trace_after=trace_after, compile_mode=never)
    loop = FederatedLoop(client_optimizer=client_optimizer, client_scheduler=client_scheduler, **loop_settings)
    backbone = draw_backbone(draw, parts["backbone"])
    objective = draw_objective(draw, parts["objective"])
    model = FederatedModule(
        backbone,
        draw.make(method, **own),
        loop,
        objective,
        server_optimizer,
        scheduler,
        **draw.of(FederatedModule, batch_norm=st.none()),
    )
    return model, data


class _Started(Callback):
    def __init__(self) -> None:
        self.started = False

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = True


OUTCOMES: dict[str, int] = {}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Lightning tells about every trainer what it is made of."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "disabled", True)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch.utilities.rank_zero"), "disabled", True)


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # what fails is told as it was drawn: to make it smaller would take minutes
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_any_configuration_trains_a_round_or_is_refused_at_once(folder, data):
    check(data, folder)


def check(data: st.DataObject, folder: Path) -> None:
    draw, watch, refusal = Draw(data), _Started(), ""
    torch.manual_seed(0)
    try:
        model, source = draw_module(draw, folder)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, inference_mode=False, use_distributed_sampler=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, logger=False,
            enable_checkpointing=False, default_root_dir=str(folder / "run"),
            callbacks=[
                GeneralizedAccuracy(), PersonalizedAccuracy(), PersonalizationGain(), RoutingStatistics(), watch
            ],
        )  # fmt: skip
        with warnings.catch_warnings():  # of what Lightning would do otherwise
            warnings.simplefilter("ignore")
            trainer.fit(model, datamodule=source)
    except FlowError as error:
        refusal = str(error)
    if refusal:
        assert not watch.started, f"refused after training has begun: {refusal}"
        assert len(refusal.split()) > 4, f"too short to be of use: {refusal}"
        _count("refused: " + " ".join(refusal.split()[:3]))
        return
    assert not [name for name, p in model.server.named_parameters() if not p.isfinite().all()]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    wrong = {name: value for name, value in metrics.items() if not np.isfinite(value) and not name.endswith(UNDEFINED)}
    assert not wrong, f"{wrong} with {draw.settings}"
    assert watch.started
    _count(f"trained: {type(model.method).__name__}")


def _count(outcome: str) -> None:
    OUTCOMES[outcome] = OUTCOMES.get(outcome, 0) + 1


def test_both_kinds_of_configurations_were_met():
    """A test that only ever meets one of them would prove little."""
    if not OUTCOMES:
        pytest.skip("the test of any configuration has not run")
    trained = {name: count for name, count in OUTCOMES.items() if name.startswith("trained")}
    assert sum(trained.values()) >= EXAMPLES // 4
    assert sum(OUTCOMES.values()) - sum(trained.values()) >= EXAMPLES // 6
    assert len(trained) >= 6
