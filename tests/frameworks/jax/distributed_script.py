"""One of two processes that share arrays: `distributed_script.py ADDRESS NUMBER DIRECTORY`; prints what it was told."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from highcamp import Checkpointer
from highcamp.errors import InvalidState, Mismatch

address, number, directory = sys.argv[1:]
jax.distributed.initialize(address, 2, int(number))
mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
spread = NamedSharding(mesh, P("x"))
shared = jax.make_array_from_callback((4,), spread, lambda index: np.arange(4.0, dtype=np.float32)[index])

with Checkpointer(f"{directory}/{number}", verbose=0) as checkpointer:
    try:
        checkpointer.save({"params": {"w": shared}}, step=1)
    except InvalidState as refused:
        print(refused)
    checkpointer.save({"params": {"w": jnp.arange(4.0)}}, step=2).wait()
    try:
        checkpointer.restore(like={"params": {"w": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=spread)}})
    except Mismatch as refused:
        print(refused)
    print(checkpointer.restore(like={"params": {"w": jnp.zeros(4)}})["params"]["w"])
jax.distributed.shutdown()
