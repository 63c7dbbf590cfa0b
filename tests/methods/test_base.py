"""Methods in general: bound copies, names of groups, phases; frozen parameters under every method."""

import copy
import pickle
from functools import partial
from types import MappingProxyType

import pytest
import torch
from torch import nn

from flow_pl import FederatedModule
from flow_pl.checks import check_fit
from flow_pl.engine.server_round import sent_parameters, server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import (
    Derive,
    FedAvg,
    FedRep,
    FineTuning,
    Flow,
    HypCluster,
    Local,
    PartialFed,
    Phase,
    Prediction,
    Step,
)
from flow_pl.tasks import Classification
from tests.models import test_sequences as sequences
from tests.support import CLASSES, FEATURES, bound, chunk, delta, every_method, loop, network, select

SIZES = (11, 6)
METHODS = [partial(Local, 4) if cls is Local else cls for cls in every_method().values()]


@pytest.mark.parametrize("make", METHODS)
def test_a_bound_method_is_a_copy(make):
    """One method in two modules: the first evaluates its own weights, with parts of its own."""
    method = make()
    before = dict(vars(method))
    first = FederatedModule(network(seed=0), method)
    second = FederatedModule(network(seed=1), method)
    assert vars(method) == before
    assert first.method is not second.method
    assert first.method.modules["global"] is first.backbone
    assert first.method.model.backbone is first.backbone
    if hasattr(method, "memory"):
        assert first.method.memory.model.backbone is first.backbone
        assert second.method.memory.model.backbone is second.backbone
    check_fit(first.method, torch.zeros(1, FEATURES), CLASSES)
    check_fit(second.method, torch.zeros(1, FEATURES), CLASSES)
    batch = chunk(SIZES, epochs=4)
    again = bound(make(), network(seed=0))
    again.modules["global"].load_state_dict(first.backbone.state_dict())
    for name, module in again.modules.items():
        module.load_state_dict(first.server[name].state_dict())
    results = [evaluate_clients(loop(local_epochs=1), m, server_groups(m), batch) for m in (first.method, again)]
    assert torch.equal(results[0].personalized_loss, results[1].personalized_loss)
    assert torch.equal(results[0].generalized_loss, results[1].generalized_loss)


def test_a_bound_method_can_be_bound_again():
    method = bound(FineTuning(), network(seed=0))
    again = method.bind(network(seed=1), Classification())
    assert method.modules["global"] is not again.modules["global"]
    assert again.phases[0] is not method.phases[0]


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
def test_a_deep_copy_of_a_bound_method_is_its_own(make, how):
    """Its steps refer to the copy's backbone, not to that of the original."""
    method, batch = bound(make()), chunk(SIZES, epochs=4)
    copied = how(method)
    assert copied.modules["global"] is copied.model.backbone
    assert copied.model.backbone is not method.model.backbone
    expected = evaluate_clients(loop(local_epochs=1), method, server_groups(method), batch)
    for p in method.modules["global"].parameters():
        nn.init.zeros_(p)
    found = evaluate_clients(loop(local_epochs=1), copied, server_groups(copied), batch)
    assert torch.equal(found.personalized_loss, expected.personalized_loss)


class Named(FedAvg):
    """FedAvg with groups of any name."""

    def __init__(self, moves="global", part="all", **names):
        self.moves, self.part = moves, part
        for name, value in names.items():
            setattr(self, name, value)

    def training(self):
        return (Phase(self.part, (Step(self.moves, lambda groups, minibatch: 0.0),)),)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"part": "everything"}, r"part of a Phase is everything, expected 'all' or 'local' or 'global'"),
        ({"moves": "globl"}, r"a step of Named moves the group 'globl', expected 'global'"),
        ({"shared": {"golbal": "global"}}, r"shared, of the server, names the group 'golbal', expected 'global'"),
        ({"shared": {"global": "mine"}}, r"shared names the group 'mine', expected 'global'"),
        ({"private": {"head": "global"}}, r"private, at the start, names the group 'head', expected 'global'"),
        ({"private": {"global": "head"}}, r"private names the group 'head', expected 'global'"),
        ({"participation": "picks"}, r"participation names the group 'picks', expected 'global'"),
    ],
)
def test_unknown_names_are_refused_when_the_method_is_bound(settings, expected):
    with pytest.raises(ConfigurationError, match=expected):
        Named(**settings).bind(network(), Classification())
    Named().bind(network(), Classification())


