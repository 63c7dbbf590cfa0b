"""Simulated attacks on clients' data or updates, determined by the seed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.data.federation import Ints
from flow_pl.engine.counter_random import client_keys, normal, uniform
from flow_pl.errors import ConfigurationError
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import Inputs, described, first
from flow_pl.utils.rng import Stream, generator
from flow_pl.utils.validation import require_count, require_positive, require_share

GAUSSIAN, POISONED = 2, 3
"""Purposes of random numbers; see `client_keys`."""


class Attack:
    """Draws the attackers once per run; a base class whose attackers behave honestly.

    Attackers are never evaluated: all metrics of validation and test are over honest clients.

    Args:
        share: share of the training clients that attack.

    Raises:
        ConfigurationError: `share` is not in (0, 1].
    """

    def __init__(self, share: float = 0.1) -> None:
        require_positive(share=share)
        require_share(share=share)
        self.share = share
        self.seed = 0
        self.clients: Ints | None = None
        self._members = torch.zeros(0, dtype=torch.bool)

    def choose(self, clients: Ints, population: int, seed: int) -> Ints:
        """Choose the attackers.

        Args:
            clients: [M] indices of the training clients.
            population: number of clients in the store.
            seed: seed of the run.

        Returns:
            Their indices, in ascending order.
        """
        self.seed = seed
        count = math.ceil(self.share * len(clients) - 1e-9)
        chosen = generator(seed, Stream.ATTACKERS).choice(len(clients), count, replace=False)
        self.clients = clients[chosen]
        self.clients.sort()
        self._members = torch.zeros(population, dtype=torch.bool)
        self._members[torch.from_numpy(self.clients)] = True
        return self.clients

    def expected(self, cohort: int) -> int:
        """Return the expected number of attackers in a cohort, rounded up."""
        return math.ceil(self.share * cohort - 1e-9)

    def members(self, client: Tensor) -> Tensor:
        """Return which of the clients [C] attack: [C] bool."""
        self._members = self._members.to(client.device)
        return self._members[client]

    def check(self, example: Inputs, num_classes: int, label_shape: tuple[int, ...]) -> None:
        """Reject data that the attack does not support.

        Args:
            example: features of one instance [1, ...], or several by name.
            num_classes: number of classes of the data.
            label_shape: shape of an instance's label.

        Raises:
            ConfigurationError: the data is not supported.
        """

    def poison(self, batch: ClientBatch, num_classes: int) -> ClientBatch:
        """Poison the attackers' examples in a training batch; return a new batch if anything changes."""
        return batch

    def corrupt(self, difference: Groups, client: Tensor, round_: int) -> None:
        """Change the attackers' updates in place; they are given by group and name [C, ...], for the clients [C]."""


class LabelFlip(Attack):
    """Lets attackers train on the label classes - 1 - y in place of y.

    Tolpegin et al., Data Poisoning Attacks Against Federated Learning Systems (ESORICS 2020).

    Args:
        share: share of the training clients that attack.
    """

    def check(self, example: Inputs, num_classes: int, label_shape: tuple[int, ...]) -> None:
        """Require one label per instance; see `Attack.check`."""
        _require_one_label(self, label_shape, num_classes)

    def poison(self, batch: ClientBatch, num_classes: int) -> ClientBatch:
        """See `Attack.poison`."""
        attackers = self.members(batch.client)[:, None]
        y = torch.where(attackers, num_classes - 1 - batch.train.y, batch.train.y)
        return replace(batch, train=replace(batch.train, y=y))


class SignFlip(Attack):
    """Lets attackers send the negative of their update, multiplied by a factor.

    Li et al., RSA: Byzantine-Robust Stochastic Aggregation Methods (AAAI 2019).

    Args:
        share: share of the training clients that attack.
        scale: factor on the negated update.
    """

    def __init__(self, share: float = 0.1, scale: float = 1.0) -> None:
        super().__init__(share)
        require_positive(scale=scale)
        self.scale = scale

    def corrupt(self, difference: Groups, client: Tensor, round_: int) -> None:
        """See `Attack.corrupt`."""
        _multiply(difference, self.members(client), -self.scale)


class GaussianAttack(Attack):
    """Lets attackers send normal random numbers, drawn anew in each round, as in the experiments of Krum's paper.

    Args:
        share: share of the training clients that attack.
        std: standard deviation of the random numbers.
    """

    def __init__(self, share: float = 0.1, std: float = 1.0) -> None:
        super().__init__(share)
        require_positive(std=std)
        self.std = std

    def corrupt(self, difference: Groups, client: Tensor, round_: int) -> None:
        """See `Attack.corrupt`."""
        attackers = self.members(client)
        for i, p in enumerate(p for group in difference.values() for p in group.values()):
            keys = client_keys(client, self.seed, round_, GAUSSIAN + 16 * i)
            noise = self.std * normal(keys, p[0].numel()).view_as(p)
            p.copy_(torch.where(attackers.view(-1, *[1] * (p.ndim - 1)), noise, p))


