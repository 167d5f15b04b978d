"""The barrier in front of the optimizers' steps, behind which a snapshot is copied while training goes on.

Lightning's automatic optimization runs forward and backward within `optimizer.step(closure)`. A barrier in front of the step
would wait for the copy before there is anything to overlap it with; this one stands behind the closure, before the weights
change.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from highcamp.lightning.part import Part
from highcamp.run import live

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class Optimizers(Part):
    """The optimizers of a Trainer as one object of a checkpoint. They are made later than it is tracked."""

    stands_for_optimizers = True
    """See `live.before_step`."""

    def __init__(self, give: Callable[[], Any]) -> None:
        """give: their state now."""
        super().__init__(give)
        self._call: Callable[[], None] | None = None
        self._handles: list[Any] = []
        self._stepped: list[torch.optim.Optimizer] = []
        self._is_over = False  # what has stepped was asked for: the next step begins anew

    def before_step(self, call: Callable[[], None]) -> Callable[[], None]:
        """Have `call` called before an optimizer changes what it holds, as soon as there are optimizers."""
        self._call = call
        return self._remove

    def attach(self, optimizers: Iterable[object]) -> None:
        """They are made. Nothing happens unless a barrier is wanted."""
        call = self._call
        if call is None:
            return
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks"):
                self._handles.append(optimizer.register_step_pre_hook(partial(self._step_begins, call)))

    def parameters(self) -> list[object]:
        """What those train that have stepped since this was last asked; a step of others might not be noticed."""
        self._is_over = True
        return [each for optimizer in self._stepped for each in live.parameters(optimizer)]

    def owned(self) -> Iterator[object]:
        """What the same write to."""
        for optimizer in self._stepped:
            yield from live.owned(optimizer)

    def _step_begins(
        self, call: Callable[[], None], optimizer: torch.optim.Optimizer, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._is_over:
            self._stepped, self._is_over = [], False
        if not any(each is optimizer for each in self._stepped):
            self._stepped.append(optimizer)
        closure = args[1] if len(args) > 1 else options.get("closure")
        # torch's own optimizers call it first; one of somebody else's may change the weights before.
        if not callable(closure) or not type(optimizer).__module__.startswith("torch.optim."):
            call()
            return None

        def closed() -> Any:
            loss = closure()
            call()
            return loss

        if len(args) > 1:
            return (args[0], closed, *args[2:]), options
        return args, {**options, "closure": closed}

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._stepped, self._call = [], [], None
