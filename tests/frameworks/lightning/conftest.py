from __future__ import annotations

import logging

import pytest
import torch

# Lightning's advice on tiny loaders, and what it does that this torch calls outdated.
QUIET = (
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*treespec.*:FutureWarning",
)


def pytest_collection_modifyitems(items):
    for item in items:
        for line in QUIET:
            item.add_marker(pytest.mark.filterwarnings(line))


@pytest.fixture(autouse=True)
def quick_and_quiet():
    """Models this small are slower on two threads; Lightning says much that no test reads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
