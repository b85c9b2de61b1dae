from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from treepo.export import ExportConfig, work
from treepo.export_model import model_card
from treepo.model_folder import ModelSource
from treepo.run_folder import RunFolder


def test_an_export_loads_with_transformers_and_has_the_same_weights(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "model"
    work(ExportConfig(checkpoint=str(tiny_model_path), output=str(output)), False)
    exported = AutoModelForCausalLM.from_pretrained(output)
    original = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    for (name, theirs), (other, ours) in zip(
        original.state_dict().items(), exported.state_dict().items(), strict=True
    ):
        assert name == other and theirs.dtype == ours.dtype and torch.equal(theirs, ours)
    assert exported.generation_config.eos_token_id == original.generation_config.eos_token_id
    text = "12 + 7 = 19"
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (output, tiny_model_path))
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == theirs.chat_template
    assert list(output.glob("*.safetensors"))
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_an_export_can_change_the_dtype(tiny_model_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    config = ExportConfig(
        checkpoint=str(tiny_model_path), output=str(output), dtype="bfloat16", verify=False
    )
    work(config, False)
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == torch.bfloat16


def test_a_folder_that_is_not_empty_is_never_written_to(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="not empty"):
        work(ExportConfig(checkpoint=str(tiny_model_path), output=str(tmp_path)), False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_dry_run_writes_nothing(tiny_model_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    work(ExportConfig(checkpoint=str(tiny_model_path), output=str(output)), True)
    assert not output.exists()


def test_an_export_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ValueError, match="no model can be loaded"):
        work(ExportConfig(checkpoint=str(broken), output=str(tmp_path / "model")), False)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="dtype='half'.*bfloat16"):
        ExportConfig(checkpoint="x", output="y", dtype="half")


def test_the_model_card_names_the_run_and_its_scores(tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "adding" / "20261123-080000-abcdef")
    run.path.mkdir(parents=True)
    run.finish({"before": {"easy greedy": 0.4}, "after": {"easy greedy": 0.9, "new": None}})
    card = model_card(ModelSource(model="x", run=run, step=60), "adder")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "Run `adding/20261123-080000-abcdef`, step 60." in card
    assert "| easy greedy | 0.400 | 0.900 |" in card
    assert 'from_pretrained("adder")' in card
