from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from treepo.run_folder import (
    RunFolder,
    RunIsBusy,
    begin_run,
    claim_unfinished_run,
    list_runs,
    new_run_id,
)

ROOT = Path(__file__).resolve().parents[2]


def start(code: str) -> subprocess.Popen:
    """A process that runs ``code``, says a line, and then waits to be told to end."""
    source = f"import sys\nfrom pathlib import Path\nfrom treepo.run_folder import *\n{code}\n"
    return subprocess.Popen(
        [sys.executable, "-c", source + "print(flush=True)\nsys.stdin.read()"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder_of(request: pytest.FixtureRequest):
    """Starts a living process that holds a run's lock."""

    def hold(run: RunFolder) -> subprocess.Popen:
        process = start(f"lock = RunFolder(path=Path({str(run.path)!r})).lock()")
        request.addfinalizer(lambda: (process.kill(), process.communicate()))
        process.stdout.readline()
        return process

    return hold


def unfinished_run(outputs: Path, experiment: str = "adding") -> RunFolder:
    run, lock = begin_run(outputs, experiment, "seed: 1\n")
    lock.release()
    return run


def test_a_new_run_has_its_config_and_latest_leads_to_it(tmp_path: Path) -> None:
    run, lock = begin_run(tmp_path, "adding", "seed: 1\n")
    lock.release()
    assert run.experiment == "adding"
    assert (tmp_path / "latest").resolve() == run.path.resolve()
    assert (tmp_path / "latest" / "config.yaml").read_text() == "seed: 1\n"
    assert not (tmp_path / "latest").readlink().is_absolute()  # outputs/ may be moved


def test_latest_follows_the_newest_run(tmp_path: Path) -> None:
    unfinished_run(tmp_path)
    second = unfinished_run(tmp_path, "other")
    assert (tmp_path / "latest").resolve() == second.path.resolve()


def test_run_ids_sort_by_time() -> None:
    ids = [new_run_id(now) for now in (0, 1, 59, 60, 86_400, 1_795_000_000)]
    assert ids == sorted(ids)
    assert ids[0].startswith("19700101-000000-")


def make_one(outputs: str) -> str:
    run, lock = begin_run(Path(outputs), "adding", "")
    return run.run_id


def test_runs_begun_at_once_by_several_processes_get_folders_of_their_own(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2) as pool:
        ids = list(pool.map(make_one, [str(tmp_path)] * 20))
    assert len(set(ids)) == 20
    assert sorted(ids, reverse=True) == [run.run_id for run in list_runs(tmp_path, "adding")]
    assert (tmp_path / "latest").resolve().name in ids


def test_an_unfinished_run_is_found_and_claimed(tmp_path: Path) -> None:
    run = unfinished_run(tmp_path)
    claimed = claim_unfinished_run(tmp_path, "adding")
    assert claimed is not None and claimed[0] == run


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    run = unfinished_run(tmp_path)
    run.finish({"seconds": 3.0, "after": {"greedy": float("nan")}})
    assert claim_unfinished_run(tmp_path, "adding") is None
    summary = json.loads(run.summary_file.read_text())
    assert summary == {"seconds": 3.0, "after": {"greedy": None}, "finished": True}


def test_a_run_older_than_a_finished_one_was_given_up(tmp_path: Path) -> None:
    old = unfinished_run(tmp_path)
    newer = RunFolder(path=old.path.with_name("99991231-000000-000000"))
    newer.path.mkdir()
    newer.config_file.write_text("")
    newer.finish({})
    assert claim_unfinished_run(tmp_path, "adding") is None


def test_other_experiments_runs_and_folders_without_config_are_not_resumed(tmp_path: Path) -> None:
    unfinished_run(tmp_path, "other")
    (tmp_path / "adding" / "20260101-000000-abcdef").mkdir(parents=True)
    assert claim_unfinished_run(tmp_path, "adding") is None
    assert claim_unfinished_run(tmp_path, "never-run") is None


def test_a_run_that_is_not_accepted_is_passed_over(tmp_path: Path) -> None:
    run = unfinished_run(tmp_path)
    config = run.config_file.read_text()
    assert claim_unfinished_run(tmp_path, "adding", lambda r: False) is None
    claimed = claim_unfinished_run(
        tmp_path, "adding", lambda r: r.config_file.read_text() == config
    )
    assert claimed is not None and claimed[0] == run


def test_a_run_in_another_living_process_is_not_resumed(tmp_path: Path, holder_of) -> None:
    run = unfinished_run(tmp_path)
    holder = holder_of(run)
    assert claim_unfinished_run(tmp_path, "adding") is None
    with pytest.raises(RunIsBusy, match=f"process {holder.pid} "):
        run.lock()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, holder_of) -> None:
    run = unfinished_run(tmp_path)
    holder = holder_of(run)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    claimed = claim_unfinished_run(tmp_path, "adding")
    assert claimed is not None and claimed[0] == run


def test_the_lock_of_a_killed_process_whose_parent_never_asked_is_taken_over(
    tmp_path: Path, holder_of
) -> None:
    run = unfinished_run(tmp_path)
    holder = holder_of(run)
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it is over, and stays as a zombie
    assert claim_unfinished_run(tmp_path, "adding") is not None


def test_a_process_id_used_again_does_not_keep_a_dead_lock_alive(tmp_path: Path, holder_of) -> None:
    run = unfinished_run(tmp_path)
    holder_of(run)
    file = run.path / "lock.json"
    stale = json.loads(file.read_text())
    assert Path(f"/proc/{stale['pid']}").exists()
    file.write_text(json.dumps({**stale, "started": "an earlier boot:1"}))
    assert claim_unfinished_run(tmp_path, "adding") is not None


def test_of_many_processes_that_find_a_dead_lock_one_takes_over(tmp_path: Path) -> None:
    run = unfinished_run(tmp_path)
    dead = {"host": os.uname().nodename, "pid": 2**22 + 1, "started": "gone", "slurm_job": ""}
    (run.path / "lock.json").write_text(json.dumps(dead))
    script = (
        f"c = claim_unfinished_run(Path({str(tmp_path)!r}), 'adding')\n"
        "print('claimed' if c else 'busy')"
    )
    processes = [start(script) for _ in range(4)]
    answers = sorted(process.stdout.readline().strip() for process in processes)
    for process in processes:
        process.communicate()
    assert answers == ["busy", "busy", "busy", "claimed"]


def test_a_lock_file_cut_short_by_a_crash_counts_as_free(tmp_path: Path) -> None:
    run = unfinished_run(tmp_path)
    (run.path / "lock.json").write_text('{"host": "a')
    with run.lock():
        assert json.loads((run.path / "lock.json").read_text())["pid"] == os.getpid()
    assert json.loads((run.path / "lock.json").read_text()) == {}


def test_a_lock_on_another_host_is_respected_unless_its_slurm_job_was_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = unfinished_run(tmp_path)
    other = {"host": "node-17", "pid": 1, "started": "x:1", "slurm_job": "4711"}
    (run.path / "lock.json").write_text(json.dumps(other))
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    with pytest.raises(RunIsBusy, match="node-17.*delete"):
        run.lock()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    run.lock().release()
