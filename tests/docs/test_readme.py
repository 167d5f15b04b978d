"""What the README shows is run, as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)

# What a reader has already: data and a model. Everything about highcamp is in the README's own lines.
PRELUDES = {
    "highcamp.keras": """
import keras, numpy as np
keras.utils.set_random_seed(0)
x_train, y_train = np.random.rand(64, 8).astype("float32"), np.random.randint(0, 3, 64)
x_val, y_val = x_train[:16], y_train[:16]
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)])
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
""",
    "from lightning": """
import torch, lightning
lightning.seed_everything(0)
class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 3)
    def step(self, batch):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
    def training_step(self, batch):
        return self.step(batch)
    def validation_step(self, batch):
        self.log("val_loss", self.step(batch))
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
train_loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
val_loader = torch.utils.data.DataLoader(data, batch_size=64)
model = Model()
""",
    "from transformers": """
import torch, transformers
transformers.set_seed(0)
data = [{"input_ids": torch.arange(start, start + 8), "labels": torch.arange(start, start + 8)} for start in range(8)]
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))
""",
    "import Checkpointer, Every\n\nevery": """
import torch
torch.manual_seed(0)
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
def train_step(x, y):
    loss = torch.nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
def evaluate():
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1])
""",
    "like=state": """
import jax, jax.numpy as jnp, optax
optimizer = optax.adam(1e-2)
params = {"w": jnp.ones((3,))}
state = {"params": params, "optimizer": optimizer.init(params)}
def train_step(state):
    loss, gradient = jax.value_and_grad(lambda p: jnp.sum(p["w"] ** 2))(state["params"])
    updates, inner = optimizer.update(gradient, state["optimizer"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": inner}, loss
""",
}


def _prelude(block: str) -> str:
    if "highcamp.open" in block:
        return ""  # the runs that the others have made
    return next(prelude for mark, prelude in PRELUDES.items() if mark in block)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def _run(command: list[str], workplace: Path) -> str:
    environment = {**os.environ, "KERAS_BACKEND": "torch", "JAX_PLATFORMS": "cpu", "MPLCONFIGDIR": str(workplace)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        command, cwd=workplace, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_python_example_of_the_readme_runs_twice_and_its_commands_run(workplace: Path) -> None:
    """An example that does not run costs a newcomer the first hour; twice, because the second time it resumes."""
    examples = [block for language, block in BLOCKS if language == "python"]
    assert len(examples) == 6

    for example in examples:
        script = _prelude(example) + example
        for _ in range(2):
            _run([sys.executable, "-c", script], workplace)

    commands = [
        line.partition("#")[0].split() for language, block in BLOCKS if language == "sh" for line in block.splitlines()
    ]
    shown = [words for words in commands if words and words[0] == "highcamp"]
    assert len(shown) == 5
    for words in shown:
        _run([sys.executable, "-m", "highcamp.cli", *words[1:]], workplace)


def test_the_make_targets_of_the_readme_exist() -> None:
    """The two commands are the first thing that is typed."""
    makefile = (Path(__file__).parents[2] / "Makefile").read_text("utf-8")

    targets = [
        line.split()[1]
        for language, block in BLOCKS
        if language == "sh"
        for line in block.splitlines()
        if line.startswith("make ")
    ]

    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_local_link_and_picture_of_the_readme_is_there() -> None:
    """A dead link on the first page says that nobody looks after the house."""
    root = Path(__file__).parents[2]

    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]

    assert [link for link in links if not (root / link).exists()] == []
