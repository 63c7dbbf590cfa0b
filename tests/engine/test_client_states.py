"""What clients keep: the store, and stateful methods in rounds, checkpoints and processes."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from flow_pl.engine.client_states import ClientStates
from flow_pl.errors import ConfigurationError, DataError, FlowError
from flow_pl.methods import Ditto
from tests.test_module import _KillAt, _KilledError, data, fitted, module, parameters, trainer

TEMPLATE = {"personal": {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "bias": torch.tensor([5.0])}}


def states(folder, population=6, **settings):
    return ClientStates(TEMPLATE, population, folder, **settings)


def stacked(*values):
    column = torch.tensor(values)
    return {"personal": {"weight": column.view(-1, 1, 1).expand(-1, 2, 2), "bias": -column.view(-1, 1)}}


def kept(store, *clients):
    groups = store.read(torch.tensor(clients), TEMPLATE)
    return torch.cat([groups["personal"]["weight"].flatten(1), groups["personal"]["bias"]], dim=1)


def test_clients_find_what_they_kept_and_others_the_initial_values(tmp_path):
    store = states(tmp_path)
    store.write(torch.tensor([4, 1]), stacked(7.0, 8.0))
    store.commit()
    expected = [[1, 2, 3, 4, 5], [8, 8, 8, 8, -8], [7, 7, 7, 7, -7]]
    assert kept(store, 0, 1, 4).tolist() == expected
    store.write(torch.tensor([1]), stacked(9.0))
    store.commit()
    assert kept(store, 1, 4).tolist() == [[9, 9, 9, 9, -9], [7, 7, 7, 7, -7]]
    assert store.known().tolist() == [1, 4]
    assert store.bytes_per_client == 5 * 4


def test_other_tensors_than_those_of_the_start_are_refused(tmp_path):
    """A longer row would reach into the state of the next client."""
    store, longer = states(tmp_path), stacked(7.0)
    longer["personal"]["bias"] = torch.zeros(1, 2)
    with pytest.raises(ConfigurationError, match=r"personal.bias \[2\], expected .*personal.bias \[1\]"):
        store.write(torch.tensor([4]), longer)


def test_a_round_that_is_broken_off_changes_nothing(tmp_path):
    store = states(tmp_path)
    store.write(torch.tensor([2]), stacked(7.0))
    store.commit()
    store.write(torch.tensor([2, 3]), stacked(8.0, 8.0))
    assert kept(store, 2, 3).tolist() == [[7, 7, 7, 7, -7], [1, 2, 3, 4, 5]]
    store.discard()
    store.commit()
    assert kept(store, 2, 3).tolist() == [[7, 7, 7, 7, -7], [1, 2, 3, 4, 5]]


def test_a_checkpoint_goes_by_the_names_of_clients(tmp_path):
    """So that it fits data where the same clients stand elsewhere; those that are gone are left out."""
    store = states(tmp_path)
    store.write(torch.tensor([5, 0]), stacked(7.0, 8.0))
    store.commit()
    saved = store.state_dict("abcdef".__getitem__)
    assert saved["clients"] == ["a", "f"]
    other = states(tmp_path, population=3)
    other.write(torch.tensor([0]), stacked(1.0))
    other.commit()
    other.load_state_dict(saved, {"x": 0, "f": 1}.get)
    assert other.known().tolist() == [1]
    assert kept(other, 1).tolist() == [[7, 7, 7, 7, -7]]
    with pytest.raises(DataError, match=r"none of the 2 clients whose state .* 'a'"):
        other.load_state_dict(saved, {}.get)
    with pytest.raises(ConfigurationError, match=r"keep head.b \[2\], expected personal.weight \[2, 2\]"):
        other.load_state_dict({**saved, "layout": [["head", "b", [2]]]}, {}.get)


def test_the_file_has_no_name_and_takes_no_space_for_clients_never_sampled(tmp_path):
    store = states(tmp_path, population=10_000_000)
    store.write(torch.tensor([9_999_999]), stacked(7.0))
    store.commit()
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(store._file).st_blocks * 512 < 2**20
    assert kept(store, 9_999_999).tolist() == [[7, 7, 7, 7, -7]]


def test_memory_does_not_grow_with_what_is_kept(tmp_path):
    """64 MB go to the file, in rows of 64 kB; the process grows by less than a tenth of that."""
    template = {"personal": {"weight": torch.zeros(2**14)}}
    store = ClientStates(template, 1000, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for client in range(1000):
        store.write(torch.tensor([client]), {"personal": {"weight": torch.full((1, 2**14), float(client))}})
    store.commit()
    assert store.read(torch.tensor([999]), template)["personal"]["weight"][0, 0] == 999
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 6400


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    store = states(tmp_path)
    monkeypatch.setattr(os, "pwrite", lambda file, row, offset: len(row) - 1)
    with pytest.raises(FlowError, match=r"the clients' state cannot be written .*No space left.* 20 bytes a client"):
        store.write(torch.tensor([0]), stacked(7.0))


def test_a_folder_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"cannot be opened in .*file.*default_root_dir"):
        states(tmp_path / "file")


def ditto():
    return Ditto(regularization=0.3)


def personal(model):
    known = model.states.known()
    return known.tolist(), model.states.state_dict(str)["rows"]


def test_sampled_clients_keep_their_models_and_the_size_is_logged(tmp_path):
    model, run = fitted(tmp_path, ditto(), rounds=1)
    known, rows = personal(model)
    assert len(known) == 6
    assert run.callback_metrics["train/clients_with_state"] == 6
    assert run.callback_metrics["train/state_bytes"] == rows.numel() * 4
    assert rows.shape == (6, sum(p.numel() for p in model.backbone.parameters()))
    assert len({tuple(row.tolist()) for row in rows}) == 6


def test_evaluation_starts_from_what_clients_kept_and_writes_nothing(tmp_path):
    model, _ = fitted(tmp_path, ditto(), rounds=2)
    before = personal(model)
    [seen, *_] = trainer().validate(model, datamodule=data(tmp_path / "cache"), verbose=False)
    after = personal(model)
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    model.states.load_state_dict({**model.states.state_dict(str), "clients": [], "rows": before[1][:0]}, {}.get)
    [forgotten, *_] = trainer().validate(model, datamodule=data(tmp_path / "cache"), verbose=False)
    assert seen["val/personalized_loss"] != forgotten["val/personalized_loss"]
    assert seen["val/generalized_loss"] == forgotten["val/generalized_loss"]


def test_the_clients_of_other_data_start_from_the_server(tmp_path):
    """They are as many, and of the same names, but not the ones that kept something."""
    model, run = fitted(tmp_path, ditto(), trainer_settings={"default_root_dir": tmp_path})
    others = data(tmp_path / "cache", split_seed=5)
    after = run.test(model, datamodule=others, verbose=False)
    fresh = module(ditto())
    fresh.load_state_dict(model.state_dict())
    assert after == trainer(default_root_dir=tmp_path).test(fresh, datamodule=others, verbose=False)
    assert not len(model.states.known())


def test_a_killed_run_of_a_stateful_method_resumes_bit_identical(tmp_path):
    whole, _ = fitted(tmp_path, ditto(), rounds=4)
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    interrupted = {"callbacks": [checkpoint, _KillAt(batch=5)], "enable_checkpointing": True}
    with pytest.raises(_KilledError):
        fitted(tmp_path, ditto(), rounds=4, trainer_settings=interrupted)
    lightning.seed_everything(0, verbose=False)
    resumed, run = module(ditto()), trainer(4)
    run.fit(resumed, datamodule=data(tmp_path / "cache"), ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))
    assert torch.equal(parameters(resumed), parameters(whole))
    assert personal(resumed)[0] == personal(whole)[0]
    assert torch.equal(personal(resumed)[1], personal(whole)[1])


def test_an_interrupted_round_leaves_no_state_behind(tmp_path):
    reference, _ = fitted(tmp_path, ditto(), rounds=1)
    lightning.seed_everything(0, verbose=False)
    model = module(ditto())
    with pytest.raises(_KilledError):
        trainer(1, callbacks=[_KillAt(batch=1)]).fit(model, datamodule=data(tmp_path / "cache"))
    assert personal(model)[0] == []
    trainer(1).fit(model, datamodule=data(tmp_path / "cache"))
    assert torch.equal(personal(model)[1], personal(reference)[1])


class _FailAt(Callback):
    """Raises where the server is about to take a step."""

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == 1:
            raise _KilledError


def test_a_round_whose_server_step_fails_is_repeated_from_the_states_at_its_start(tmp_path):
    first, _ = fitted(tmp_path, ditto(), rounds=1)
    whole, _ = fitted(tmp_path, ditto(), rounds=2)
    lightning.seed_everything(0, verbose=False)
    model, folder = module(ditto()), tmp_path / "ckpt"
    run = trainer(2, callbacks=[OnExceptionCheckpoint(folder), _FailAt()], enable_checkpointing=True)
    with pytest.raises(_KilledError):
        run.fit(model, datamodule=data(tmp_path / "cache"))
    assert personal(model)[0] == personal(first)[0]
    assert torch.equal(personal(model)[1], personal(first)[1])
    resumed = module(ditto())
    trainer(2).fit(resumed, datamodule=data(tmp_path / "cache"), ckpt_path=str(folder / "on_exception.ckpt"))
    assert torch.equal(parameters(resumed), parameters(whole))
    assert torch.equal(personal(resumed)[1], personal(whole)[1])


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_size": 1},
        *(pytest.param(change, marks=pytest.mark.slow) for change in ({"chunk_size": 6}, {"num_workers": 2})),
    ],
    ids=str,
)
def test_chunks_and_workers_change_no_state(tmp_path, change):
    reference, _ = fitted(tmp_path, ditto())
    other, _ = fitted(tmp_path, ditto(), **change)
    assert personal(other)[0] == personal(reference)[0]
    torch.testing.assert_close(personal(other)[1], personal(reference)[1], atol=1e-5, rtol=1e-4)


SCRIPT = """
import sys, torch, lightning
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.engine.test_client_states import ditto, personal
from tests.test_module import data, module, trainer
folder, processes, cohort = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rounds, checkpoint = int(sys.argv[4]), sys.argv[5:]
lightning.seed_everything(0, verbose=False)
model, run = module(ditto()), trainer(rounds)
callbacks = [*run.callbacks[:2], ModelCheckpoint(folder / "ckpt", save_last=True, every_n_epochs=1)]
run = lightning.Trainer(max_epochs=rounds, accelerator="cpu", devices=processes, strategy="ddp", inference_mode=False,
    logger=False, use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
    num_sanity_val_steps=0, callbacks=callbacks, default_root_dir=folder)
run.fit(model, datamodule=data(folder / "cache", cohort_size=cohort), ckpt_path=checkpoint[0] if checkpoint else None)
if run.is_global_zero:
    server = torch.cat([p.detach().reshape(-1) for p in model.server.parameters()])
    torch.save((server, *personal(model)), folder / "out")
"""


def distributed(folder, *arguments):
    script = folder / "run.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder), *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "cohort"),
    [(2, 1), pytest.param(2, 5, marks=pytest.mark.extended), pytest.param(3, 5, marks=pytest.mark.extended)],
)
def test_processes_keep_what_one_keeps(tmp_path, processes, cohort):
    """Four rounds, of which the last two are resumed, so that clients move between processes."""
    alone, _ = fitted(tmp_path, ditto(), rounds=4, cohort_size=cohort)
    distributed(tmp_path, processes, cohort, 2)
    server, known, rows = distributed(tmp_path, processes, cohort, 4, tmp_path / "ckpt" / "last.ckpt")
    torch.testing.assert_close(server, parameters(alone), atol=1e-5, rtol=1e-4)
    assert known == personal(alone)[0]
    torch.testing.assert_close(rows, personal(alone)[1], atol=1e-5, rtol=1e-4)
