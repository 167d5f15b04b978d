"""Overlapped snapshots under attack: what writes to the weights while they are copied, and what happens meanwhile."""

from __future__ import annotations

import copy
import os
import threading

import numpy as np
import pytest
import torch

import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.core.array import HostArray
from highcamp.errors import StorageError, Torn
from highcamp.storage.local import LocalStore
from highcamp.training import stream
from highcamp.training.overlap import Overlap
from highcamp.training.writer import Pending

pytestmark = pytest.mark.timeout(120)


class Gate:
    """Once it is closed, holds the thread that copies late at its first array until it is opened."""

    def __init__(self, monkeypatch):
        self.entered, self.opened = threading.Event(), threading.Event()
        self.opened.set()
        self._patch = monkeypatch
        plain = HostArray.copy_to

        def copy_to(array, view, start):
            is_copier = threading.get_ident() not in {each.ident for each in threading.enumerate()}
            if is_copier and not self.opened.is_set():
                self.entered.set()
                assert self.opened.wait(60)
            plain(array, view, start)

        monkeypatch.setattr(HostArray, "copy_to", copy_to)

    def close(self):
        """From now on, hold it."""
        self.opened.clear()

    def open_at(self, cls, name):
        """Open it when a method is called: by then, the loop stands still."""
        plain = getattr(cls, name)

        def method(*arguments, **options):
            self.opened.set()
            return plain(*arguments, **options)

        self._patch.setattr(cls, name, method)


@pytest.fixture
def gate(monkeypatch):
    """The gate, still open."""
    found = Gate(monkeypatch)
    yield found
    found.opened.set()  # after a failure, nothing must wait for it


class Loop:
    """A small training whose weights are 256 KiB; step 1 is saved, and the copy of step 2 is held at the gate."""

    def __init__(self, where, gate, **options):
        torch.manual_seed(7)
        self.model = torch.nn.Linear(256, 256)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.inputs = torch.randn(4, 256)
        self.checkpointer = Checkpointer(
            where, every=Every(steps=1), keep=Keep(last=99), snapshot="overlap", verbose=0, **options
        )
        self.checkpointer.track(model=self.model, optimizer=self.optimizer)
        self.checkpointer.start()
        self.saved = {}
        self.number = 0
        self.step()
        self.save().wait()
        gate.close()
        self.step()
        self.pending = self.save()
        assert gate.entered.wait(60)

    @property
    def weight(self):
        """The largest of its weights."""
        return self.model.weight

    def step(self):
        """One step of training."""
        self.number += 1
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()

    def save(self):
        """Save, and remember what there is to be saved."""
        self.saved[self.number] = {key: value.clone().numpy() for key, value in self.model.state_dict().items()}
        return self.checkpointer.save(step=self.number)

    def look(self, *steps):
        """Assert that just these steps are on the disk, whole and as they were when they were saved."""
        run = highcamp.open(self.checkpointer.run.path)
        assert [entry.step for entry in run.checkpoints] == list(steps)
        for entry in run.checkpoints:
            found = entry.load("model")
            assert entry.verify().ok
            assert all(np.array_equal(found[key], value) for key, value in self.saved[entry.step].items())
        assert not [name for name in run.store.list("checkpoints") if name.startswith(".")]


def _untracked(loop):
    """An optimizer that nobody has told us of, which leaves no trace in the version counters."""
    loop.model(loop.inputs).square().mean().backward()
    torch.optim.SGD(loop.model.parameters(), 0.1, fused=True).step()


def _without_hooks(loop):
    """As a compiled step would, or one that somebody has replaced."""
    loop.model(loop.inputs).square().mean().backward()
    type(loop.optimizer).step.__wrapped__(loop.optimizer)


def _clipped(loop):
    with torch.no_grad():
        loop.weight.clamp_(-0.01, 0.01)


def _by_numpy(loop):
    loop.weight.detach().numpy()[:] += 1


WRITES = {
    "clipped": _clipped,
    "clipped by data": lambda loop: loop.weight.data.clamp_(-0.01, 0.01),
    "halved by data": lambda loop: loop.weight.data.mul_(0.5),  # the lower bits of the numbers stay
    "turned by data": lambda loop: loop.weight.data.neg_(),
    "by numpy": _by_numpy,
    "by an untracked optimizer": _untracked,
    "by a step without hooks": _without_hooks,
    "loaded": lambda loop: loop.model.load_state_dict(torch.nn.Linear(256, 256).state_dict()),
    "restored": lambda loop: loop.checkpointer.run.last.restore(model=loop.model),
    "moments": lambda loop: loop.optimizer.state[loop.weight]["exp_avg"].zero_(),
}


