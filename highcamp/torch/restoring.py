"""Restoring: the memory that saved bytes are read into, and optimizers, whose `load_state_dict` would cast them."""

from __future__ import annotations

import functools
import mmap
from typing import TYPE_CHECKING, Any

import torch

from highcamp.errors import InvalidState
from highcamp.torch.dtypes import DTYPES, TORCH_DTYPES
from highcamp.torch.memory import memory_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from highcamp.core.array import HostArray, Spec

Tree = dict[str, Any]

CLASS_NAME = "class_name"
"""The entry of an optimizer's state that is ours."""

_HUGE_BYTES = 4 << 20  # of a tensor; below it, no huge page may fit into it


def fresh(dtype: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, memoryview]:
    """Return a new CPU tensor that owns its memory, whose bytes are still to be set, and that memory.

    Raises InvalidState for a dtype that this torch does not have.
    """
    kind = TORCH_DTYPES.get(dtype)
    if kind is None:
        raise InvalidState(f"this torch has no dtype {dtype}", hint="read it without torch: checkpoint.load()")
    if dtype == "F4":
        shape = (*shape[:-1], shape[-1] // 2)
    tensor = torch.empty(shape, dtype=kind, device="cpu")
    memory = memory_of(tensor)
    if len(memory) >= _HUGE_BYTES:
        _use_huge_pages(tensor.data_ptr(), len(memory))
    return tensor, memory


def lying(tensor: torch.Tensor) -> tuple[Spec, memoryview | None, int] | None:
    """Return dtype and shape, the writable bytes and their address of a tensor whose bytes lie in main memory in its order.

    None for any other one: on a device, strided, sparse, lazily conjugated or negated, or of a dtype that files do not have.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return None
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    shape = tuple(tensor.shape)
    if dtype == "F4":
        shape = (*shape[:-1], shape[-1] * 2)
    return (dtype, shape), memory_of(tensor.detach()) if tensor.numel() else None, tensor.data_ptr()


def adopt(tensor: torch.Tensor, like: object | None) -> torch.Tensor:
    """Return a tensor made by `fresh`, or a copy on the device of `like`; as a Parameter if `like` is one."""
    if isinstance(like, torch.Tensor):
        tensor = tensor.to(like.device)
    return torch.nn.Parameter(tensor, like.requires_grad) if isinstance(like, torch.nn.Parameter) else tensor


def from_host(array: HostArray, like: object | None) -> torch.Tensor:
    """Return a new tensor that owns its memory, on the device of `like`; a Parameter if `like` is one."""
    tensor, memory = fresh(*array.spec)
    memory[:] = array.data
    return adopt(tensor, like)


def _use_huge_pages(address: int, size: int) -> None:
    """Ask for huge pages before memory is first used: its pages come five times as fast. NumPy does so by itself."""
    madvise = _madvise()
    if madvise is not None:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, end - start, mmap.MADV_HUGEPAGE)  # advice: where it is refused, nothing is lost


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    import ctypes

    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        found: Any = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found.restype = ctypes.c_int
    called: Callable[[int, int, int], int] = found
    return called


def destinations(obj: object, template: Tree | None) -> Tree | None:
    """Return the live state whose tensors may take saved bytes before `restore` is called; None for none of them.

    template: that of `obj`. `restore` gives such tensors to the object as if they had been loaded, which PyTorch's own
    code takes as a copy onto itself. Code of others may look at what was there before, so it is given new tensors.
    """
    if isinstance(obj, torch.nn.Module) and template is not None and _is_torchs(obj, "load_state_dict"):
        foreign = [module for module in obj.modules() if not _is_loaded_by_torch(module)]
        if not foreign:
            return template
        taken = {_memory(leaf) for module in foreign for leaf in (*module.parameters(), *module.buffers())}
        return {name: leaf for name, leaf in template.items() if _memory(leaf) not in taken}
    if isinstance(obj, torch.optim.Optimizer) and _is_torchs(obj, "load_state_dict", "__setstate__"):
        if _has_foreign(obj._optimizer_load_state_dict_pre_hooks):  # noqa: SLF001
            return None
        tree = obj.state_dict()
        taken = {_memory(parameter) for group in obj.param_groups for parameter in group["params"]}
        state = {  # what is a parameter's own memory must not change with the optimizer
            key: {name: value for name, value in entry.items() if _memory(value) not in taken}
            for key, entry in tree["state"].items()
        }
        return {"state": state, "param_groups": tree["param_groups"]}
    return None


def _is_loaded_by_torch(module: torch.nn.Module) -> bool:
    return _is_torchs(module, "_load_from_state_dict") and not _has_foreign(module._load_state_dict_pre_hooks)  # noqa: SLF001


def _is_torchs(obj: object, *methods: str) -> bool:
    """Whether methods are PyTorch's own."""
    return all(method not in vars(obj) and _is_of_torch(getattr(type(obj), method, None)) for method in methods)


def _has_foreign(hooks: Mapping[int, Any]) -> bool:
    return any(not _is_of_torch(getattr(hook, "hook", hook)) for hook in hooks.values())


def _is_of_torch(function: object) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] == "torch"


def _memory(value: object) -> int | None:
    """Where the memory of a tensor begins; None for anything else, and for tensors that have none."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or torch.nn.parameter.is_lazy(value):
        return None
    return value.untyped_storage().data_ptr() or None


def restore_optimizer(optimizer: torch.optim.Optimizer, tree: Mapping[str, Any]) -> None:
    """Put a state into an optimizer; state tensors are taken over as they are, tensor learning rates keep their identity.

    `load_state_dict` would cast the state to the dtype of the parameter; here it keeps the one it was saved with.
    """
    old_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict({key: value for key, value in tree.items() if key != CLASS_NAME})
    ids = [key for group in tree["param_groups"] for key in group["params"]]
    parameters = dict(zip(ids, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    for key in parameters.keys() & tree["state"].keys():
        optimizer.state[parameters[key]] = _uncast(optimizer.state[parameters[key]], tree["state"][key])
    for old, new in zip(old_groups, optimizer.param_groups, strict=True):
        for key, value in old.items():
            saved_value = new.setdefault(key, value)
            if key != "params" and isinstance(value, torch.Tensor) and isinstance(saved_value, torch.Tensor):
                value.copy_(saved_value)  # a compiled or captured step holds this very tensor as its learning rate
                new[key] = value


def _uncast(loaded: Any, saved: Any) -> Any:
    """Return the saved value on the device of the loaded one; what loading made of older states (`step`) stays."""
    if isinstance(loaded, torch.Tensor):
        return saved.to(loaded.device) if isinstance(saved, torch.Tensor) else loaded
    if isinstance(loaded, dict) and isinstance(saved, dict):
        return loaded | {key: _uncast(loaded.get(key), value) for key, value in saved.items()}
    if isinstance(loaded, (list, tuple)) and type(loaded) is type(saved):
        return type(saved)(_uncast(*pair) for pair in zip(loaded, saved, strict=True))
    return saved


def assign(live: torch.Tensor, saved: torch.Tensor) -> None:
    """Put the values of `saved` into `live`, which stays the same tensor."""
    with torch.no_grad():
        live.copy_(saved)
