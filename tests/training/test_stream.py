"""The stream: every byte of the state reaches its file, through memory of any size, and nobody ever waits for nothing."""

from __future__ import annotations

import gc
import linecache
import sys
import threading
import weakref
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from highcamp.core import tensorfile
from highcamp.core.array import HostArray
from highcamp.training import stream as room
from highcamp.training.stream import ALIGNMENT, Stream

pytestmark = pytest.mark.timeout(60)  # what waits for nothing ends here


def _files(*sizes: list[int], seed: int = 0):
    """A tensor file for each list of sizes: its table, its arrays in that order, and the bytes of its data section."""
    rng = np.random.default_rng(seed)
    found = []
    for each in sizes:
        layout = tensorfile.plan({f"t{number:03}": ("U8", (size,)) for number, size in enumerate(each)}, {})
        arrays = [HostArray.from_numpy(rng.integers(0, 256, size, np.uint8)) for size in each]
        found.append((layout, arrays, b"".join(bytes(array.data) for array in arrays)))
    return found


def _stream(files, capacity: int, late=()) -> Stream:
    """A stream through memory that is full of another snapshot's bytes."""
    ids = frozenset(id(array) for _, arrays, _ in files for number, array in enumerate(arrays) if number in late)
    stream = Stream([(layout, arrays) for layout, arrays, _ in files], ids, capacity)
    stream.use(memoryview(bytearray(b"\xa5" * capacity)))
    return stream


def _start(*works):
    """Run each in a thread; what ends them, and what they raised."""
    errors = []

    def run(work):
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (looked at by the test)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()

    def join():
        for thread in threads:
            thread.join(50)
            assert not thread.is_alive(), "somebody waits for nothing"
        return errors

    return join


def _read(stream: Stream, files) -> list[bytes]:
    return [b"".join(bytes(piece) for piece in stream.read(number)) for number in range(len(files))]


def _fillers(stream: Stream, count: int = 1):
    return [lambda late=late: stream.fill(late=late) for late in (False, True) for _ in range(count)]


