"""Makes the helpers of tests/rollout and tests/trainers importable by the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("rollout", "trainers"):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / folder))
