"""The example of docs/decoding.md runs as it stands, and the page names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "decoding.md").read_text()
TINY = ROOT / "treepo" / "assets" / "tiny_chain_sum"


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    example = example.replace('"my_model"', repr(str(TINY)))
    example = example.replace(
        'dtype="bfloat16", device="cuda"', 'dtype="float32", num_kv_slots=20000'
    )
    names = {"token_ids": np.resize([5, 6, 7, 8, 9, 10, 11], 690)}
    exec(compile(example, "docs/decoding.md", "exec"), names)
    engine, here, branch = names["engine"], names["here"], names["branch"]
    assert capsys.readouterr().out.count("\n") >= 16
    assert here.path_token_ids()[-2:].tolist() == [5, 9] and here.is_freed
    assert len(branch.path_token_ids()) == 700
    engine.check_integrity()


def test_files_and_tests_that_the_page_names_exist():
    names = set(re.findall(r"`(\w+\.(?:py|svg))`", PAGE))
    assert len(names) > 20
    known = {path.name for folder in ("rollout", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert names - known == set()