NO_MATTER = "by a step without hooks"  # where the copy lies: the step counters are compared where they live


@pytest.mark.parametrize(
    ("write", "ring"),
    [(write, None) for write in WRITES] + [(write, 1 << 20) for write in WRITES if write != NO_MATTER],
)
def test_what_writes_meanwhile_is_an_error_and_no_checkpoint(tmp_path, gate, write, ring):
    """Half old and half new weights in one checkpoint: it loads, its digest is right, and it is no state that ever was."""
    loop = Loop(tmp_path, gate, staging_bytes=ring)

    WRITES[write](loop)
    gate.opened.set()

    with pytest.raises(
        Torn, match='while the snapshot was copied, so this checkpoint is not saved; use snapshot="copy"'
    ):
        loop.checkpointer.save(step=3)
    with pytest.raises(Torn, match="(model|optimizer)/"):
        loop.pending.wait()
    loop.look(1)
    loop.step()
    loop.save().wait()
    loop.step()
    loop.save().wait()
    loop.checkpointer.close()
    loop.look(1, 3, 4)


def test_weights_swapped_for_an_evaluation_and_back_are_noticed(tmp_path, gate):
    """When the copy is complete the live weights are right again, and the copy is of the others."""
    loop = Loop(tmp_path, gate)
    before = loop.weight.detach().clone()

    loop.weight.data.copy_(torch.ones(256, 256))
    gate.opened.set()
    loop.checkpointer._saver._source._overlap._armed.ready.wait(60)
    loop.weight.data.copy_(before)

    with pytest.raises(Torn, match="model/weight was written to"):
        loop.checkpointer.close()
    loop.look(1)


def test_an_embedding_that_renormalizes_itself_is_noticed(tmp_path, gate):
    """With max_norm the forward writes to the weights."""
    loop = Loop(tmp_path, gate)
    torch.nn.functional.embedding(torch.arange(4), loop.weight, max_norm=0.01)
    gate.opened.set()

    with pytest.raises(Torn):
        loop.checkpointer.close()
    loop.look(1)


def test_warn_says_it_and_training_goes_on(tmp_path, gate, capsys):
    """Whoever chose "warn" loses one checkpoint, not the training."""
    loop = Loop(tmp_path, gate, on_error="warn")
    _clipped(loop)
    gate.opened.set()

    loop.step()
    loop.save().wait()
    loop.checkpointer.close()

    assert "a save failed and training goes on without it: model/weight was written to" in capsys.readouterr().err
    loop.look(1, 3)


HARMLESS = {
    "pointed elsewhere and back": lambda loop: (
        old := loop.weight.data,
        setattr(loop.weight, "data", torch.ones(256, 256)),
        setattr(loop.weight, "data", old),
    ),
    "pointed elsewhere": lambda loop: setattr(loop.weight, "data", torch.ones(256, 256)),
    "converted": lambda loop: loop.model.double(),
    "replaced": lambda loop: loop.model.load_state_dict(torch.nn.Linear(256, 256).state_dict(), assign=True),
    "forward and backward": lambda loop: loop.model(loop.inputs).sum().backward(),
    "optimizer loaded": lambda loop: loop.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict())),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_what_leaves_the_memory_alone_is_no_error(tmp_path, gate, change):
    """The copy is of the memory as it was: other names for other memory cost no checkpoint."""
    loop = Loop(tmp_path, gate)

    HARMLESS[change](loop)
    gate.opened.set()

    loop.pending.wait()
    loop.checkpointer.close()
    loop.look(1, 2)


def test_the_step_waits_for_the_copy(tmp_path, gate):
    """The barrier is what makes overlap safe at all: without it, each step would tear the snapshot."""
    loop = Loop(tmp_path, gate)
    gate.open_at(Overlap, "wait")

    loop.step()

    assert loop.pending.wait(60).step == 2
    loop.checkpointer.close()
    loop.look(1, 2)


