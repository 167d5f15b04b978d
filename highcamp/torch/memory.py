"""Where the bytes of a tensor lie, and how they come into staging memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from highcamp.torch.device import beside

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


def places(leaves: Sequence[Any]) -> list[Hashable] | None:
    """Where the bytes of each tensor lie and how, None if not all have a place; where it is equal, so is `to_host`."""
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return None
    return [(leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad) for leaf in leaves]


def are_at(leaves: Sequence[Any], places: Sequence[Any]) -> bool:
    """Whether `places` would still give the same; nothing is allocated for it, which would wake the collector."""
    for leaf, (address, shape, stride, dtype, is_trained) in zip(leaves, places, strict=True):
        if (
            leaf.data_ptr() != address
            or leaf.requires_grad is not is_trained
            or leaf.dtype is not dtype
            or leaf.shape != shape
            or leaf.stride() != stride
        ):
            return False
    return True


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable; a tensor of any dtype and of no, one or more axes."""
    # as_strided, not reshape: a contiguous tensor of one element may have any stride, which view() refuses
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # an array is a buffer, its stubs do not say so


def bring(tensor: torch.Tensor, view: memoryview, start: int) -> None:
    """Fill `view` with the bytes of a strided, conjugated or device tensor in C order, from byte `start` on."""
    target = torch.frombuffer(view, dtype=torch.uint8)
    size = tensor.element_size()
    if start % size == len(view) % size == target.data_ptr() % size == 0:
        with beside(tensor.device):
            _bring(_plain(tensor), target.view(_BITS.get(size, tensor.dtype)), start // size)
        return
    plain = memory_of(tensor.cpu().resolve_conj().resolve_neg().contiguous())
    view[:] = plain[start : start + len(view)]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element: what its bits are copied as, whatever they mean; not every dtype can be copied."""


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as bits."""
    # Only complex numbers are conjugated or negated lazily, a state seldom holds them: all of it is brought each time.
    tensor = tensor.resolve_conj().resolve_neg()
    return tensor.view(_BITS.get(tensor.element_size(), tensor.dtype))


def _bring(tensor: torch.Tensor, target: torch.Tensor, first: int) -> None:
    """Fill `target` (one axis, of the same dtype) with the elements of a tensor in C order, from `first` on.

    In as few copies as its strides allow, and no element more than asked for: a piece of a large tensor must not bring
    all of it.
    """
    count = target.numel()
    if tensor.is_contiguous():
        target.copy_(tensor.as_strided((count,), (1,), tensor.storage_offset() + first), non_blocking=True)
        return
    row = tensor.numel() // tensor.shape[0]
    done = 0
    while done < count:
        index, offset = divmod(first + done, row)
        if offset == 0 and count - done >= row:  # whole rows, all of them at once
            rows = (count - done) // row
            target[done : done + rows * row].view(rows, *tensor.shape[1:]).copy_(
                tensor[index : index + rows], non_blocking=True
            )
            done += rows * row
        else:
            length = min(row - offset, count - done)
            _bring(tensor[index], target[done : done + length], offset)
            done += length
