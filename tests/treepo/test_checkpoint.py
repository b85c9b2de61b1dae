import json

import pytest

from treepo.checkpoint import (
    LATEST,
    MARKER,
    RunState,
    check_complete,
    latest_checkpoint,
    read_state,
    save_checkpoint,
)


def state(step: int) -> RunState:
    return RunState(
        step=step, policy_version=step, data_position={"epoch": 0, "offset": step}, digest="ab",
        seconds=1.0, seed=0, before={"greedy": 0.5}, tracking={"wandb_id": "x"},
    )  # fmt: skip


def write(folder):
    (folder / "learner").mkdir()
    (folder / "learner" / "rank0.pt").write_bytes(b"weights")


def test_what_is_saved_is_read_back_whole(tmp_path):
    folder = save_checkpoint(tmp_path, state(3), write, keep=2)
    assert folder.name == "global_step_3" and read_state(folder) == state(3)
    assert (tmp_path / LATEST).read_text() == "3"


def test_only_the_newest_stay(tmp_path):
    for step in (2, 9, 10):
        save_checkpoint(tmp_path, state(step), write, keep=2)
    assert sorted(p.name for p in tmp_path.glob("global_step_*")) == [
        "global_step_10",
        "global_step_9",
    ]
    assert latest_checkpoint(tmp_path).name == "global_step_10"


def test_a_crash_while_writing_leaves_the_older_checkpoint_in_force(tmp_path):
    save_checkpoint(tmp_path, state(1), write, keep=2)

    def crash(folder):
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state(2), crash, keep=2)
    assert latest_checkpoint(tmp_path).name == "global_step_1"
    save_checkpoint(tmp_path, state(2), write, keep=2)  # what the crash left is no hindrance
    assert latest_checkpoint(tmp_path).name == "global_step_2"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / MARKER).unlink(), "completion marker"),
        (lambda f: (f / "learner" / "rank0.pt").unlink(), "learner/rank0.pt is missing"),
        (lambda f: (f / "learner" / "rank0.pt").write_bytes(b"w"), "1 bytes instead of 7"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_whole_ones_are_named(tmp_path, damage, message):
    save_checkpoint(tmp_path, state(1), write, keep=2)
    broken = save_checkpoint(tmp_path, state(2), write, keep=2)
    damage(broken)
    with pytest.raises(ValueError, match=message) as error:
        read_state(broken)
    assert "global_step_1" in str(error.value)
    assert latest_checkpoint(tmp_path).name == "global_step_1"


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, state(1), write, keep=2)
    again = save_checkpoint(tmp_path, state(1), lambda f: (f / "other").write_text("x"), keep=2)
    assert json.loads((again / MARKER).read_text())["files"].keys() == {"other", "state.json"}


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        check_complete(tmp_path / "global_step_7")
    assert latest_checkpoint(tmp_path / "nothing") is None