MEANWHILE = {
    "restore": lambda loop: loop.checkpointer.restore("last"),
    "rewind": lambda loop: loop.checkpointer.restore(),
    "close": lambda loop: loop.checkpointer.close(),
    "save again": lambda loop: loop.checkpointer.save(step=2),
}


@pytest.mark.parametrize("call", MEANWHILE)
def test_calls_wait_for_the_copy(tmp_path, gate, call):
    """A restore into weights that are being copied would tear the snapshot, and a close would leave it half-written."""
    loop = Loop(tmp_path, gate)
    gate.open_at(Pending, "unseen_error")

    MEANWHILE[call](loop)
    loop.checkpointer.close()

    run = highcamp.open(tmp_path)
    assert [entry.step for entry in run.checkpoints] == ([1, 2, 2] if call == "save again" else [1, 2])
    assert all(result.ok for result in run.verify())
    assert np.array_equal(run.last.load("model")["weight"], loop.saved[2]["weight"])


def test_logging_does_not_wait(tmp_path, gate):
    """A row of metrics between a save and the next step is the usual case."""
    loop = Loop(tmp_path, gate)

    loop.checkpointer.log(loss=1.0)
    gate.opened.set()

    loop.checkpointer.close()
    loop.look(1, 2)


def test_an_exception_of_the_loop_does_not_cost_the_checkpoint(tmp_path, gate):
    """The last save before a crash is the one that is needed."""
    loop = Loop(tmp_path, gate)
    gate.open_at(Pending, "unseen_error")

    with pytest.raises(ZeroDivisionError), loop.checkpointer:
        raise ZeroDivisionError

    loop.look(1, 2)
    assert not loop.optimizer._optimizer_step_pre_hooks


def test_ctrl_c_in_the_barrier_is_raised_and_nothing_is_torn(tmp_path, gate, monkeypatch):
    """Swallowed, it would end nothing; let through with the step done, it would tear; a piece lost would hang the exit."""
    monkeypatch.setattr(stream, "PIECE_BYTES", 64 << 10)
    monkeypatch.setattr(stream, "HAND_BYTES", 1)
    loop = Loop(tmp_path, gate)
    held, pressed = HostArray.copy_to, []

    def interrupted(array, view, start):
        if threading.current_thread() is threading.main_thread() and not pressed:
            pressed.append(start)
            view[:] = bytes(len(view))  # half of the copy
            raise KeyboardInterrupt
        held(array, view, start)

    monkeypatch.setattr(HostArray, "copy_to", interrupted)
    before = loop.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        loop.step()
    assert torch.equal(loop.weight, before)
    gate.open_at(Overlap, "wait")

    loop.optimizer.step()

    loop.pending.wait()
    loop.checkpointer.close()
    loop.look(1, 2)


def test_a_failed_save_lets_go_of_the_memory_before_the_next(tmp_path, gate):
    """The disk fails at once, the next save begins: a copy that still runs must not write into its memory."""

    class Full(LocalStore):
        def create(self, path, chunks):
            if "step-00000002" in path:
                raise StorageError("full")
            super().create(path, chunks)

    loop = Loop(Full(tmp_path), gate, on_error="warn")
    loop.pending._done.wait(60)
    gate.open_at(Overlap, "wait")

    with torch.no_grad():
        loop.weight.fill_(3.0)
    loop.number = 3
    loop.save()

    loop.checkpointer.close()
    loop.look(1, 3)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_workers_of_a_data_loader_are_forked_meanwhile(tmp_path, gate):
    """They inherit everything but the threads: a lock that was held in the copy would never be given back."""
    loop = Loop(tmp_path, gate)

    data = torch.utils.data.DataLoader(torch.arange(8.0), batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert torch.cat(list(data)).tolist() == list(range(8))

    gate.opened.set()
    loop.pending.wait()
    loop.checkpointer.close()
    loop.look(1, 2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_may_train_on_and_saves_nothing(tmp_path, gate):
    """The memory, the thread that copies and the run are its parent's: it must neither crash, nor hang, nor write."""
    loop = Loop(tmp_path, gate)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # its pool of threads has not survived the fork either
            loop.weight.grad = torch.ones_like(loop.weight)
            loop.optimizer.step()
            try:
                loop.checkpointer.save(step=9).wait()
            except highcamp.RunLocked:
                loop.checkpointer.close()
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    gate.opened.set()
    loop.pending.wait()
    loop.checkpointer.close()
    loop.look(1, 2)
