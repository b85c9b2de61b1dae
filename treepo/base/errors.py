"""Failures whose message is all that a person needs; the command line prints them without a
traceback. What a user can mend in a configuration is a ``ValueError`` instead.
"""

from __future__ import annotations


class RunFailed(RuntimeError):
    """A run cannot go on: a worker is gone, or weights did not arrive. Checkpoints stand."""
