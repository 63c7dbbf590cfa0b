"""Every number, word and list of numbers that a public class takes: what is out of range is refused, and named."""

import importlib
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from torch import nn

import flow_pl.data
from flow_pl.data import Archive, ClientStore, Federation, ReleasedData, SyntheticData, Vectors
from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg
from flow_pl.models import LSTM, MLP
from tests.test_cli import config, fails  # noqa: F401 (a fixture)

MODULES = ["flow_pl", "flow_pl.methods", "flow_pl.models", "flow_pl.models.routers", "flow_pl.tasks", "flow_pl.data"]
MODULES += ["flow_pl.models.feature_router", "callbacks"]

RECORDS = {"ClientBatch", "ClientStore", "Derive", "Examples", "Phase", "Prediction", "Step"}
"""What the code itself makes and hands on, besides the named tuples; nobody configures them."""

ELSEWHERE = {"LoRA", "TextEncoder"}
"""What takes a model that is made, or read, anew each time: see tests/models."""

REQUIRED: dict[str, dict[str, Any]] = {
    "FederatedModule": {"backbone": MLP(2, 2), "method": FedAvg()},
    "InstanceRouter": {"blocks": [nn.Linear(2, 2)]},
    "FeatureRouter": {"blocks": [nn.Linear(2, 2)]},
    "SequenceRouter": {"blocks": [LSTM(2, 2), nn.Linear(2, 2)]},
    "MLP": {"in_features": 2, "num_classes": 2},
    "LogisticRegression": {"in_features": 2, "num_classes": 2},
    "LSTM": {"input_size": 2, "hidden_size": 2},
    "Archive": {"url": "https://example.org/a.tar.bz2"},
    "ArrayData": {"path": "a.npz"},
    "ClientDataset": {"federation": None, "seed": 0},
    "ClientStoreWriter": {"target": "store"},
    "CohortSampler": {"clients": np.arange(5), "sizes": np.ones(5), "cohort_size": 2, "chunk_size": 2, "seed": 0},
    "HDF5Data": {"train": "a.h5", "encoding": Vectors()},
    "LeafData": {"train": "a.json", "encoding": Vectors()},
    "PartitionedData": {"path": "a.npz", "partitioner": {"class_path": "a.B"}, "encoding": Vectors()},
    "ReleasedData": {"folder": "f", "name": "n", "archive": Archive("https://example.org/a"), "encoding": Vectors()},
    "TokenizedTexts": {"tokenizer": "folder"},
    "Vocabulary": {"tokens": ["a"]},
    **{f"{name}Data": {"folder": "f"} for name in ("Emnist", "Cifar100", "Shakespeare")},
    **{f"StackOverflow{kind}Data": {"folder": "f"} for kind in ("", "Tags")},
}

FROM_ZERO = {"common", "head_epochs", "num_workers", "padding", "rank", "seed", "special_tokens", "split_seed"}
FROM_ZERO |= {"pretrain_rounds", "trace_after"}
"""Whole numbers that may be 0; the others are counts of 1 or more."""

EMPTY = {"MLP.hidden", "NextToken.special_tokens"}
"""Lists that may be empty: a linear model, no second accuracy."""

POSITIVE = {"dirichlet_alpha", "global_lr_scale", "max_grad_norm", "personal_lr_scale"}
POSITIVE |= {
    "router_lr",
    "router_lr_scale",
    "std",
    "strategy_lr_scale",
    "temperature",
    "PFedMe.regularization",
    "weight_lr",
}
AT_LEAST_ZERO = {"Ditto.regularization", "Flow.regularization", "PerFedAvg.alpha", "SyntheticData.alpha", "beta"}
AT_LEAST_ZERO |= {
    "FedCP.regularization",
    "FedDBE.regularization",
    "interval_s",
    "mu",
    "router_weight_decay",
    "sigma_log_size",
    "speed_spread",
    "style_strength",
}
SHARE = {"APFL.alpha", "EvidenceFlow.alpha", "Interpolation.alpha", "neighbour_weight", "shared_fraction"}
ABOVE_ZERO_SHARE = {"client_fraction"}
BELOW_ONE_SHARE = {"dropout", "max_rejected", "new_client_fraction", "p", "test_fraction", "val_fraction"}
ANY = {"mean_log_size", "mean"}

