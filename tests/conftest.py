"""What holds for all tests."""

from __future__ import annotations

import signal


def pytest_configure():
    """A shell starts what it runs in the background with Ctrl-C ignored, and every process below inherits that.

    Tests that interrupt the programs they start would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
