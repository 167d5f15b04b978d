"""Copies from a CUDA device, as far as they can be tested without one: in which order the runtime is asked for what."""

from __future__ import annotations

import mmap

import pytest

torch = pytest.importorskip("torch")

from highcamp.torch import device  # noqa: E402


class Runtime:
    """Stands in for the CUDA runtime; answers `code` to every call."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.calls = code, []

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        self.calls.append(("register", address, size, flags))
        return self.code

    def cudaHostUnregister(self, address):  # noqa: N802
        self.calls.append(("unregister", address))
        return 0


@pytest.fixture
def runtime(monkeypatch):
    """Provide a runtime that takes everything."""
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    return found


def test_staging_memory_is_pinned_once_and_given_back(runtime):
    """Memory that stays registered after it is unmapped makes the next registration of that address fail."""
    view = memoryview(mmap.mmap(-1, 8192))

    unpin = device.pin(view)
    unpin()

    (_, address, size, flags), (_, released) = runtime.calls
    assert (size, flags, released) == (8192, 0, address)
    assert address % 4096 == 0


def test_memory_that_cannot_be_pinned_is_used_as_it_is(runtime):
    """A machine with little lockable memory would not be able to save at all."""
    runtime.code = 2

    assert device.pin(memoryview(bytearray(64))) is None


def test_nothing_starts_cuda(monkeypatch):
    """A process in which CUDA was started cannot fork its data-loader workers any more."""
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pytest.fail("CUDA was started"))

    assert device.pin(memoryview(bytearray(64))) is None


def test_a_copy_begins_after_what_was_computed_and_is_complete_at_the_end(monkeypatch):
    """A copy that overtakes the step before it, or is still running when the next one begins, is torn."""
    events = []

    class Stream:
        def __init__(self, of):
            events.append(f"new stream on {of}")

        def wait_stream(self, other):
            events.append(f"waits for {other}")

        def synchronize(self):
            events.append("synchronized")

        def __enter__(self):
            events.append("in")

        def __exit__(self, *_):
            events.append("out")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: f"the computing stream of {of}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(device, "_streams", {})
    cuda = torch.device("cuda", 0)

    for _ in range(2):
        with device.beside(cuda):
            events.append("copy")

    once = ["waits for the computing stream of cuda:0", "in", "copy", "out", "synchronized"]
    assert events == ["new stream on cuda:0", *once, *once]


def test_other_devices_are_copied_plainly():
    """The host's own memory needs no stream."""
    with device.beside(torch.device("cpu")):
        found = torch.ones(2) + 1

    assert found.tolist() == [2.0, 2.0]


def test_the_memory_of_a_run_is_pinned_when_a_device_is_in_use(runtime, tmp_path):
    """Each save of a model on a device would take ten times as long."""
    from highcamp import Checkpointer

    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        for step in (1, 2):
            checkpointer.save({"w": torch.full((1000,), float(step))}, step=step)
        view = checkpointer._saver._source._snapshot._staging.view
        assert [call[0] for call in runtime.calls] == ["register"]
        assert runtime.calls[0][1] == torch.frombuffer(view, dtype=torch.uint8).data_ptr()
        del view

    assert [call[0] for call in runtime.calls] == ["register", "unregister"]