RANGES = [
    (POSITIVE, lambda value: value > 0),
    (AT_LEAST_ZERO, lambda value: value >= 0),
    (SHARE, lambda value: 0 <= value <= 1),
    (ABOVE_ZERO_SHARE, lambda value: 0 < value <= 1),
    (BELOW_ONE_SHARE, lambda value: 0 <= value < 1),
    (ANY, lambda value: True),
]
"""The range of every float."""

FLOATS = [-0.1, 0.0, 0.05, 1.0, 1.5, math.nan, math.inf, -math.inf]
INTEGERS = [-1, 0, 1.5, math.nan, math.inf]


def public_classes() -> list[type]:
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        names = getattr(module, "__all__", [n for n, v in vars(module).items() if getattr(v, "__module__", "") == name])
        found |= {n: getattr(module, n) for n in names if not n.startswith("_")}
    classes = {n: c for n, c in found.items() if inspect.isclass(c) and not inspect.isabstract(c)}
    return [c for n, c in sorted(classes.items()) if not issubclass(c, tuple) and n not in RECORDS | ELSEWHERE]


def annotations(cls: type) -> dict[str, Any]:
    """The settings of a class by name, those that it passes on to its bases by `**kwargs` too."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if not inspect.isfunction(init):
            continue
        hints, parameters = typing.get_type_hints(init), inspect.signature(init).parameters
        kinds = {name: parameter.kind for name, parameter in parameters.items()}
        for name in list(parameters)[1:]:
            if kinds[name] not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
                found.setdefault(name, hints.get(name, Any))
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            break
    return found


def alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def listed(table: set[str], cls: type, name: str) -> bool:
    return name in table or any(f"{base.__name__}.{name}" in table for base in cls.__mro__)


def fits(cls: type, name: str, value: float) -> bool:
    ranges = [accepts for table, accepts in RANGES if listed(table, cls, name)]
    assert len(ranges) == 1, f"the range of {cls.__name__}.{name} is not in the table of this test"
    return math.isfinite(value) and bool(ranges[0](value))


def trials(cls: type, name: str, hint: Any) -> Iterator[tuple[Any, bool]]:
    """Values for a setting, and whether each is in its range."""
    least = 0 if name in FROM_ZERO else 1
    kinds = alternatives(hint)
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    for kind in kinds:
        origin, of = typing.get_origin(kind), typing.get_args(kind)
        if kind is int:
            yield from ((value, value == least) for value in INTEGERS)
        elif kind is float:
            yield from ((value, fits(cls, name, value)) for value in FLOATS)
        elif origin in (list, tuple, Sequence) and of[0] is int:
            yield [], listed(EMPTY, cls, name)
            yield from (([value], value == least) for value in INTEGERS if value != least)
            yield [5, -3], False
        elif origin is tuple and of == (float, float):
            yield from (((value, 0.1), fits(cls, name, value)) for value in FLOATS)
            yield (0.1,), False
        elif origin in (list, tuple, Sequence):
            yield [], False
        elif kind is type(None):
            yield None, True
    if words:
        yield from ((word, True) for word in words)
        yield "nonsense", False


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ClientStore:
    data = SyntheticData(num_clients=4, max_size=60, cache_dir=str(tmp_path_factory.mktemp("cache")))
    data.prepare_data()
    data.setup()
    return data.federation.store


@pytest.mark.parametrize("cls", public_classes(), ids=lambda cls: cls.__name__)
def test_settings_out_of_range_are_refused_by_name(cls, store):
    required = {"store": store} if cls is Federation else REQUIRED.get(cls.__name__, {})
    for name, hint in annotations(cls).items():
        if name in ("blocks", "clients", "sizes") and name in required:
            continue  # made by the code
        if name == "batch_norm":
            continue  # says what becomes of layers that the backbone must have
        if issubclass(cls, ReleasedData) and name in ("train", "test", "validation", "heldout"):
            continue  # known for these data sets
        for value, valid in trials(cls, name, hint):
            asked = f"{cls.__name__}({name}={value!r})"
            settings = {**required, name: value}
            if valid:
                try:
                    cls(**settings)
                except ConfigurationError as error:
                    raise AssertionError(f"{asked} is in range, but refused: {error}") from error
                continue
            try:
                cls(**settings)
            except ConfigurationError as error:
                said = str(error)
                wrong = value[-1] if isinstance(value, list) and value else value
                wrong = value[0] if isinstance(value, tuple) else wrong
                named = rf"\b{name}(\[\d\])? is \[?'?{re.escape(str(wrong))}(?!\w).*, expected"
                assert re.search(named, said), f"{asked} is refused without its name, the value or the range: {said}"
            except Exception as error:
                raise AssertionError(f"{asked} fails with {type(error).__name__}: {error}") from error
            else:
                raise AssertionError(f"{asked} is accepted")


def test_the_walk_meets_all_kinds_of_classes():
    names = {cls.__name__ for cls in public_classes()}
    assert {"APFL", "MLP", "InstanceRouter", "NextToken", "SyntheticData", "Images", "RoutingReport"} <= names
    assert {"FederatedLoop", "FederatedModule", "CohortSampler", "Federation"} <= names
    assert set(annotations(flow_pl.data.EmnistData)) >= {"folder", "max_examples", "val_fraction", "chunk_size"}
    assert len(names) > 50


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.method.router_lr_scale", ".nan", "router_lr_scale is nan, expected a number greater than 0"),
        pytest.param("model.method.router.dropout", "1.5", "dropout is 1.5, expected a share", marks=pytest.mark.slow),
        pytest.param(
            "model.backbone.hidden",
            "[5, 0]",
            "hidden[1] is 0, expected a whole number of 1 or more",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "model.loop.batch_size",
            "0",
            "batch_size is 0, expected a whole number of 1 or more",
            marks=pytest.mark.slow,
        ),
        pytest.param("model.max_rejected", ".inf", "max_rejected is inf, expected a share", marks=pytest.mark.slow),
        (
            "model.server_optimizer",
            "{class_path: torch.optim.SGD, init_args: {lr: .nan}}",
            "server_optimizer.lr is nan",
        ),
        ("model.loop.client_optimizer", "{class_path: torch.optim.SGD, init_args: {lr: .inf}}", "optimizer.lr is inf"),
        (
            "model.server_scheduler",
            "{class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 0}}",
            "server_scheduler cannot be stepped in round 0 (ZeroDivisionError",
        ),
        ("data.val_fraction", ".nan", "val_fraction is nan, expected a share"),
        pytest.param("data.mean_log_size", "1000.0", "mean_log_size is 1000.0", marks=pytest.mark.slow),
    ],
)
def test_the_command_line_refuses_them_before_anything_is_trained(config, capsys, key, value, message):  # noqa: F811
    settings = yaml.safe_load(config.read_text())
    node = settings
    *path, last = key.split(".")
    for name in path:
        node = node.setdefault(name, {})
        node = node.setdefault("init_args", node) if "class_path" in node else node
    node[last] = yaml.safe_load(value)
    if last == "mean_log_size":
        del node["max_size"]
    config.write_text(yaml.safe_dump(settings))
    status, said = fails(capsys, "fit", "--config", config)
    assert status == 1
    assert said.startswith("error: ")
    assert message in said
    assert not list(config.parent.glob("run/**/*.ckpt"))