class Backdoor(Attack):
    """Lets attackers train the model to answer a trigger with one class, and scale up their updates to succeed.

    Model replacement of Bagdasaryan et al., How to Backdoor Federated Learning (AISTATS 2020): some of an attacker's
    examples get the trigger and the target's label, and its update is scaled up. The trigger is a patch of ones in
    the last rows and columns of an image, or in the last features of a vector.

    Args:
        share: share of the training clients that attack.
        target: class that the trigger should cause.
        scale: factor on the attackers' updates.
        poisoned: share of an attacker's examples that get the trigger.
        size: size of the patch, in pixels or features along each axis.

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    def __init__(
        self, share: float = 0.1, target: int = 0, scale: float = 10.0, poisoned: float = 0.5, size: int = 4
    ) -> None:
        super().__init__(share)
        require_count(0, target=target)
        require_count(size=size)
        require_positive(scale=scale, poisoned=poisoned)
        require_share(poisoned=poisoned)
        self.target = target
        self.scale = scale
        self.poisoned = poisoned
        self.size = size

    def check(self, example: Inputs, num_classes: int, label_shape: tuple[int, ...]) -> None:
        """Require floating-point features with room for the patch and one label per instance; see `Attack.check`."""
        _require_one_label(self, label_shape, num_classes)
        if isinstance(example, dict):
            raise ConfigurationError(
                f"the data has several inputs by name ({described(example)}), but Backdoor puts its trigger into one "
                "tensor: use images or vectors of floating-point numbers, or another attack."
            )
        if not example.is_floating_point() or example.ndim < 2:
            raise ConfigurationError(
                f"features of type {example.dtype} and shape {list(example.shape[1:])} have no place for the trigger "
                "of Backdoor: use images or vectors of floating-point numbers, or another attack."
            )
        sides = example.shape[1:][-2:]
        if self.size > min(sides):
            raise ConfigurationError(
                f"model.attack.size is {self.size}, but the features have shape {list(example.shape[1:])}: expected at "
                f"most {min(sides)}."
            )
        if self.target >= num_classes:
            raise ConfigurationError(
                f"model.attack.target is {self.target}, but the classes are 0 to {num_classes - 1}: choose one of them."
            )

    def poison(self, batch: ClientBatch, num_classes: int) -> ClientBatch:
        """See `Attack.poison`."""
        train = batch.train
        keys = client_keys(batch.client, self.seed, 0, POISONED)
        poisoned = (uniform(keys, train.mask.shape[1]) < self.poisoned) & self.members(batch.client)[:, None]
        clean = first(train.x)  # the only input, see `check`
        x = torch.where(poisoned.view(*poisoned.shape, *[1] * (clean.ndim - 2)), self.stamped(clean), clean)
        y = torch.where(poisoned, self.target, train.y)
        return replace(batch, train=replace(train, x=x, y=y))

    def corrupt(self, difference: Groups, client: Tensor, round_: int) -> None:
        """See `Attack.corrupt`."""
        _multiply(difference, self.members(client), self.scale)

    def stamped(self, x: Tensor) -> Tensor:
        """Copy features [C, N, ...] and add the trigger."""
        x = x.clone()
        if x.ndim == 3:
            x[..., -self.size :] = 1.0
        else:
            x[..., -self.size :, -self.size :] = 1.0
        return x

    def triggered(self, batch: ClientBatch) -> ClientBatch:
        """Create an evaluation batch for the target: held-out examples of other classes, with the trigger."""
        heldout = batch.heldout
        assert heldout is not None
        mask = heldout.mask & (heldout.y != self.target)
        target = torch.full_like(heldout.y, self.target)
        return replace(batch, heldout=Examples(self.stamped(first(heldout.x)), target, mask, heldout.sizes))


def _multiply(difference: Groups, attackers: Tensor, factor: float) -> None:
    factors = torch.where(attackers, factor, 1.0)
    for p in (p for group in difference.values() for p in group.values()):
        p.mul_(factors.view(-1, *[1] * (p.ndim - 1)))


def _require_one_label(attack: Attack, label_shape: tuple[int, ...], num_classes: int) -> None:
    if num_classes < 2:
        raise ConfigurationError(
            f"{type(attack).__name__} changes an instance's class, but the data has a single class, or real values for "
            "labels: use another attack."
        )
    if label_shape:
        raise ConfigurationError(
            f"{type(attack).__name__} cannot change labels of shape {list(label_shape)}: use data with one label "
            "per instance, or another attack."
        )
