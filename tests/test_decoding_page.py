"""The example of docs/decoding.md runs on a short prompt, as printed but for the model's folder,
dtype, device and the size of the pool; and the page names files that exist.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "decoding.md").read_text()
TINY = ROOT / "treepo" / "assets" / "tiny_chain_sum"


def test_the_example_runs_on_a_short_prompt_and_frees_all_that_it_made(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    for printed, here in {
        '"my_model"': repr(str(TINY)),
        'dtype="bfloat16", device="cuda"': 'dtype="float32", device="cpu", num_kv_slots=20000',
    }.items():
        assert example.count(printed) == 1
        example = example.replace(printed, here)
    token_ids = [5, 6]
    names = {"token_ids": token_ids}
    exec(compile(example, "docs/decoding.md", "exec"), names)
    engine, done, branch, here = (names[name] for name in ("engine", "done", "branch", "here"))
    assert capsys.readouterr().out.count("\n") >= 16
    assert branch.path_token_ids().tolist() == [*token_ids, done.token_ids[0]]
    assert here.path_token_ids().tolist() == [*token_ids, 5, 9]
    assert engine.is_idle and engine.tree.num_protected == 0
    engine.check_integrity()


def test_files_and_tests_that_the_page_names_exist():
    names = set(re.findall(r"`(\w+\.(?:py|svg))`", PAGE))
    assert len(names) > 20
    known = {path.name for folder in ("rollout", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert names - known == set()
