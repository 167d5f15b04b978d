from __future__ import annotations

import pytest

# The asserts of the shipped contract explain themselves as those of a test file do.
pytest.register_assert_rewrite("highcamp.testing.contract")
