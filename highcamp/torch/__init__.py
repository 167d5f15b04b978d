"""PyTorch translation: tensors, modules, optimizers, schedulers, random state and loaders to plain trees and back.

Nothing is decided and nothing is stored here. A *tree* is nested dicts, lists and plain values with tensors as leaves;
in a tree given to `check` or `restore` the leaves are tensors made by `fresh`, or live ones that have taken the saved bytes.

Loaders are in `loaders`, the memory that a saved state is read into is in `restoring`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader

from highcamp.core.array import DistantArray, HostArray
from highcamp.errors import InvalidState, Mismatch
from highcamp.torch.device import pin
from highcamp.torch.dtypes import DTYPES as _DTYPES
from highcamp.torch.loaders import (
    Tree,
    loader_differences,
    loader_state,
    one_sided,
    order_state,
    restore_loader,
    resume_iter,
)
from highcamp.torch.memory import are_at, bring, memory_of, places
from highcamp.torch.restoring import CLASS_NAME, adopt, assign, destinations, fresh, from_host, lying, restore_optimizer
from highcamp.torch.stepping import before_step, class_name, live_state, owned, parameters, writes

__all__ = [
    "adopt",
    "are_at",
    "assign",
    "before_step",
    "capture",
    "check",
    "destinations",
    "export",
    "fresh",
    "from_host",
    "is_weights",
    "lying",
    "order_state",
    "owned",
    "parameters",
    "pin",
    "places",
    "random_state",
    "restore",
    "resume_iter",
    "set_random_state",
    "template",
    "to_host",
    "writes",
]

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping
    from pathlib import Path

# What torch's own optimizers keep in the shape of the parameter; under any other name any shape may be kept.
_PARAMETER_SHAPED = {
    "acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer", "prev",
    "square_avg", "step_size", "sum",
}  # fmt: skip
_NEEDED: dict[type, set[str]] = {
    torch.optim.Optimizer: {"param_groups", "state"},
    DataLoader: {"generators", "workers_running"},
    torch.Generator: {"state"},
}
_SET_BY_SCHEDULERS = {"base_momentum", "initial_lr", "max_lr", "max_momentum", "min_lr", "param_names", "swa_lr"}


def to_host(leaf: object) -> HostArray | None:
    """Return the bytes of a tensor, or None if `leaf` is no tensor.

    For a contiguous CPU tensor the memory is its own, and writable; any other (CUDA, MPS, strided views, lazily conjugated
    or negated ones) is a DistantArray, whose bytes are copied when they are asked for. Tensors over the same memory in the
    same way have equal `tie`s. `float4_e2m1fn_x2` holds two elements per byte: its last axis counts twice in `shape`.
    Raises InvalidState for meta, sparse, quantized, lazy, sharded and wrapped tensors and for complex32 and complex128.
    """
    if not isinstance(leaf, torch.Tensor):
        return None
    _refuse_unstorable(leaf)
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  # a subclass may change what every line below means
        tensor = leaf.detach()
        shape = tuple(tensor.shape)
        tie: Hashable = None
        if tensor.numel():  # the memory of an empty one is nobody's, and its address the same for all
            memory = (str(tensor.device), tensor.untyped_storage().data_ptr(), tensor.storage_offset())
            tie = (*memory, shape, tensor.stride(), str(tensor.dtype), tensor.is_conj(), tensor.is_neg())
        name = _DTYPES[tensor.dtype]
        if name == "F4":
            shape = (*shape[:-1], shape[-1] * 2)
        is_parameter = isinstance(leaf, torch.nn.Parameter)
        is_still, is_trained = is_parameter and not leaf.requires_grad, is_parameter and leaf.requires_grad
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            bringing = partial(bring, tensor)
            return DistantArray(name, shape, bringing, tie, "torch", is_still=is_still, is_trained=is_trained)
        return HostArray(name, shape, memory_of(tensor), tie, "torch", is_still, is_trained=is_trained)


def _refuse_unstorable(tensor: torch.Tensor) -> None:
    """Raise InvalidState, saying what to do, for a tensor whose bytes are missing, elsewhere or not storable."""
    if torch.nn.parameter.is_lazy(tensor):
        what, hint = "is not initialized yet", "run one batch through the module first"
    elif hasattr(tensor, "_local_tensor"):
        what, hint = "is sharded over several devices (DTensor)", "call .full_tensor() first"
    elif is_traceable_wrapper_subclass(tensor):
        what, hint = f"wraps other tensors ({type(tensor).__name__})", "store the wrapped tensors one by one"
    elif tensor.device.type == "meta":
        what, hint = "is on the meta device and has no bytes", "materialize it first: module.to_empty(device=…)"
    elif tensor.layout is not torch.strided:
        what, hint = f"is stored as {tensor.layout}", "store .to_dense(), or its indices and values as two tensors"
    elif tensor.is_quantized:
        what, hint = f"is quantized ({tensor.dtype})", "store .int_repr(), .q_scale() and .q_zero_point()"
    elif tensor.dtype in (torch.complex32, torch.complex128):
        what, hint = f"is of dtype {tensor.dtype}", "store torch.view_as_real(tensor), or convert to complex64"
    elif tensor.dtype not in _DTYPES:
        what, hint = f"is of dtype {tensor.dtype}, which tensor files do not have", "store .view(torch.uint8)"
    else:
        return
    shape = "unknown shape" if torch.nn.parameter.is_lazy(tensor) else f"shape {tuple(tensor.shape)}"
    raise InvalidState(f"a tensor of {shape} {what}", hint=hint)


def capture(obj: object) -> Tree | None:
    """Return the state of a torch object as a tree whose leaves are the live tensors, or None if it is not torch's.

    Known: modules (names without the `_orig_mod.` of torch.compile and the `module.` of DDP), optimizers (with the name of
    their class, because the settings of one can be those of another), schedulers, GradScaler, Generator, DataLoader (the
    generators that decide its order; for torchdata's StatefulDataLoader its own state too), and anything of torch or
    torchdata with `state_dict` and `load_state_dict`. What is neither tensor nor plain is left in place: flattening the
    tree refuses it by its path.
    """
    if isinstance(obj, torch.nn.Module):
        state = live_state(obj)
        if not any("_orig_mod." in name or "module." in name for name in state):
            return dict(state)
        names = _names(obj)
        return {_plain(name, names): value for name, value in state.items()}
    if isinstance(obj, DataLoader):
        return loader_state(obj)
    if isinstance(obj, torch.Generator):
        return {"state": obj.get_state()}
    if isinstance(obj, torch.optim.Optimizer):
        return {CLASS_NAME: class_name(obj), **obj.state_dict()}
    is_ours = any(cls.__module__.partition(".")[0] in ("torch", "torchdata") for cls in type(obj).__mro__)
    if is_ours and hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict"):
        return dict(obj.state_dict())
    return None


def is_weights(obj: object) -> bool:
    """Whether the state of an object is that of a model, so that it stays when only weights are kept."""
    return isinstance(obj, torch.nn.Module)


def template(obj: object) -> Tree | None:
    """Return the tree a state must fit in names, shapes and dtypes, or None where only `check` can tell.

    None for everything but modules (an optimizer has no state before its first step), and for modules with parameters
    that are not initialized yet.
    """
    tree = capture(obj) if isinstance(obj, torch.nn.Module) else None
    return None if tree is None or any(map(torch.nn.parameter.is_lazy, tree.values())) else tree


def check(obj: object, tree: Mapping[str, Any]) -> list[str]:
    """Return one line per difference that `template` cannot tell; [] when `tree` fits. Changes nothing."""
    needed = next((keys for kind, keys in _NEEDED.items() if isinstance(obj, kind)), set())
    if needed - tree.keys():
        return one_sided(needed - tree.keys(), ())  # the state of another kind of object
    if isinstance(obj, torch.optim.Optimizer):
        return _optimizer_differences(obj, tree)
    if isinstance(obj, LRScheduler):
        return _scheduler_differences(obj.state_dict(), tree, "")
    if isinstance(obj, DataLoader):
        return loader_differences(obj, tree)
    if isinstance(obj, torch.amp.GradScaler) and obj.is_enabled() != bool(tree):
        word = "enabled" if obj.is_enabled() else "disabled"
        return [f"the scaler is {word} here, it was not when it was saved"]
    return []


def restore(obj: object, tree: Mapping[str, Any]) -> None:
    """Put `tree` into `obj`, bit for bit; parameters, buffers and tensor learning rates stay the same objects.

    Optimizer state keeps its saved dtype (`load_state_dict` would cast it to the parameter's) and follows torch's rule
    for the device. Raises Mismatch, before anything changed, if `tree` does not fit.
    """
    differences = _module_differences(obj, tree) if isinstance(obj, torch.nn.Module) else check(obj, tree)
    if differences:
        message = f"the saved state does not fit this {type(obj).__name__}: {'; '.join(differences)}"
        raise Mismatch(message, hint="build it as it was built when it was saved")
    if isinstance(obj, torch.nn.Module):
        names = _names(obj)
        obj.load_state_dict({name: tree[_plain(name, names)] for name in obj.state_dict()})
    elif isinstance(obj, torch.optim.Optimizer):
        restore_optimizer(obj, tree)
    elif isinstance(obj, DataLoader):
        restore_loader(obj, tree)
    elif isinstance(obj, torch.Generator):
        obj.set_state(tree["state"])
    else:
        obj.load_state_dict(dict(tree))  # type: ignore[attr-defined]  # capture() took it for its state_dict


def _names(module: torch.nn.Module) -> list[tuple[str, str]]:
    """Return (prefix, plain prefix) of every compiled or data-parallel wrapper inside `module`, innermost first."""
    wrappers: list[tuple[str, str]] = []
    for name, child in module.named_modules(remove_duplicate=False):
        start = f"{name}." if name else ""
        if isinstance(child, (DataParallel, DistributedDataParallel)):
            wrappers.append((f"{start}module.", start))
        elif hasattr(child, "_orig_mod"):  # torch.compile's class; importing it takes longer than torch itself
            wrappers.append((f"{start}_orig_mod.", start))
    return sorted(wrappers, key=lambda pair: -len(pair[0]))


def _plain(name: str, wrappers: Iterable[tuple[str, str]]) -> str:
    for prefix, plain in wrappers:
        if name.startswith(prefix):
            name = plain + name[len(prefix) :]
    return name


def _module_differences(module: torch.nn.Module, tree: Mapping[str, Any]) -> list[str]:
    # load_state_dict itself casts in silence, and reports a missing name only after it has copied the others
    live = capture(module) or {}
    lines = one_sided(live.keys() - tree.keys(), tree.keys() - live.keys())
    for name in live.keys() & tree.keys():
        here, saved = live[name], tree[name]
        are_tensors = isinstance(here, torch.Tensor) and isinstance(saved, torch.Tensor)
        if not are_tensors or torch.nn.parameter.is_lazy(here):
            continue  # extra state, which its module checks, or a shape that is still open
        if (here.dtype, here.shape) != (saved.dtype, saved.shape):
            old, new = (f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in (saved, here))
            lines.append(f"{name}: {old} in the checkpoint, {new} here")
    return sorted(lines)


def _optimizer_differences(optimizer: torch.optim.Optimizer, tree: Mapping[str, Any]) -> list[str]:
    groups, saved_groups = optimizer.param_groups, tree["param_groups"]
    here = class_name(optimizer)
    saved_name = tree.get(CLASS_NAME, here)
    lines = [] if saved_name == here else [f"{CLASS_NAME}: {saved_name} in the checkpoint, {here} here"]
    if len(groups) != len(saved_groups):
        return [*lines, f"param_groups: {len(saved_groups)} in the checkpoint, {len(groups)} here"]
    parameters: dict[Hashable, torch.Tensor] = {}
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        where = f"param_groups/{index}"
        if len(group["params"]) != len(saved["params"]):
            lines.append(f"{where}: {len(saved['params'])} parameters in the checkpoint, {len(group['params'])} here")
        # what a newer torch added has a default, and a scheduler may have been attached since
        lost = group.keys() - saved.keys() - _SET_BY_SCHEDULERS - optimizer.defaults.keys()
        lines += one_sided(lost, saved.keys() - group.keys() - _SET_BY_SCHEDULERS, f"{where}/")
        parameters |= dict(zip(saved["params"], group["params"], strict=False))
    for key in parameters.keys() & tree["state"].keys():
        state, shape = tree["state"][key], tuple(parameters[key].shape)
        for name in _PARAMETER_SHAPED & state.keys():
            found = tuple(getattr(state[name], "shape", shape))
            if found != shape:
                lines.append(f"state/{key}/{name}: shape {found} in the checkpoint, the parameter has {shape}")
    return sorted(lines)


def _scheduler_differences(live: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> list[str]:
    # names with an underscore come and go between versions of torch; the others tell one scheduler from another
    here, there = ({key for key in state if not key.startswith("_")} for state in (live, saved))
    lines = one_sided(here - there, there - here, where)
    inner, saved_inner = live.get("_schedulers", []), saved.get("_schedulers", [])
    if len(inner) != len(saved_inner):
        return [*lines, f"{where}_schedulers: {len(saved_inner)} in the checkpoint, {len(inner)} here"]
    for index, pair in enumerate(zip(inner, saved_inner, strict=True)):
        lines += _scheduler_differences(*pair, f"{where}_schedulers/{index}/")
    return lines


def random_state() -> Tree:
    """Return the states of torch's global generators: "cpu"; "cuda", one per device, if in use; "mps" if present."""
    tree: Tree = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # asking would start it, and end forking
        tree["cuda"] = list(torch.cuda.get_rng_state_all())
    if torch.backends.mps.is_available():
        tree["mps"] = torch.mps.get_rng_state()
    return tree


def set_random_state(tree: Mapping[str, Any]) -> None:
    """Set torch's global generators; Mismatch, before anything changed, if the device of a saved state is not here."""
    wanted, present = len(tree.get("cuda", [])), torch.cuda.device_count()
    if wanted > present or ("mps" in tree and not torch.backends.mps.is_available()):
        device = f"{wanted} CUDA devices" if wanted > present else "an MPS device"
        message = f"the random state of {device} was saved, here are {present} CUDA devices"
        raise Mismatch(message, hint="resume on the same devices; elsewhere the random numbers would differ")
    torch.set_rng_state(tree["cpu"])
    for index, state in enumerate(tree.get("cuda", [])):
        torch.cuda.set_rng_state(state, index)
    if "mps" in tree:
        torch.mps.set_rng_state(tree["mps"])


def export(arrays: Mapping[str, HostArray], path: Path) -> None:
    """Write arrays as a `.pt` file that `torch.load(path, weights_only=True)` reads as a state_dict."""
    torch.save({name: from_host(array, None) for name, array in arrays.items()}, path)
