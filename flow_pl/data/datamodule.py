"""The base class of all data modules: from a reader of clients to Lightning's loaders of chunks."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L  # noqa: N812 (the name that Lightning's own documentation uses)
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from flow_pl.data.availability import Availability
from flow_pl.data.batch import ClientBatch
from flow_pl.data.feature_scale import warn_of_large_features
from flow_pl.data.federation import Federation, Heldout, Ints, Population, check_split
from flow_pl.data.loaders import (
    Loader,
    clients_to_predict,
    clients_to_test,
    clients_to_validate,
    make_loader,
    nothing_to_evaluate,
)
from flow_pl.data.model_inputs import first_examples, shape_of, transformed_chunk, transformed_rows
from flow_pl.data.rounds import count_rounds
from flow_pl.data.sampler import SamplingName, check_cycle
from flow_pl.data.store.cache import build_store, store_path
from flow_pl.data.store.client_store import ClientStore
from flow_pl.data.store.writer import ClientData
from flow_pl.data.summary import summarize
from flow_pl.errors import DataError, brief
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import given, require_choice, require_count


class FederatedDataModule(ABC, L.LightningDataModule):
    """Clients from any source, stored once, split and loaded in chunks.

    A new data set is a subclass with its own settings, `options` and `clients`; it passes on the settings below by
    `**kwargs`.

    Args:
        cohort_size: number of clients sampled in a round of training; with `sampling: poisson`, its expectation.
        chunk_size: number of clients trained or evaluated side by side; "auto" = the size that the first rounds find
            fastest on this machine and that fits into its memory. The results are the same, up to rounding.
        dropout: probability that a sampled client goes offline before it reports; it is then not trained.
        deadline: number of training examples that a client of median speed processes in a round; clients that need
            longer are left out; null = wait for all.
        speed_spread: standard deviation of the logarithm of a client's speed, for the deadline; drawn each round.
        val_clients: number of clients evaluated at each validation, always the same ones, so that rounds can be
            compared; drawn by `seed` from the seen clients (or from those that the data marks for validation) that have
            validation rows; null = all of them.
        new_client_fraction: share of the clients that are never sampled in training and are tested separately; has no
            effect if the data names its test clients.
        val_fraction: share of each client's examples for validation.
        test_fraction: share of each client's examples for testing.
        min_examples: clients with fewer labelled examples are left out.
        unusable_clients: what to do with a client that has no label at all, or none to train on, so nothing can be
            learned from it: "skip" = leave it out with a warning, "error" = stop.
        split_seed: seed of the data: generated clients, splits, new clients.
        seed: seed of the cohorts and of the order of the examples; null = the seed of the run (`seed_everything`),
            or 0 if there is none.
        num_workers: number of prefetching processes; 0 = read in the training process.
        sampling: "fixed" samples `cohort_size` clients without replacement; "poisson" each client independently with
            the same probability, as privacy accountants assume: cohorts vary in size; "cyclic_poisson" does so among
            the clients of one group, whose turn it is.
        cycle_length: number of groups of "cyclic_poisson", into which the clients are divided at random by `seed`.
        cache_dir: folder of the client stores; null = the environment variable FLOW_PL_CACHE, or else
            ~/.cache/flow_pl.

    Attributes:
        unevaluated: indices of clients that are left out of validation and test; set before the loaders are created.

    Raises:
        ConfigurationError: a setting is out of range; raised as early as possible.
    """

    def __init__(
        self,
        cohort_size: int = 10,
        chunk_size: int | Literal["auto"] = 10,
        dropout: float = 0.0,
        deadline: int | None = None,
        speed_spread: float = 0.0,
        val_clients: int | None = None,
        new_client_fraction: float = 0.1,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        min_examples: int = 1,
        split_seed: int = 0,
        seed: int | None = None,
        num_workers: int = 0,
        cache_dir: str | None = None,
        sampling: SamplingName = "fixed",
        cycle_length: int = 1,
        unusable_clients: Literal["error", "skip"] = "skip",
    ) -> None:
        super().__init__()
        require_count(cohort_size=cohort_size, **given(val_clients=val_clients))
        if isinstance(chunk_size, str):
            require_choice(("auto",), chunk_size=chunk_size)
        else:
            require_count(chunk_size=chunk_size)
        check_split(val_fraction, test_fraction, new_client_fraction, min_examples, split_seed)
        require_count(0, num_workers=num_workers, **given(seed=seed))
        check_cycle(sampling, cycle_length)
        require_choice(("error", "skip"), unusable_clients=unusable_clients)
        self.cohort_size = cohort_size
        self.chunk_size: int | Literal["auto"] = chunk_size
        self.availability = Availability(dropout, deadline, speed_spread)
        self.val_clients = val_clients
        self.new_client_fraction = new_client_fraction
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.min_examples = min_examples
        self.split_seed = split_seed
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.sampling: SamplingName = sampling
        self.cycle_length = cycle_length
        self.unevaluated: Ints = np.zeros(0, dtype=np.int64)
        self.unusable_clients = unusable_clients
        self._left_out: list[str] = []
        self._federation: Federation | None = None

    @property
    def orders(self) -> int:
        """Return how many orderings of a client's examples are drawn: as many as the trainer's module needs, else 1."""
        module = None if self.trainer is None else self.trainer.lightning_module
        return int(getattr(module, "orders", 1))

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return everything that the stored rows depend on, as JSON types; see `file_identity` for source files."""

    @abstractmethod
    def clients(self) -> Iterable[ClientData]:
        """Read or generate the clients, one at a time and always in the same order."""

    def class_count(self) -> int | None:
        """Return the number of classes; None = the largest label + 1."""
        return None

    def label_names(self) -> Sequence[str]:
        """Return the class names in the order of their numbers, empty if unnamed; called after all clients are read."""
        return ()

    def transform(self, x: Tensor) -> Tensor:
        """Turn stored features into inputs of a model; runs on the device, for any leading axes.

        Args:
            x: features as stored; of a mapping, one of its tensors.

        Returns:
            float32 in 0..1 for bytes (pixels), 0 and 1 for booleans, float32 for other floats, int64 for other
            integers (tokens).
        """
        if x.dtype == torch.uint8:
            return x.float() / 255
        return x.float() if x.is_floating_point() or x.dtype == torch.bool else x.long()

    # Hooks that Lightning calls

    def prepare_data(self) -> None:
        """Write the client store unless it exists.

        Raises:
            DataError: the source cannot be used.
            ConfigurationError: the cache cannot be written to.
        """
        path = self.store_path
        if not path.exists():
            self._left_out = []
            leave_out = self._left_out.append if self.unusable_clients == "skip" else None
            build_store(path, self.clients(), self.class_count(), self.label_names, leave_out)
            if self._left_out:
                rank_zero_warn(
                    f"clients left out, since they have no label or no usable example: {len(self._left_out)} "
                    f"({brief(self._left_out)})."
                )

    def setup(self, stage: str | None = None) -> None:
        """Open the store and split it.

        Args:
            stage: fit, validate, test or predict; all are set up alike.

        Raises:
            DataError: the store is missing or damaged.
            ConfigurationError: the settings do not fit the data.
        """
        if self._federation is None:
            path = self.store_path
            if not path.exists():
                raise DataError(f"there is no client store {path}: call prepare_data() first, with the same cache_dir.")
            self._federation = Federation(
                ClientStore.open(path),
                val_fraction=self.val_fraction,
                test_fraction=self.test_fraction,
                new_client_fraction=self._fraction_to_draw,
                min_examples=self.min_examples,
                split_seed=self.split_seed,
            )
            examples = first_examples(self, 64)
            rank_zero_info(summarize(self._federation, examples))
            warn_of_large_features(examples)

    def train_dataloader(self) -> Loader:
        """Return a loader of each round's cohort, in chunks.

        Raises:
            ConfigurationError: `cohort_size` is larger than the number of seen clients.
        """
        return self._loader(self.federation.seen, None, self.cohort_size, "cohort_size")

    def val_dataloader(self) -> Loader | list[Loader]:
        """Return a loader of clients with their validation rows; an empty list skips validation if there are none.

        These are the clients that the data marks for validation, if any, and the seen clients otherwise.

        Raises:
            ConfigurationError: `val_clients` is larger than the number of clients that can be evaluated; or there are
                none, and only validation is requested.
        """
        clients = clients_to_validate(self)
        return self._loader(clients, "val", self.val_clients, "val_clients") if len(clients) else []

    def test_dataloader(self) -> list[Loader]:
        """Return loaders of clients with their test rows, one for each of `test_populations`.

        Raises:
            ConfigurationError: no client has any.
        """
        if not self.test_populations:
            raise nothing_to_evaluate(self, "test", "test_fraction")
        return [self._loader(clients, "test") for clients in clients_to_test(self).values()]

    def predict_dataloader(self) -> Loader:
        """Return a loader of all clients with their test rows and their unlabelled rows.

        Raises:
            ConfigurationError: no client has any.
        """
        return self._loader(clients_to_predict(self), "predict")

    def on_before_batch_transfer(self, batch: ClientBatch, dataloader_idx: int) -> ClientBatch:
        """Log against rounds what Lightning logs per batch, before callbacks see the chunk."""
        if self.trainer is not None and self.trainer.training:
            count_rounds(self.trainer)
        return batch

    def transfer_batch_to_device(self, batch: ClientBatch, device: torch.device, dataloader_idx: int) -> ClientBatch:
        """Move a chunk to the device, asynchronously if its memory is pinned."""
        return batch if batch.client.device == device else batch.to(device, non_blocking=device.type == "cuda")

    def on_after_batch_transfer(self, batch: ClientBatch, dataloader_idx: int) -> ClientBatch:
        """Transform the features on the device: bytes are a quarter of the size of the floats they become."""
        return transformed_chunk(self, batch)

    # What the module and the callbacks read, after `setup`

    @property
    def federation(self) -> Federation:
        """Return the clients and their splits."""
        if self._federation is None:
            raise RuntimeError("the data is not set up: call prepare_data() and setup() first")
        return self._federation

    @property
    def store_path(self) -> Path:
        """Return the folder of the client store, which `prepare_data` writes."""
        return store_path(self.cache_dir, type(self).__name__, self.options())

    @property
    def run_seed(self) -> int:
        """Return the seed of the run, for cohorts, orders and everything else that a round draws."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    @property
    def population_size(self) -> int:
        """Return the number of clients that the cohorts are drawn from."""
        return len(self.federation.seen)

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return self.federation.store.meta.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class names in the order of their numbers if the labels are texts; otherwise none."""
        return self.federation.store.meta.class_names

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Return the shape of one example's features, as passed to a model.

        Raises:
            ConfigurationError: there are several inputs by name.
        """
        return shape_of(self.example())

    @property
    def test_populations(self) -> tuple[Population, ...]:
        """Return the population of each test loader: seen, new, or both in this order."""
        return tuple(clients_to_test(self))

    def example(self) -> Inputs:
        """Return the features of one training example, [1, ...], as passed to a model."""
        return first_examples(self, 1)

    def examples(self, client: int, part: Literal["train", "val", "test", "unlabelled"]) -> tuple[Inputs, Tensor]:
        """Return a client's examples, to personalize or evaluate a model outside a Trainer.

        Args:
            client: index into the client store, such as one of `federation.seen` or `federation.new`.
            part: part of the client's split.

        Returns:
            Features [n, ...] as passed to a model (a mapping for several inputs), and targets [n] or [n, ...], int64,
            -1 without a label; real values are float32, NaN without a label.
        """
        store = self.federation.store
        rows, stored = getattr(self.federation.split(client), part), store.read(client)
        y = torch.from_numpy(stored.y[rows])
        return transformed_rows(self, stored.x, rows), y.float() if store.real_valued else y.long()

    def client_name(self, client: int) -> str:
        """Return the name of a client, as in the source data."""
        return self.federation.store.name(client)

    def population(self, client: int) -> Population:
        """Return whether a client is seen, new, for validation, or left out."""
        return self.federation.population(client)

    @property
    def _fraction_to_draw(self) -> float:
        """Return the share of the stored clients still to be drawn as new clients."""
        return self.new_client_fraction

    def _loader(
        self, clients: Ints, heldout: Heldout | None, cohort_size: int | None = None, setting: str = "cohort_size"
    ) -> Loader:
        return make_loader(self, clients, heldout, cohort_size, setting)
