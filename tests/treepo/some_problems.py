"""Problems that differ in their ids alone."""

from __future__ import annotations

import numpy as np

from treepo.data import Problem


def problems(size: int) -> list[Problem]:
    return [
        Problem(
            id=f"p:{i}",
            prompt_token_ids=np.array([i], dtype=np.int32),
            data_source="s",
            ground_truth=None,
            extra_info={},
            prompt_text=str(i),
        )
        for i in range(size)
    ]
