"""`python -m highcamp.cli`: the same as `highcamp`, for where no scripts are installed."""

from __future__ import annotations

import sys

from highcamp.cli import main

if __name__ == "__main__":
    sys.exit(main())
