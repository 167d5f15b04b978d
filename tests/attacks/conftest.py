from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # attack_parsers, which the fuzzer imports too
pytest.register_assert_rewrite("attack_parsers")
