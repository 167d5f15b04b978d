"""Lightning: the whole of highcamp inside `trainer.fit`, and `.ckpt` files that survive crashes.

    from highcamp.lightning import CheckpointCallback, DurableIO

    Trainer(max_epochs=50, callbacks=[CheckpointCallback("runs/digits", monitor="val_loss")])
    Trainer(plugins=[DurableIO()])  # for those who stay with Lightning's own ModelCheckpoint

Works with the package `lightning` from 2.6 on, below 3. Its twin `pytorch_lightning` has classes of its own, which know
nothing of these.
"""

from __future__ import annotations

from highcamp.lightning.supported import check_version

check_version()

from highcamp.lightning.callback import CheckpointCallback  # noqa: E402  (an older Lightning has not what it imports)
from highcamp.lightning.durable import DurableIO  # noqa: E402

__all__ = ["CheckpointCallback", "DurableIO"]
