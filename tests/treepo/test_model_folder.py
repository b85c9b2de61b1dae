from __future__ import annotations

from pathlib import Path

import pytest

from treepo.checkpoint import RunState, save_checkpoint
from treepo.model_folder import find_model
from treepo.run_folder import RunFolder


def state(step: int) -> RunState:
    return RunState(
        step=step, policy_version=step, data_position={}, digest="", seconds=0.0, seed=0
    )


def write_model(folder: Path) -> None:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with checkpoints at steps 5 and 10."""
    run = RunFolder(path=tmp_path / "adding" / "20261123-080000-abcdef")
    run.checkpoints.mkdir(parents=True)
    run.config_file.write_text("seed: 1\n")
    for step in (5, 10):
        save_checkpoint(run.checkpoints, state(step), write_model, keep=2)
    return run


def test_a_run_means_its_newest_complete_checkpoint(run: RunFolder) -> None:
    newest = run.checkpoints / "global_step_10"
    for name in (run.path, run.checkpoints, newest, newest / "hf"):
        source = find_model(str(name))
        assert source.model == str(newest / "hf")
        assert (source.run, source.step) == (run, 10)
    (newest / "complete.json").unlink()
    assert find_model(str(run.path)).step == 5


def test_a_link_to_a_run_is_followed(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to("adding/20261123-080000-abcdef")
    assert find_model(str(tmp_path / "latest")).run == run


def test_a_checkpoint_without_its_completion_marker_is_refused(run: RunFolder) -> None:
    folder = run.checkpoints / "global_step_10"
    (folder / "complete.json").unlink()
    for name in (folder, folder / "hf"):
        with pytest.raises(ValueError, match="completion marker.*global_step_5"):
            find_model(str(name))


def test_a_checkpoint_that_lost_a_file_is_refused(run: RunFolder) -> None:
    (run.checkpoints / "global_step_10" / "hf" / "config.json").unlink()
    with pytest.raises(ValueError, match="hf/config.json is missing"):
        find_model(str(run.checkpoints / "global_step_10"))


def test_a_model_folder_is_taken_as_it_is(run: RunFolder, tmp_path: Path) -> None:
    for folder, owner in ((tmp_path / "elsewhere", None), (run.export, run)):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        source = find_model(str(folder))
        assert (source.model, source.run, source.step) == (str(folder), owner, None)


def test_a_name_on_the_hub_is_passed_on() -> None:
    assert find_model("someone/some-model").model == "someone/some-model"


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "asset:nothing"])
def test_a_path_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"checkpoint='{name}'"):
        find_model(name)


def test_a_folder_that_is_nothing_of_the_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a model folder"):
        find_model(str(tmp_path))


def test_a_run_without_a_complete_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find_model(str(tmp_path))
