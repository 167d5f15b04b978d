"""Overlapped snapshots of real PyTorch loops: the same files as plain copies, whatever the loop is made of."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.training.overlap import Overlap

pytestmark = pytest.mark.timeout(120)
STEPS = 4
WIDE = 192  # a layer of 192 x 192 is 72 KiB even as bfloat16: large enough to be copied late


@pytest.fixture
def late(monkeypatch):
    """The names of what was copied late, one set for each save of which some was."""
    names = []
    plain = Overlap.arm

    def arm(self, shot, late):
        found = {wire.name for array in shot.stream.late_arrays() if (wire := late.get(id(array))) is not None}
        if found:
            names.append(found)
        return plain(self, shot, late)

    monkeypatch.setattr(Overlap, "arm", arm)
    return names


class Loop:
    """A training: what is tracked, and what one step does. `model`, `inputs` and one optimizer by default."""

    def __init__(self, make_optimizer=None, *, model=None, dtype=torch.float32):
        self.model = model or torch.nn.Sequential(
            torch.nn.Linear(WIDE, WIDE), torch.nn.BatchNorm1d(WIDE), torch.nn.Tanh(), torch.nn.Linear(WIDE, WIDE)
        )
        self.model.to(dtype)
        self.inputs = torch.randn(8, WIDE).to(dtype)
        make_optimizer = make_optimizer or torch.optim.AdamW
        self.optimizer = make_optimizer([each for each in self.model.parameters() if each.requires_grad])

    @property
    def tracked(self):
        """What is saved."""
        return {"model": self.model, "optimizer": self.optimizer}

    def loss(self):
        """A forward and a backward."""
        self.optimizer.zero_grad()
        loss = self.model(self.inputs).float().square().mean()
        loss.backward()
        return loss

    def step(self, number):
        """One step of training."""
        self.loss()
        self.optimizer.step()


def run(where, loop, *, snapshot, steps=STEPS, **options):
    """Train, with a save after each step."""
    with Checkpointer(
        where, every=Every(steps=1), keep=Keep(last=99), snapshot=snapshot, verbose=0, **options
    ) as checkpointer:
        checkpointer.track(**loop.tracked)
        checkpointer.start()
        for number in range(1, steps + 1):
            loop.step(number)
            checkpointer.save(step=number)
    return highcamp.open(where)


def assert_same(one, other, steps=STEPS):
    """Byte for byte the same checkpoints, their manifests but for what tells one run from another."""
    assert [entry.step for entry in one.checkpoints] == [entry.step for entry in other.checkpoints]
    assert len(one.checkpoints) == steps
    for left, right in zip(one.checkpoints, other.checkpoints, strict=True):
        files = [{path.name: path for path in Path(entry.path).iterdir()} for entry in (left, right)]
        assert files[0].keys() == files[1].keys()
        for name in files[0]:
            texts = [each[name].read_bytes() for each in files]
            if name == "manifest.json":
                texts = [_facts(text) for text in texts]
            assert texts[0] == texts[1], f"{left.name}/{name}"
        assert right.verify().ok


def _facts(text):
    found = json.loads(text)
    found = found.get("manifest", found)
    return {key: value for key, value in found.items() if key not in ("created_at", "run_id", "digest")}


def both(tmp_path, make, steps=STEPS, **options):
    """The same training twice, copied and overlapped; the runs are the same."""
    runs = []
    for snapshot in ("copy", "overlap"):
        torch.manual_seed(7)
        runs.append(run(tmp_path / snapshot, make(), snapshot=snapshot, steps=steps, **options))
    assert_same(*runs, steps)


OPTIMIZERS = {
    "sgd": lambda each: torch.optim.SGD(each, 0.1, momentum=0.9, foreach=False),
    "sgd_foreach": lambda each: torch.optim.SGD(each, 0.1, momentum=0.9, foreach=True),
    "sgd_fused": lambda each: torch.optim.SGD(each, 0.1, momentum=0.9, fused=True),
    "adamw": lambda each: torch.optim.AdamW(each, foreach=False),
    "adamw_foreach": lambda each: torch.optim.AdamW(each, foreach=True),
    "adamw_fused": lambda each: torch.optim.AdamW(each, fused=True),
    "amsgrad": lambda each: torch.optim.Adam(each, amsgrad=True),
    "tensor_lr": lambda each: torch.optim.Adam(each, torch.tensor(0.01), foreach=False),
    "adagrad_fused": lambda each: torch.optim.Adagrad(each, fused=True),
    "rmsprop": lambda each: torch.optim.RMSprop(each, centered=True, momentum=0.9),
    "nadam": torch.optim.NAdam,
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_overlap_and_copy_give_the_same_files(tmp_path, late, name):
    """A faster save would be one of other weights."""
    both(tmp_path, lambda: Loop(OPTIMIZERS[name]))

    assert len(late) == STEPS  # the first step has come before the first save
    assert all("model/0.weight" in names for names in late)
    assert name in ("adafactor", "sgd") or any(key.startswith("optimizer/state") for key in late[-1])
    assert not any("running" in key or key.endswith("/step") for names in late for key in names)


def test_lbfgs_steps_within_a_closure(tmp_path, late):
    """It runs forward and backward many times within one step, and keeps lists of tensors."""

    class Closure(Loop):
        def step(self, number):
            self.optimizer.step(self.loss)

    both(tmp_path, lambda: Closure(lambda each: torch.optim.LBFGS(each, max_iter=3, history_size=2)))
    assert any("old_dirs" in key for key in late[-1])


def test_sparse_gradients(tmp_path, late):
    """Few rows of an embedding change at each step, by indices."""

    class Words(Loop):
        def __init__(self):
            model = torch.nn.Sequential(torch.nn.Embedding(1000, 64, sparse=True), torch.nn.Flatten())
            super().__init__(torch.optim.SparseAdam, model=model)
            self.inputs = torch.arange(8).reshape(2, 4)

    both(tmp_path, Words)
    assert late[0] >= {"model/0.weight"}


def test_two_optimizers_that_take_turns(tmp_path, late):
    """The barrier is in front of the first that steps, and of each of them: half of the copy may be the other's."""

    class Gan(Loop):
        def __init__(self):
            super().__init__()
            self.critic = torch.nn.Linear(WIDE, WIDE)
            self.other = torch.optim.SGD(self.critic.parameters(), 0.01, momentum=0.9)

        @property
        def tracked(self):
            return {**super().tracked, "critic": self.critic, "other": self.other}

        def step(self, number):
            self.critic(self.model(self.inputs).detach()).square().mean().backward()
            if number != 2:  # an optimizer that has not stepped since is copied at once
                self.other.step()
            self.other.zero_grad()
            super().step(number)

    both(tmp_path, Gan)
    assert [bool(names & {"critic/weight"}) for names in late] == [True, False, True, True]


