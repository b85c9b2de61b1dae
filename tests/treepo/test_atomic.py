from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from treepo import atomic


def test_a_crash_before_the_rename_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "summary.json"
    atomic.write_json(file, {"step": 1})

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_json(file, {"step": 2})
    assert json.loads(file.read_text()) == {"step": 1}


def test_nothing_but_the_file_is_left(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "a", "x")
    atomic.replace_link(tmp_path / "latest", "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "latest"]


def test_a_link_is_replaced_even_where_it_leads_to_a_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        atomic.replace_link(tmp_path / "latest", name)
    assert os.readlink(tmp_path / "latest") == "two"
    assert list((tmp_path / "one").iterdir()) == []


def test_arrays_tensors_paths_and_infinities_become_what_json_knows() -> None:
    value = {
        "array": np.array([[1, 2]], np.int32),
        "tensor": torch.tensor([0.5, float("nan")]),
        "scalar": np.float32(2.0),
        "path": Path("a/b"),
        "tuple": (True, None, float("-inf")),
        3: "key",
    }
    assert atomic.plain(value) == {
        "array": [[1, 2]],
        "tensor": [0.5, None],
        "scalar": 2.0,
        "path": "a/b",
        "tuple": [True, None, None],
        "3": "key",
    }


def test_what_json_cannot_hold_is_refused_by_type() -> None:
    with pytest.raises(ValueError, match="of type set"):
        atomic.plain({"x": {1, 2}})


def test_text_beyond_ascii_stays_readable(tmp_path: Path) -> None:
    atomic.write_json_lines(tmp_path / "rows.jsonl", [{"text": "π ≈ 3"}, {"text": "a\nb"}])
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines() == [
        '{"text": "π ≈ 3"}',
        '{"text": "a\\nb"}',
    ]
