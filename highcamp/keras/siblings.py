"""The other callbacks of a `fit`: which they are, in which order, and what they remember."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import keras

from highcamp.errors import InvalidArgument, Refused
from highcamp.keras.state import callback_state, has_callback_state, set_callback_state

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_FRAMES = 8  # fit -> CallbackList -> set_model -> ours is four; decorators and wrappers add a few


class Siblings:
    """The callbacks whose state is kept, under names that the same script gives again: "EarlyStopping", "EarlyStopping~2"."""

    def __init__(self, given: Iterable[Any] = ()) -> None:
        """given: callbacks to keep besides those that can be seen. Raises InvalidArgument for one without state."""
        self._given = tuple(given)
        for callback in self._given:
            if not has_callback_state(callback):
                raise InvalidArgument(
                    f"CheckpointCallback: {type(callback).__name__} has no state that could be saved",
                    hint="give it state_dict() and load_state_dict(state), or leave it out of callbacks=",
                )
        self._owner: Any = None
        self._callbacks: list[Any] = list(self._given)
        self._restored: dict[str, Any] = {}

    def look(self, owner: Any) -> None:
        """Find the list that `owner` is in, from within its `set_model`."""
        self._owner = owner
        self._list = _enclosing_list(owner)
        seen = [] if self._list is None else list(self._list.callbacks)
        others = [callback for callback in seen if callback is not owner and has_callback_state(callback)]
        self._callbacks = others + [callback for callback in self._given if not any(callback is one for one in others)]
        self._seen = seen

    def state_dict(self) -> dict[str, Any]:
        """What every sibling remembers now."""
        return {name: callback_state(callback) for name, callback in self._named().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what was saved; `apply` puts it in place. Callbacks that have come or gone since are said by name."""
        named = self._named()
        gone = sorted(set(state) - set(named))
        if gone:
            warnings.warn(
                f"the checkpoint holds the state of {', '.join(gone)}, which is not among the callbacks now",
                stacklevel=2,
            )
        self._restored = {name: tree for name, tree in state.items() if name in named}

    def apply(self) -> None:
        """Set what was restored; after the callbacks' own `on_train_begin`, which resets them."""
        for name, callback in self._named().items():
            if name in self._restored:
                set_callback_state(callback, self._restored[name])

    def apply_late(self) -> None:
        """Set again those that come after us in the list: their `on_train_begin` ran after ours."""
        named = self._named()
        late = self._late()
        for name, callback in named.items():
            if name in self._restored and (any(callback is one for one in late) or not self._seen):
                # Known by hand only: SwapEMAWeights has begun its epoch already, and does not reset.
                if not self._seen and isinstance(callback, keras.callbacks.SwapEMAWeights):
                    continue
                set_callback_state(callback, self._restored[name])

    def refuse_twin(self) -> None:
        """Raise Refused if there is a second callback like ours."""
        twins = [each for each in self._seen if isinstance(each, type(self._owner))]
        if len(twins) > 1:
            raise Refused(
                f"{len(twins)} CheckpointCallbacks in one fit: the model could be restored from only one of their runs",
                hint="leave one out; keep=Keep(best=…, last=…) keeps several checkpoints for several reasons",
            )

    def warn_of_order(self) -> None:
        """Say which callbacks change their state, or the model's, after ours has saved it."""
        changing = (keras.callbacks.LearningRateScheduler,)
        late = [each for each in self._late() if has_callback_state(each) or isinstance(each, changing)]
        if late:
            names = ", ".join(type(callback).__name__ for callback in late)
            warnings.warn(
                f"CheckpointCallback comes before {names} in callbacks=[…], so what that does at the end of an epoch is "
                "not in the checkpoint of that epoch; put CheckpointCallback last",
                stacklevel=2,
            )

    def early_stopping(self) -> Any | None:
        """The EarlyStopping that has ended training, if one has."""
        for callback in self._callbacks:
            if isinstance(callback, keras.callbacks.EarlyStopping) and callback.stopped_epoch > 0:
                return callback
        return None

    def take_turns(self, is_wanted: bool) -> bool:  # noqa: FBT001  (switched on, and off again)
        """Have the hooks at batch ends called in the thread that trains, for a while. False if the list is not known.

        On JAX and PyTorch Keras calls them in others, beside the next batch, where nothing can be saved.
        """
        found = self._list
        if found is None:
            return False
        if is_wanted and found._async_train:  # noqa: SLF001  (there is no other door)
            found._flush_futures()  # noqa: SLF001
            found._async_train, self._was_async = False, True  # noqa: SLF001
        elif not is_wanted and self._was_async:
            found._async_train, self._was_async = True, False  # noqa: SLF001
        return True

    def leave_evaluation_alone(self) -> bool:
        """Whether none of the callbacks changes the model while it is evaluated, as SwapEMAWeights does."""
        hooks = [each.on_test_begin for each in self._seen if each is not self._owner]
        swaps = any(isinstance(each, keras.callbacks.SwapEMAWeights) for each in self._seen)
        return self._list is not None and not swaps and all(hook.__module__.startswith("keras.") for hook in hooks)

    def _named(self) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for callback in self._callbacks:
            kind = name = type(callback).__name__
            count = 1
            while name in named:
                count += 1
                name = f"{kind}~{count}"
            named[name] = callback
        return named

    def _late(self) -> list[Any]:
        places = [place for place, callback in enumerate(self._seen) if callback is self._owner]
        return self._seen[places[0] + 1 :] if places else []

    _seen: list[Any] = []  # noqa: RUF012  (replaced, never changed)
    _list: Any = None
    _was_async = False


def _enclosing_list(callback: Any) -> Any | None:
    """The CallbackList that is calling us, None if nobody of that kind is.

    Keras gives a callback no way to its list. `set_model` is called by the list's own method, whose `self` it is.
    """
    frame = sys._getframe(1)  # noqa: SLF001  (there is no other door)
    for _ in range(_MAX_FRAMES):
        back = frame.f_back
        if back is None:
            return None
        frame = back
        found = frame.f_locals.get("self")
        if isinstance(found, keras.callbacks.CallbackList) and any(one is callback for one in found.callbacks):
            return found
    return None
