"""Tensors on a CUDA device: pinned staging memory, and a stream beside the one that computes.

Source: the CUDA semantics note of PyTorch's documentation. Copies into memory that is not pinned go through a small buffer
of the driver, at about a tenth of the rate.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_streams: dict[torch.device, torch.cuda.Stream] = {}


def pin(view: memoryview) -> Callable[[], None] | None:
    """Pin writable memory for copies from CUDA devices; returns what ends that, None where no device is in use.

    Memory that cannot be pinned, because there is too little or the driver refuses, is used as it is.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # asking would start it, and end forking
        return None
    address = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(address, len(view), 0)) != 0:
        return None

    def unpin() -> None:
        runtime.cudaHostUnregister(address)

    return unpin


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Copies within go over a stream of their own, after all that has been computed so far; at the end they are complete.

    The host waits, not the device: work that was queued before goes on meanwhile.
    """
    if device.type != "cuda":
        yield
        return
    stream = _streams.get(device)
    if stream is None:
        stream = _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
