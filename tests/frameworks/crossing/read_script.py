"""Read the best weights of runs without any framework: `read_script.py RUN…`; prints {RUN: {name: [dtype, shape, bytes]}}."""

from __future__ import annotations

import json
import sys

import highcamp

FRAMEWORKS = {"jax", "keras", "lightning", "pytorch_lightning", "tensorflow", "torch", "transformers", "safetensors"}

if __name__ == "__main__":
    found = {}
    for path in sys.argv[1:]:
        arrays = highcamp.open(path).best.load("model")
        found[path] = {name: [str(each.dtype), list(each.shape), each.tobytes().hex()] for name, each in arrays.items()}
    assert not FRAMEWORKS & set(sys.modules), FRAMEWORKS & set(sys.modules)
    print(json.dumps(found))