def _is_read_right(files, capacity: int, late=(), count: int = 1) -> bool:
    stream = _stream(files, capacity, late)
    join = _start(*_fillers(stream, count))

    found = _read(stream, files)

    assert join() == []
    return found == [data for _, _, data in files]


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 30_000)), max_size=6), max_size=4),
    pages=st.integers(1, 12),
    piece_pages=st.integers(1, 4),
    late=st.sets(st.integers(0, 5)),
    count=st.integers(1, 3),
)
def test_the_bytes_read_are_the_bytes_of_the_arrays(sizes, pages, piece_pages, late, count):
    """A checkpoint would hold bytes of another tensor, or of the snapshot before, under a digest that fits them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "PIECE_BYTES", piece_pages * ALIGNMENT)
        assert _is_read_right(_files(*sizes), pages * ALIGNMENT, late, count)


@pytest.mark.parametrize("capacity", [ALIGNMENT, 3 * ALIGNMENT, 5 * ALIGNMENT])
def test_a_tensor_larger_than_the_memory_goes_through_it(capacity):
    """`staging_bytes` is for states that do not fit, and one embedding may be most of the state."""
    assert _is_read_right(_files([10, 40 * ALIGNMENT + 123, 7]), capacity)


@pytest.mark.parametrize("size", [1, 100, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1])
def test_the_padding_between_two_files_is_no_deadlock(size):
    """The next file begins at a page of its own: a ring of one page waits for the padding before it to be let go."""
    assert _is_read_right(_files([size], [ALIGNMENT], [], [size, size], [ALIGNMENT]), ALIGNMENT)


def test_a_ring_as_large_as_a_piece_is_no_deadlock():
    """With 16 MiB of memory every piece needs all of it."""
    assert _is_read_right(_files([100], [room.PIECE_BYTES + 5]), room.PIECE_BYTES)


def test_nothing_to_save_is_nothing_to_wait_for():
    """A state of plain values, or of empty tensors, has no bytes."""
    for files in (_files(), _files([]), _files([0, 0], [0])):
        stream = _stream(files, ALIGNMENT)
        stream.fill(late=False)
        stream.wait_filled(late=False)
        stream.wait_filled(late=True)
        assert _read(stream, files) == [b""] * len(files)
        assert not stream.is_ring


def test_a_piece_is_read_as_soon_as_it_is_filled():
    """The disk would idle until the whole state is copied."""
    files = _files([3 * room.PIECE_BYTES])
    stream = _stream(files, 4 * room.PIECE_BYTES)
    is_first_read = threading.Event()
    plain = stream._copy

    def copy(piece):
        if piece.start == room.PIECE_BYTES:
            assert is_first_read.wait(50)
        plain(piece)

    stream._copy = copy
    join = _start(lambda: stream.fill(late=False))
    reading = stream.read(0)
    assert len(next(reading)) == room.PIECE_BYTES
    is_first_read.set()

    assert sum(len(piece) for piece in reading) == 2 * room.PIECE_BYTES
    assert join() == []


def test_several_threads_never_copy_a_piece_twice(monkeypatch):
    """A second copy would come when the loop has gone on, over bytes that were right."""
    monkeypatch.setattr(room, "PIECE_BYTES", ALIGNMENT)
    files = _files([50 * ALIGNMENT], [60 * ALIGNMENT])
    stream = _stream(files, 200 * ALIGNMENT)
    copied = []
    plain = stream._copy
    stream._copy = lambda piece: (copied.append(piece.start), plain(piece))

    assert _start(*_fillers(stream, 4))() == []

    assert sorted(copied) == list(range(0, 110 * ALIGNMENT, ALIGNMENT))
    assert _read(stream, files) == [data for _, _, data in files]


def test_an_abort_by_the_writer_wakes_everybody(monkeypatch):
    """The disk is full: the loop, which waits for room, would wait for ever."""
    monkeypatch.setattr(room, "PIECE_BYTES", ALIGNMENT)
    files = _files([20 * ALIGNMENT])
    for late in ((), (0,)):
        stream = _stream(files, 2 * ALIGNMENT, late)
        error = OSError("full")
        join = _start(*_fillers(stream, 2), *[partial(stream.wait_filled, late=late) for late in (True, False)])
        next(stream.read(0))

        stream.abort(error)

        assert set(join()) == {error}  # who waits gets it, who fills just ends
        with pytest.raises(OSError, match="full"):
            next(stream.read(0))


def test_an_error_of_a_copy_wakes_everybody(monkeypatch):
    """A device that fails: the writer, which waits for the piece, would keep the process alive for ever."""
    monkeypatch.setattr(room, "PIECE_BYTES", ALIGNMENT)
    files = _files([20 * ALIGNMENT])
    stream = _stream(files, 2 * ALIGNMENT)
    plain = stream._copy

    def copy(piece):
        if piece.start == 3 * ALIGNMENT:
            raise MemoryError("device")
        plain(piece)

    stream._copy = copy
    join = _start(*_fillers(stream, 2))

    with pytest.raises(MemoryError, match="device"):
        _read(stream, files)
    assert [str(error) for error in join()] == ["device"]


def test_a_late_copy_is_inspected_whole(monkeypatch):
    """A tripwire that does not see each byte of the copy would let a torn one through."""
    monkeypatch.setattr(room, "PIECE_BYTES", 2 * ALIGNMENT)
    files = _files([10_000, 30_000, 5, 20_000])
    stream = _stream(files, 3 * ALIGNMENT, late=(1, 2))
    seen = []
    stream.inspect(lambda share, copy: seen.append((share.array, share.offset, bytes(copy))))
    join = _start(*_fillers(stream))

    _read(stream, files)

    assert join() == []
    for array in files[0][1][1:3]:
        parts = sorted((offset, data) for each, offset, data in seen if each is array)
        assert b"".join(data for _, data in parts) == bytes(array.data)
    assert {id(array) for array, _, _ in seen} == {id(array) for array in files[0][1][1:3]}


def test_arrays_are_let_go_when_they_are_copied():
    """A functional state is replaced at each step: the old one would stay in memory until it is written."""
    values = [np.arange(100.0), np.arange(50.0)]
    gone = [weakref.ref(value) for value in values]
    layout = tensorfile.plan({f"t{number}": ("F64", value.shape) for number, value in enumerate(values)}, {})
    arrays = [HostArray.from_numpy(value) for value in values]
    stream = Stream([(layout, arrays)], frozenset({id(arrays[1])}), ALIGNMENT)
    stream.use(memoryview(bytearray(ALIGNMENT)))
    del arrays, values

    stream.fill(late=False)
    stream.fill(late=True)
    gc.collect()

    assert [reference() for reference in gone] == [None, None]


def test_what_ctrl_c_leaves_is_copied_by_another(monkeypatch):
    """A piece that was in hand when Ctrl-C came would never be filled, and the writer would wait for it for ever."""
    monkeypatch.setattr(room, "PIECE_BYTES", ALIGNMENT)
    interrupted = lines = 0
    while True:
        files = _files([3 * ALIGNMENT + 1])
        stream = _stream(files, 8 * ALIGNMENT, late=(0,))

        if not _interrupt_at(interrupted, lambda stream=stream: stream.fill(late=True)):
            break
        interrupted += 1

        join = _start(lambda stream=stream: stream.fill(late=True))
        stream.wait_filled(late=True)
        stream.wait_idle()
        assert join() == []
        assert _read(stream, files) == [data for _, _, data in files], f"Ctrl-C at line {interrupted}"
        lines += 1
    assert lines > 30


def _interrupt_at(count: int, work) -> bool:
    """Run `work`, and raise KeyboardInterrupt before the line number `count` of this room; whether there was one.

    Not as a block is left: Python looks for signals only after a lock has been given back.
    """
    passed = 0
    seen = set()

    def trace(frame, event, _):
        nonlocal passed
        if frame.f_code.co_filename != room.__file__:
            return None
        if event == "line":
            text = linecache.getline(room.__file__, frame.f_lineno)
            is_left = text.strip().startswith("with ") and (frame, frame.f_lineno) in seen
            seen.add((frame, frame.f_lineno))
            is_cleaning = frame.f_code.co_name in ("_let_go", "abort") or "finally" in text
            if not is_left and not is_cleaning:
                passed += 1
                if passed == count + 1:
                    sys.settrace(None)
                    raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_whoever_lets_go_of_the_memory_waits_for_a_copy_in_the_middle():
    """The next snapshot goes into the same memory: a copy that ends late would overwrite it."""
    files = _files([100])
    stream = _stream(files, ALIGNMENT)
    copying, go_on, order = threading.Event(), threading.Event(), []

    def copy(_):
        copying.set()
        assert go_on.wait(50)
        order.append("copied")

    stream._copy = copy
    join = _start(lambda: stream.fill(late=False))
    assert copying.wait(50)
    stream.abort(OSError("full"))
    waiting = _start(lambda: (stream.wait_idle(), order.append("idle")))
    go_on.set()

    assert waiting() == []
    assert join() == []
    assert order == ["copied", "idle"]
