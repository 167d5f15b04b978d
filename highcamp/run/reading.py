"""Reading: one look at a checkpoint, from its `state.json` to the bytes of the objects that are asked for."""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from highcamp.core.manifest import STATE
from highcamp.core.tree import unflatten
from highcamp.errors import CheckpointNotFound, Damaged
from highcamp.run import commit
from highcamp.run.restoring import Overwritten, restore_objects
from highcamp.run.tensors import Saved, damaged, open_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from highcamp.core.array import HostArray
    from highcamp.run.checkpoint import Checkpoint


class Reading:
    """`state.json` is parsed once, and the files of an object are opened when it is asked for, those of others never.

    Files stay open until `close`, or until nobody holds the reading any more: what has begun to be read is read to its
    end, even if the checkpoint is removed meanwhile.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Nothing is read yet."""
        self._checkpoint = checkpoint
        self._state: commit.State | None = None
        files = self._files = ExitStack()
        self._finalizer = weakref.finalize(self, files.close)

    def saved(self, name: str) -> Saved:
        """The saved state of one object; its tensors are not read yet, but their table is known to fit its tree.

        Raises CheckpointNotFound, also for a checkpoint that was removed, and Damaged.
        """
        self.require(name)
        with self._told():
            state = self._parsed()
            files = open_files(self._checkpoint, name, self._files)
            saved = Saved(state.objects[name], state.kinds.get(name, {}), files, self)
            self._check(name, saved)
        return saved

    def state(self, name: str) -> Any:
        """The whole state of one object as plain data, NumPy arrays as tensors; verified. Raises as `saved`, InvalidState."""
        skeleton, tensors = self.load(name, mapped=False)
        return unflatten(skeleton, lambda tensor: tensors[tensor].numpy())

    def load(self, name: str, *, mapped: bool) -> tuple[Any, dict[str, HostArray]]:
        """The tree of one object and its verified tensors by name: read-only views of its files, or memory of their own.

        Raises as `saved`.
        """
        saved = self.saved(name)
        with self._told():
            return saved.skeleton, saved.load(mapped=mapped)

    def restore(self, objects: Mapping[str, object]) -> None:
        """See `Checkpoint.restore`."""
        for name in objects:
            self.require(name)
        pairs = {name: (obj, self.saved(name)) for name, obj in objects.items()}
        with self._told():
            restore_objects(pairs, where=self._checkpoint.path)

    def skeleton(self, name: str) -> Any:
        """The tree of one object as JSON, tensors named. Raises as `saved`."""
        self.require(name)
        with self._told():
            return self._parsed().objects[name]

    def require(self, name: str) -> None:
        """Raise CheckpointNotFound if the checkpoint does not hold an object of this name."""
        checkpoint = self._checkpoint
        if name not in checkpoint.manifest.objects:
            raise CheckpointNotFound(
                f"{checkpoint.path} holds no object {name!r}",
                path=checkpoint.path,
                hint=f"it holds {', '.join(checkpoint.objects)}",
            )

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        """Use it in a `with` block, so that its files are closed at the end."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _parsed(self) -> commit.State:
        if self._state is None:
            checkpoint = self._checkpoint
            self._state = commit.read_state(checkpoint.store, checkpoint.name, checkpoint.manifest)
        return self._state

    def _check(self, name: str, saved: Saved) -> None:
        """A tree that is malformed, or does not go with its files, is damage that is told before anything is touched."""
        try:
            specs = saved.specs
            unflatten(saved.skeleton, specs.__getitem__)
        except (Damaged, KeyError) as error:
            saved.verify()  # if a file is altered, that is what to say
            problem = error.message if isinstance(error, Damaged) else f"it names a tensor {error} that is not there"
            raise damaged(self._checkpoint, f"the {name} in {STATE} cannot be read: {problem}") from error
        if len(specs) != sum(len(file.layout.entries) for file in saved.files):
            saved.verify()
            raise damaged(self._checkpoint, f"two files of {name} hold a tensor of the same name")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Files that are gone with their manifest were removed, not damaged."""
        try:
            yield
        except Overwritten:  # what has become of the objects matters more
            raise
        except Damaged as error:
            checkpoint = self._checkpoint
            if commit.read_manifest(checkpoint.store, checkpoint.name) is not None:
                raise
            raise CheckpointNotFound(
                f"{checkpoint.path} was removed while it was read",
                path=checkpoint.path,
                hint="ask the run again, or pin it first",
            ) from error