def test_a_start_from_an_unknown_group_is_refused_when_the_method_is_bound():
    class Misnamed(FedAvg):
        def start(self, server):
            return {**server, "own": dict(server["globel"])}

    with pytest.raises(ConfigurationError, match=r"Misnamed\.start reads the group 'globel', expected 'global'"):
        Misnamed().bind(network(), Classification())


class Misreading(FedAvg):
    """FedAvg that asks for a group which does not exist, in one place."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def training(self):
        def objective(groups, minibatch):
            return self.loss(minibatch, groups["globel" if self.place == "step" else "global"])

        def compute(groups, examples):
            return {"own": {name: 2 * p for name, p in groups["globel"].items()}}

        derive = (Derive("all", compute),) if self.place == "derive" else ()
        return (*derive, Phase("all", (Step("global", objective),), examples="rows" if self.place == "rows" else None))

    def predict(self, groups, x):
        return Prediction(*[self.model.plain(x, groups["globel" if self.place == "predict" else "global"])] * 2)


@pytest.mark.parametrize("sizes", [(7,), (7, 5)])
@pytest.mark.parametrize("place", ["step", "derive", "rows", "predict"])
def test_a_group_that_does_not_exist_is_named_where_it_is_read(place, sizes):
    method, batch = bound(Misreading(place)), chunk(sizes, heldout=3)
    group = "rows" if place == "rows" else "globel"
    take = partial(evaluate_clients, loop()) if place == "predict" else loop().train_clients
    with pytest.raises(ConfigurationError, match=f"Misreading reads the group '{group}', expected 'global'"):
        take(method, server_groups(method), batch)


def test_a_missing_parameter_is_no_missing_group():
    class Wrong(FedAvg):
        def predict(self, groups, x):
            return {}["0.weight"]

    method, batch = bound(Wrong()), chunk((7,), heldout=3)
    with pytest.raises(KeyError, match="weight"):
        evaluate_clients(loop(), method, server_groups(method), batch)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Phase("all", (), 0), "epochs of a Phase is 0, expected a whole number of 1 or more"),
        (lambda: Phase("all", Step("global", len)), "steps of a Phase are Step.*expected a tuple of Steps"),
        (lambda: Derive("half", len), "part of a Derive is half"),
        (lambda: Step("global", len, lr_scale=0.0), "lr_scale of the step of 'global' is 0.0"),
        (lambda: Step("global", len, bounds=(1.0, 0.0)), "bounds .* smaller value first"),
    ],
)
def test_phases_and_steps_that_cannot_be_are_refused(make, expected):
    with pytest.raises(ConfigurationError, match=expected):
        make()


def test_local_trains_its_embedding_tables():
    method, batch = sequences.bound(Local(2)), sequences.batch((6, 5), epochs=2)
    server = server_groups(method)
    groups = loop().personalize(method, server, select(batch, [0]))
    for name, p in groups["local"].items():
        assert not torch.equal(p, server["global"][name]), name
    assert "embedding.weight" in groups["local"]


def partly_frozen(seed=0):
    """Its first block is frozen whole, of the second the bias alone."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(
        nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)
    )
    backbone[0].requires_grad_(False)
    backbone[2].bias.requires_grad_(False)
    return backbone


FROZEN = {"0.weight", "0.bias", "2.bias"}


