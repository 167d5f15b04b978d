"""Optimizer steps: what they write to, and a hook in front of them."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping


def live_state(module: torch.nn.Module) -> Mapping[str, Any]:
    """The `state_dict` of a module with the parameters themselves, which stay the same objects from save to save."""
    kind: Any = type(module)
    return module.state_dict(keep_vars=True) if _keeps_variables(kind) else module.state_dict()


@functools.lru_cache(maxsize=256)
def _keeps_variables(kind: Any) -> bool:
    """Whether the class has not replaced `state_dict` by one that takes no such argument."""
    parameters = inspect.signature(kind.state_dict).parameters.values()
    return any(each.name == "keep_vars" or each.kind is each.VAR_KEYWORD for each in parameters)


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """PyTorch's own class of an optimizer or of what it derives from, such as "AdamW"; else the name of its class.

    Its settings and its state do not always tell: an AdamW would take those of an Adam.
    """
    kinds = type(optimizer).__mro__
    own = [kind for kind in kinds if kind.__module__.startswith("torch.optim.") and kind is not torch.optim.Optimizer]
    return (own or kinds)[0].__name__


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters that an optimizer has been given, trained or not."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def owned(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Every tensor that a step of the optimizer writes to: parameters that are trained, and its state."""
    yield from (parameter for parameter in parameters(optimizer) if parameter.requires_grad)
    for state in optimizer.state.values():
        yield from _tensors(state)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from _tensors(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _tensors(child)


def before_step(obj: object, call: Callable[[], None]) -> Callable[[], None] | None:
    """Call `call` before each step of an optimizer; returns what takes the hook away, None if `obj` is no optimizer."""
    if not isinstance(obj, torch.optim.Optimizer) or not hasattr(obj, "_optimizer_step_pre_hooks"):
        return None
    handle = obj.register_step_pre_hook(lambda *_: call())
    return handle.remove


def writes(tensors: Iterable[torch.Tensor]) -> list[int]:
    """The version counter of each tensor; 0 for an inference tensor, which has none."""
    # The name is torch's own documentation's.
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]  # noqa: SLF001
