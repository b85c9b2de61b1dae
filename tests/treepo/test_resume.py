"""A run killed at any point goes on to the same end as one that was left alone."""

import os
import signal
from pathlib import Path

import pytest
from training_runs import assert_same_end, num_rows, run, start, wait_for

pytestmark = pytest.mark.long

OVERRIDES = (
    "trainer.total_steps=12",  # more than half of it left when a signal comes
    "trainer.save_freq=2",
    "trainer.keep_checkpoints=9",
    "trainer.learner.policy_loss.kl_loss_coef=0.01",  # a reference that is loaded anew
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    outputs = tmp_path_factory.mktemp("uninterrupted")
    done = run(outputs, *OVERRIDES)
    assert done.returncode == 0, done.stderr
    return (outputs / "latest").resolve()


def kill_and_resume(outputs: Path, when, with_signal: int = signal.SIGKILL) -> Path:
    process = start(outputs, *OVERRIDES)
    wait_for(lambda: (outputs / "latest").exists() and when(), process)
    os.kill(process.pid, with_signal)
    _, errors = process.communicate()
    if with_signal != signal.SIGKILL:
        assert process.returncode == 130, errors
        assert "goes on from the last checkpoint" in errors and "Traceback" not in errors
    killed = (outputs / "latest").resolve()
    done = run(outputs, *OVERRIDES)
    assert done.returncode == 0, done.stderr
    assert (outputs / "latest").resolve() == killed, "a new run was begun instead"
    return killed


def same_end(one: Path, other: Path) -> None:
    assert_same_end(one, other, "rollout/query_tokens")


def test_sigkill_after_a_checkpoint_is_resumed_to_the_same_weights(uninterrupted, tmp_path):
    killed = kill_and_resume(tmp_path, lambda: num_rows(tmp_path) > 3)
    same_end(uninterrupted, killed)


def test_sigkill_before_the_first_checkpoint_starts_the_same_run_over(uninterrupted, tmp_path):
    killed = kill_and_resume(tmp_path, lambda: num_rows(tmp_path) > 1)
    same_end(uninterrupted, killed)


def test_sigkill_while_a_checkpoint_is_written_falls_back_to_the_one_before(
    uninterrupted, tmp_path
):
    def writing() -> bool:
        return (tmp_path / "latest" / "checkpoints" / ".global_step_4.partial").exists()

    killed = kill_and_resume(tmp_path, writing)
    same_end(uninterrupted, killed)


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_says_how_to_go_on_and_is_resumed(
    uninterrupted, tmp_path, with_signal
):
    stopped = kill_and_resume(tmp_path, lambda: num_rows(tmp_path) > 3, with_signal)
    same_end(uninterrupted, stopped)


def test_a_second_start_after_the_end_is_a_new_run(uninterrupted):
    outputs = uninterrupted.parent.parent
    done = run(outputs, *OVERRIDES)
    assert done.returncode == 0, done.stderr
    again = (outputs / "latest").resolve()
    assert again != uninterrupted
    same_end(uninterrupted, again)  # and, with the same seed, to the same weights