@pytest.mark.parametrize("make", METHODS)
def test_frozen_parameters_are_in_no_group(make):
    """Never stacked, sent, kept or moved, and side by side the numbers are those of one client at a time."""
    method, batch = bound(make(), partly_frozen()), chunk(SIZES, epochs=4)
    if isinstance(method, Flow):
        method.router.exits.dropout.p = 0.0
        assert method.route_names == ["2", "4", "6"]
    before = copy.deepcopy(method.modules["global"].state_dict())
    server = server_groups(method)
    kept = {
        name: {k: p.expand(2, *p.shape).clone() for k, p in g.items()}
        for name, g in method.initial_state(server).items()
    }
    torch.manual_seed(0)
    update = loop(local_epochs=1).train_clients(method, server, batch, kept=kept or None)
    evaluation = evaluate_clients(loop(local_epochs=1), method, server, batch)
    groups = [*server.values(), *method.start(server).values(), *update.difference.values(), *update.kept.values()]
    for group in (*groups, *sent_parameters(method).values()):
        assert not FROZEN & group.keys()
    assert all(torch.equal(before[name], p) for name, p in method.modules["global"].state_dict().items())
    if isinstance(method, PartialFed):
        return  # its strategy is drawn per chunk
    for client in range(2):
        alone = evaluate_clients(loop(local_epochs=1), method, server, select(batch, [client]))
        torch.testing.assert_close(alone.personalized_loss[0], evaluation.personalized_loss[client])


def test_a_frozen_block_trains_as_a_plain_loop_has_it():
    from tests.support import train_alone

    method, batch = bound(FedAvg(), partly_frozen()), chunk(SIZES)
    update = delta(loop().train_clients(method, server_groups(method), batch))["global"]
    total = {name: torch.zeros_like(p) for name, p in method.modules["global"].named_parameters()}
    for client, size in enumerate(SIZES):
        backbone = copy.deepcopy(method.modules["global"])
        trained = train_alone(
            backbone,
            batch,
            client,
            2,
            4,
            optimizer=lambda ps: torch.optim.SGD(
                [p for p in ps if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.01
            ),
        )
        for name, p in trained.named_parameters():
            total[name] += size * (p.detach() - method.modules["global"].get_parameter(name).detach())
    assert update.keys() == total.keys() - FROZEN
    for name in update:
        torch.testing.assert_close(update[name], total[name], atol=1e-5, rtol=1e-4)


def test_models_of_hypcluster_have_the_same_frozen_parameters():
    method = HypCluster(clusters=3).bind(partly_frozen(), Classification())
    for name in ("cluster_1", "cluster_2"):
        for key, p in method.modules["global"].named_parameters():
            assert (p is method.modules[name].get_parameter(key)) == (key in FROZEN)


def test_a_backbone_that_is_frozen_whole_is_refused():
    with pytest.raises(ConfigurationError, match=r"no block with trainable parameters.*frozen"):
        FedAvg().bind(network().requires_grad_(False), Classification())


def test_private_and_shared_may_be_read_only():
    assert isinstance(FedRep.shared, MappingProxyType)
    Named(shared=MappingProxyType({"global": "global"})).bind(network(), Classification())


class OnePhase(FedAvg):
    """Forgets the comma of a tuple of one."""

    def training(self):
        return Phase("all", (self.train_step("global"),))


class EachExample(FedAvg):
    """Forgets to average the losses of the examples."""

    def training(self):
        def losses(groups, minibatch):
            return self.objective.losses(self.model.plain(minibatch.x, groups["global"]), minibatch.y)

        return (Phase("all", (Step("global", losses),)),)


def test_phases_are_a_tuple():
    with pytest.raises(ConfigurationError, match=r"OnePhase.training returns Phase\(part='all', .*, expected a tuple"):
        bound(OnePhase())


@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1]], ids=["side by side", "alone"])
def test_an_objective_is_a_scalar(sizes):
    method = bound(EachExample())
    with pytest.raises(
        ConfigurationError, match=r"moves the group 'global' has an objective of shape \[4\], expected a"
    ):
        loop().train_clients(method, server_groups(method), chunk(sizes))