def test_gradients_that_are_gathered(tmp_path, late):
    """Between two steps there are many backwards, and a save may come after any of them."""

    class Gathering(Loop):
        def step(self, number):
            self.model(self.inputs).square().mean().backward()
            if number % 3 == 0:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()

    both(tmp_path, Gathering, steps=8)
    assert len(late) == 2


def test_everything_beside_weights_is_copied_at_once(tmp_path, late):
    """Averages, schedules, scalers, frozen and tied weights, weights of odd layout: some of it changes in the forward."""

    class Rich(Loop):
        def __init__(self):
            model = torch.nn.Sequential(
                torch.nn.Linear(WIDE, WIDE), torch.nn.BatchNorm1d(WIDE), torch.nn.Linear(WIDE, WIDE),
                torch.nn.Linear(WIDE, WIDE, bias=False), torch.nn.Dropout(0.5),
            )  # fmt: skip
            model[2].weight = model[0].weight
            model[3].weight = torch.nn.Parameter(torch.randn(WIDE, WIDE).T)
            model.register_parameter("scale", torch.nn.Parameter(torch.tensor(1.5)))
            model.register_parameter("frozen", torch.nn.Parameter(torch.randn(WIDE, WIDE), requires_grad=False))
            model.register_buffer("table", torch.randn(WIDE, WIDE))
            super().__init__(model=model)
            self.average = torch.optim.swa_utils.AveragedModel(model)
            self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

        @property
        def tracked(self):
            return {**super().tracked, "average": self.average, "schedule": self.schedule, "scaler": self.scaler}

        def step(self, number):
            self.optimizer.zero_grad()
            loss = self.model(self.inputs).square().mean() * self.model.scale
            self.model.table.add_(loss.detach())
            self.scaler.scale(loss).backward()
            if number == 2:
                self.model[0].bias.grad.fill_(torch.inf)  # this step is skipped
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            self.average.update_parameters(self.model)

    both(tmp_path, Rich)
    assert "model/0.weight" in late[0]
    assert all(key.startswith(("model/", "optimizer/state")) for key in set.union(*late))
    assert not set.union(*late) & {"model/table", "model/frozen", "model/3.weight", "model/scale", "model/2.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_data_types(tmp_path, late, dtype):
    """What is compared and what is copied are bytes, of any kind of number."""
    both(tmp_path, lambda: Loop(dtype=dtype))
    assert len(late) == STEPS


def test_weights_that_are_given_other_memory(tmp_path, late):
    """`p.data = other` leaves the name and changes the place: what was remembered of the old place is stale."""

    class Moving(Loop):
        def step(self, number):
            super().step(number)
            weight = self.model[0].weight
            weight.data = weight.data.clone() + number
            if number == 3:
                self.model[3].weight = torch.nn.Parameter(torch.zeros(WIDE, WIDE))
                self.optimizer = torch.optim.AdamW(self.model.parameters())  # not the one that is tracked

    both(tmp_path, Moving, steps=3)
    assert len(late) == 3


def test_an_optimizer_whose_hooks_do_not_fire_is_copied_at_once(tmp_path, late):
    """A compiled or replaced step has no barrier in front of it."""

    class Compiled(Loop):
        def __init__(self):
            super().__init__()
            plain = type(self.optimizer).step.__wrapped__
            self.optimizer.step = lambda: plain(self.optimizer)

    both(tmp_path, Compiled)
    assert late == []


def test_through_a_ring(tmp_path, late):
    """Memory smaller than the state, and a copy that waits for the disk while the loop goes on."""
    model = torch.nn.Sequential(torch.nn.Linear(WIDE, 3 * WIDE), torch.nn.Linear(3 * WIDE, WIDE))
    both(tmp_path, lambda: Loop(model=copy.deepcopy(model)), staging_bytes=1 << 20)
    assert len(late) == STEPS


def test_state_that_is_passed_is_copied_at_once(tmp_path, late):
    """Nobody can tell when it will change."""
    loop = Loop()
    with Checkpointer(tmp_path, keep=Keep(last=9), snapshot="overlap", verbose=0) as checkpointer:
        expected = []
        for number in range(1, 4):
            loop.step(number)
            expected.append(copy.deepcopy(loop.model.state_dict()))
            checkpointer.save({"model": loop.model.state_dict()}, step=number)
            loop.model[0].weight.data.fill_(number)

    assert late == []
    for entry, state in zip(checkpointer.run.checkpoints, expected, strict=True):
        assert np.array_equal(entry.load("model")["0.weight"], state["0.weight"].numpy())


def test_nothing_is_kept_alive_after_close(tmp_path):
    """The next experiment of the same process would not find the memory."""
    import gc
    import weakref

    loop = Loop()
    checkpointer = Checkpointer(tmp_path, snapshot="overlap", verbose=0)
    checkpointer.track(**loop.tracked)
    for epoch in checkpointer.epochs(2):
        loop.step(epoch)
    checkpointer.close()
    gone = [weakref.ref(loop.model[0].weight), weakref.ref(loop.optimizer)]
    checkpointer._tracked.clear()
    assert not loop.optimizer._optimizer_step_pre_hooks
    del loop
    gc.collect()

    assert [reference() for reference in gone] == [None, None]
    assert checkpointer._saver._source.size_bytes == 0
