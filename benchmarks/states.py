"""Training states of known shapes, filled with random bytes; nothing is fetched."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

# GPT-2 small as its authors publish it: the output layer is the embedding again, so it is not counted twice.
VOCABULARY, POSITIONS, WIDTH, BLOCKS = 50_257, 1_024, 768, 12
ADAM_TENSORS = 4  # per parameter: itself, exp_avg, exp_avg_sq, step


@dataclass(frozen=True)
class Spec:
    """A state to build: "gpt2", or "even": `tensors` in all, of equal shape, that make up about `size_bytes`.

    Both are a model with the state of AdamW, float32; every fourth tensor is the optimizer's step, a single number.
    """

    kind: str
    tensors: int = 0
    size_bytes: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters: name -> shape."""
        if self.kind == "gpt2":
            return _gpt2()
        count = max(1, self.tensors // ADAM_TENSORS)
        width = max(1, math.isqrt(self.size_bytes // (12 * count)))
        # In blocks, for torch takes quadratic time to load a module of very many children.
        return {f"blocks.{place // 100}.{place % 100}.weight": (width, width) for place in range(count)}

    def total_bytes(self) -> int:
        """The bytes of every tensor of the state."""
        shapes = self.shapes().values()
        return sum(12 * math.prod(shape) + 4 for shape in shapes)

    def total_tensors(self) -> int:
        """How many tensors there are."""
        return ADAM_TENSORS * len(self.shapes())

    def plain(self) -> dict[str, Any]:
        """As an order can carry it."""
        return asdict(self)


def _gpt2() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, WIDTH), "wpe.weight": (POSITIONS, WIDTH)}
    for block in range(BLOCKS):
        layers = {
            "ln_1": (WIDTH,), "attn.c_attn": (WIDTH, 3 * WIDTH), "attn.c_proj": (WIDTH, WIDTH),
            "ln_2": (WIDTH,), "mlp.c_fc": (WIDTH, 4 * WIDTH), "mlp.c_proj": (4 * WIDTH, WIDTH),
        }  # fmt: skip
        for name, shape in layers.items():
            shapes[f"h.{block}.{name}.weight"] = shape
            shapes[f"h.{block}.{name}.bias"] = shape[-1:]
    return shapes | {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}


class TorchState:
    """A model and its AdamW with all of its state, as after many steps; same spec and seed, same bytes.

    frozen: the share of the parameters, the first ones, that is not trained and not the optimizer's.
    """

    def __init__(self, spec: Spec, *, seed: int = 0, frozen: float = 0.0) -> None:
        """Random bytes, for zeros would flatter whoever compresses."""
        import torch

        shapes = spec.shapes()
        generator = torch.Generator().manual_seed(seed)
        self.model: torch.nn.Module = torch.nn.Module()
        self.layers: list[torch.nn.Parameter] = []
        for place, (name, shape) in enumerate(shapes.items()):
            weight = torch.empty(shape).uniform_(-1, 1, generator=generator)
            parameter = torch.nn.Parameter(weight, requires_grad=place >= round(frozen * len(shapes)))
            _room(self.model, name).register_parameter(name.rpartition(".")[2], parameter)
            self.layers.append(parameter)
        trained = [parameter for parameter in self.layers if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=1e-3)
        for parameter in trained:
            self.optimizer.state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.empty_like(parameter, requires_grad=False).uniform_(-0.1, 0.1, generator=generator),
                "exp_avg_sq": torch.empty_like(parameter, requires_grad=False).uniform_(0, 0.1, generator=generator),
            }
        self._inputs = torch.randn(ROWS, shapes[next(iter(shapes))][-1], generator=generator)

    def tree(self) -> dict[str, Any]:
        """What a training loop hands to a saver: the state dicts of both, tensors live."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every tensor by a path, as views of the live memory."""
        return {path: tensor.detach().numpy() for path, tensor in tensors(self.tree()).items()}

    def forward_and_backward(self) -> None:
        """Run a batch of `ROWS` rows through an even state, layer by layer, and leave the gradients."""
        import torch

        rows = self._inputs
        for weight in self.layers:
            rows = rows + torch.tanh(rows @ weight) / len(self.layers)  # residual: it neither vanishes nor overflows
        self.optimizer.zero_grad()
        (rows**2).mean().backward()  # type: ignore[no-untyped-call]


ROWS = 64  # of a batch: few for a model of any size, so that a step is short and hides little


def _room(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module that holds a parameter called `name`, made if it is not there."""
    import torch

    for part in name.split(".")[:-1]:
        found = getattr(model, part, None)
        if found is None:
            found = torch.nn.Module()
            model.add_module(part, found)
        model = found
    return model


def tensors(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dicts and lists, by path."""
    import torch

    if isinstance(tree, torch.Tensor):
        return {path: tree}
    if isinstance(tree, dict):
        pairs = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        pairs = [(str(place), value) for place, value in enumerate(tree)]
    else:
        return {}
    return {name: found for key, value in pairs for name, found in tensors(value, f"{path}/{key}").items()}


def digests(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    """Shape, type and digest of the bytes of every array: two states are equal if and only if these are."""
    import xxhash

    found = {}
    for path, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        found[path] = f"{array.dtype} {array.shape} {xxhash.xxh3_128_hexdigest(flat.data)}"
    return found


def difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """The first tensor, by path, that is not the same in both tables of `digests`; empty if all are."""
    paths = sorted(found.keys() | expected.keys())
    return next((path for path in paths if found.get(path) != expected.get(path)), "")
