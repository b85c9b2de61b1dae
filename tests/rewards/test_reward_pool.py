"""Scoring in killable processes: order, failures that are counted, and nothing left behind."""

from __future__ import annotations

import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from rewards.pool import RewardPool, count_outcomes
from rewards.records import ERROR, SCORED, TIMEOUT, UNPARSABLE, RewardItem
from rewards.settings import RewardPartSettings, RewardSettings

ROOT = Path(__file__).resolve().parents[2]


def item(solution_str: str, ground_truth: object = "1", **fields: object) -> RewardItem:
    values: dict = {"data_source": "s", "prompt": "q", **fields}
    return RewardItem(solution_str=solution_str, ground_truth=ground_truth, **values)


def user_settings(user_file: Path, function: str = "verl", **fields: object) -> RewardSettings:
    values: dict = {"num_workers": 2, "timeout_seconds": 1.0, **fields}
    return RewardSettings(
        parts={"user": RewardPartSettings(name=f"{user_file}:{function}")}, **values
    )


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if is_running(pid)]
        time.sleep(0.02)


def test_results_come_in_the_order_of_the_items(pool: RewardPool) -> None:
    truths = [str(random.Random(0).randrange(2)) for _ in range(300)]
    results = pool.score([item("1", truth) for truth in truths])
    assert [r.score for r in results] == [float(truth == "1") for truth in truths]
    assert [r.correct for r in results] == [truth == "1" for truth in truths]


@pytest.mark.parametrize("how", ["sleep 60", "loop", "regex", "deaf", "close"])
def test_a_verifier_that_hangs_is_killed_and_costs_nobody_else(pool: RewardPool, how: str) -> None:
    start = time.monotonic()
    results = pool.score([item("1"), item("0"), item(how), item("1"), item("1")] * 2)
    assert time.monotonic() - start < 8
    hung = ERROR if how == "close" else TIMEOUT  # one that closes our channel counts as dead
    assert [r.outcome for r in results] == [SCORED, SCORED, hung, SCORED, SCORED] * 2
    assert math.isnan(results[2].score) and not results[2].has_verdict
    assert [r.score for r in results if r.has_verdict] == [1, 0, 1, 1] * 2
    if hung == TIMEOUT:
        assert "after 1 s" in results[2].detail


@pytest.mark.parametrize(
    ("how", "detail"),
    [
        ("exit 7", "exited with status 7"),
        ("exit 0", "exited with status 0"),
        ("segfault", "died of SIGSEGV"),
        ("memory", "MemoryError.*reward.memory_limit_mb"),
        ("raise", "KeyError: 'no such thing'.*my_rewards.py:"),
        ("sys.exit", "SystemExit: 3"),
        ("nan", "not a finite number"),
        ("none", "not a number but NoneType None"),
        ("text", "not a number but str '1.0'"),
    ],
)
def test_a_verifier_that_fails_says_so_and_never_gives_zero(
    pool: RewardPool, how: str, detail: str
) -> None:
    results = pool.score([item("1"), item(how), item("0")])
    assert [r.outcome for r in results] == [SCORED, ERROR, SCORED]
    assert math.isnan(results[1].score)
    assert re.search(detail, results[1].detail), results[1].detail


def test_huge_output_is_taken_and_cut(pool: RewardPool) -> None:
    (result,) = pool.score([item("print")])
    assert result.outcome == SCORED
    assert result.answer is not None and set(result.answer) == {"y"} and len(result.answer) <= 1000


def test_huge_responses_pass(pool: RewardPool) -> None:
    long = "z" * 3_000_000
    results = pool.score([item(long, long), item(long, "no"), item("1")] * 4)
    assert [r.score for r in results] == [1, 0, 1] * 4


def test_an_item_of_a_class_that_workers_cannot_import_is_an_error(
    pool: RewardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    module = types.ModuleType("only_here")
    exec("class Odd: pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    module.Odd.__module__ = "only_here"
    results = pool.score([item("1", module.Odd()), item("1")])
    assert [r.outcome for r in results] == [ERROR, SCORED]
    assert "only_here" in results[0].detail


def test_outcomes_are_counted(user_file: Path) -> None:
    with RewardPool(user_settings(user_file)) as pool:
        results = pool.score([item("1"), item("raise"), item("sleep 60"), item("0")])
        pool.score([item("exit 1")])
        assert pool.outcomes == {SCORED: 2, UNPARSABLE: 0, TIMEOUT: 1, ERROR: 2}
    assert count_outcomes(results) == {SCORED: 2, UNPARSABLE: 0, TIMEOUT: 1, ERROR: 1}


def test_random_mixtures_of_good_and_bad_items_keep_their_places(user_file: Path) -> None:
    rng = random.Random(1)
    expected = {"1": SCORED, "0": SCORED, "raise": ERROR, "exit 3": ERROR, "sleep 9": TIMEOUT}
    weights = [60, 60, 6, 3, 2]
    with RewardPool(user_settings(user_file, num_workers=3)) as pool:
        for _ in range(3):
            texts = rng.choices(list(expected), weights, k=rng.randrange(1, 120))
            results = pool.score([item(text) for text in texts])
            assert [r.outcome for r in results] == [expected[text] for text in texts]
            for text, result in zip(texts, results, strict=True):
                if result.has_verdict:
                    assert result.score == float(text)


def test_scoring_nothing_gives_nothing(pool: RewardPool) -> None:
    assert pool.score([]) == []


def test_cheap_items_cost_little(pool: RewardPool) -> None:
    items = [item("1")] * 400
    pool.score(items)
    wall, cpu = [], []
    for _ in range(9):
        start, start_cpu = time.perf_counter(), time.process_time()
        pool.score(items)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    assert min(cpu) < 0.05, cpu
    assert min(wall) < 0.2, wall  # 0.02 on an idle machine


def test_it_works_from_a_thread_that_ends(user_file: Path) -> None:
    made: list[RewardPool] = []
    thread = threading.Thread(target=lambda: made.append(RewardPool(user_settings(user_file))))
    thread.start()
    thread.join()
    with made[0] as pool:
        assert [r.score for r in pool.score([item("1"), item("0")])] == [1.0, 0.0]
        time.sleep(0.3)
        assert [r.score for r in pool.score([item("1"), item("0")])] == [1.0, 0.0]


def test_threads_may_share_a_pool(pool: RewardPool) -> None:
    scores: dict[int, list[float]] = {}

    def work(index: int) -> None:
        scores[index] = [r.score for r in pool.score([item(str(index), str(index % 2))] * 20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == {i: [float(i == i % 2)] * 20 for i in range(4)}


def test_workers_start_clean_of_what_the_caller_has_imported(pool: RewardPool) -> None:
    (result,) = pool.score([item("modules")])
    assert result.answer == ""  # neither torch nor ray


@pytest.mark.long
def test_a_pool_works_inside_a_ray_actor(user_file: Path) -> None:
    import ray

    class Judge:
        def judge(self) -> list[str]:
            import torch  # noqa: F401

            with RewardPool(user_settings(user_file)) as pool:
                results = pool.score([item("1"), item("loop"), item("modules"), item("exit 3")])
            return [f"{r.outcome} {r.answer}" for r in results]

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        judge = ray.remote(Judge).options(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
        outcomes = ray.get(judge.remote().judge.remote(), timeout=120)
    finally:
        ray.shutdown()
    assert outcomes == ["scored None", "timeout None", "scored ", "error None"]


def test_what_a_hung_verifier_started_ends_with_it(pool: RewardPool, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    (result,) = pool.score([item(f"child {file}")])
    assert result.outcome == TIMEOUT
    wait_until_gone(int(file.read_text()))


def pids_of(pool: RewardPool) -> list[int]:
    """A worker and its nursery."""
    (result,) = pool.score([item("pid")])
    assert result.answer is not None
    return [int(pid) for pid in result.answer.split()]


def test_closing_ends_every_process_and_scoring_is_refused_after(user_file: Path) -> None:
    with RewardPool(user_settings(user_file)) as pool:
        pids = pids_of(pool)
    wait_until_gone(*pids)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([item("1")])


def test_an_exception_in_the_callers_block_ends_every_process_too(user_file: Path) -> None:
    pids: list[int] = []
    with pytest.raises(KeyError), RewardPool(user_settings(user_file)) as pool:
        pids += pids_of(pool)
        raise KeyError
    wait_until_gone(*pids)


def test_closing_from_another_thread_ends_a_running_score(user_file: Path) -> None:
    pool = RewardPool(user_settings(user_file, timeout_seconds=600.0))
    threading.Timer(0.3, pool.close).start()
    with pytest.raises(RuntimeError, match="closed while it scored"):
        pool.score([item("sleep 600")])


def test_the_death_of_the_nursery_is_survived(user_file: Path) -> None:
    with RewardPool(user_settings(user_file, timeout_seconds=5.0)) as pool:
        worker, nursery = pids_of(pool)
        threading.Timer(0.2, os.kill, args=(nursery, signal.SIGKILL)).start()
        results = pool.score([item("sleep 0.05")] * 20 + [item("1"), item("0")])
        assert [r.outcome for r in results] == [SCORED] * 22
        assert [r.score for r in results[-2:]] == [1.0, 0.0]
        assert pids_of(pool)[1] != nursery
        wait_until_gone(worker, nursery)


def test_a_killed_idle_worker_costs_no_item(user_file: Path) -> None:
    with RewardPool(user_settings(user_file, num_workers=1)) as pool:
        worker, _ = pids_of(pool)
        os.kill(worker, signal.SIGKILL)
        wait_until_gone(worker)
        results = pool.score([item("1"), item("0")])
        assert [(r.outcome, r.score) for r in results] == [(SCORED, 1.0), (SCORED, 0.0)]


def test_workers_killed_from_outside_cost_at_most_the_items_they_ran(user_file: Path) -> None:
    rng = random.Random(2)
    with RewardPool(user_settings(user_file, num_workers=3, timeout_seconds=20.0)) as pool:
        done = threading.Event()
        killed = []

        def kill_now_and_then() -> None:
            while not done.wait(0.05):
                workers = [worker.pid for worker in list(pool._workers)]
                if workers:
                    killed.append(rng.choice(workers))
                    try:
                        os.kill(killed[-1], signal.SIGKILL)
                    except ProcessLookupError:
                        continue

        killer = threading.Thread(target=kill_now_and_then)
        killer.start()
        items = [item("1", str(i % 2)) if i % 5 else item("sleep 0.02", "x") for i in range(500)]
        results = pool.score(items)
        done.set()
        killer.join()
    assert len(results) == 500 and len(killed) > 3
    lost = [r for r in results if not r.has_verdict]
    assert len(lost) <= len(killed)
    assert all(r.outcome == ERROR and "SIGKILL" in r.detail for r in lost)
    for index, result in enumerate(results):
        if index % 5 and result.has_verdict:
            assert result.score == float(index % 2 == 1)


def test_loading_in_the_background_shows_its_errors_when_waited_for(user_file: Path) -> None:
    with RewardPool(user_settings(user_file), wait=False) as pool:
        assert pool.score([item("1")])[0].score == 1.0
        pool.wait_until_ready()
    with RewardPool(user_settings(user_file, "neither"), wait=False) as pool:
        with pytest.raises(ValueError, match="fits no convention"):
            pool.wait_until_ready()
        with pytest.raises(RuntimeError, match="failed to load"):
            pool.score([item("1")])


def test_workers_that_cannot_even_start_end_in_errors_and_not_in_a_loop(
    user_file: Path,
) -> None:
    settings = user_settings(user_file)
    settings.memory_limit_mb = 1  # below what the interpreter holds already
    # Longer than what a heap may have left over, so that even reading the item fails.
    with RewardPool(settings) as pool:
        results = pool.score([item("1" + " " * (8 << 20))] * 5)
    assert [r.outcome for r in results] == [ERROR] * 5


SCRIPT = """
import sys
from rewards.pool import RewardPool
from rewards.records import RewardItem
from rewards.settings import RewardPartSettings, RewardSettings

print("main is imported", flush=True)
pool = RewardPool(RewardSettings(parts={{"user": RewardPartSettings(name={function!r})}}))
items = [RewardItem(data_source="s", prompt="", solution_str=text, ground_truth="1")
         for text in {texts!r}]
print(*[r.answer or r.score for r in pool.score(items[:2])], flush=True)
print("scored", *[r.score for r in pool.score(items[2:])], flush=True)
"""


def run_script(tmp_path: Path, user_file: Path, texts: list[str]) -> subprocess.Popen[str]:
    script = tmp_path / "unguarded.py"
    script.write_text(textwrap.dedent(SCRIPT).format(function=f"{user_file}:verl", texts=texts))
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )


def test_a_main_module_without_guard_is_run_once(tmp_path: Path, user_file: Path) -> None:
    """And a pool that nobody closes keeps its process from ending neither."""
    process = run_script(tmp_path, user_file, ["1", "0", "print"])
    output, _ = process.communicate(timeout=60)
    assert output.split("\n") == ["main is imported", "1.0 0.0", "scored 1.0", ""]
    assert process.returncode == 0


def test_killing_the_caller_leaves_no_process(tmp_path: Path, user_file: Path) -> None:
    process = run_script(tmp_path, user_file, ["pid", "1", "regex"])
    assert process.stdout is not None
    process.stdout.readline()
    pids = [int(word) for word in process.stdout.readline().split()[:2]]
    time.sleep(0.2)  # it hangs by now, inside C
    process.kill()
    process.communicate()
    wait_until_gone(*pids)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"maths": {}}, "unknown reward 'maths'. Did you mean 'math'"),
        ({"format": {"options": {"tags": ["a"]}}}, "none of them says whether"),
        ({"exact": {}, "length": {}}, "needs its option"),
        ({"x": {"name": "no_such_module_here:f"}}, "no module of that name"),
        ({"x": {"name": "no/such/file.py:f"}}, "does not exist"),
        ({"x": {"name": "{user}:missing"}}, "has no 'missing'"),
        ({"x": {"name": "{user}:neither"}}, r"fits no convention.*compute_score\(data_source"),
        ({"x": {"name": "{user}:anything"}}, "fits no convention"),
        ({"x": {"name": "{user}:both"}}, "fits both conventions"),
        ({"x": {"name": "{user}:not_a_function"}}, "not a function but int"),
        ({"x": {"name": "{user}:verl", "options": {"beta": 1}}}, "takes no parameter 'beta'"),
    ],
)
def test_wrong_settings_are_one_clear_error_before_any_work(
    user_file: Path, parts: dict, message: str
) -> None:
    for part in parts.values():
        if "name" in part:
            part["name"] = part["name"].replace("{user}", str(user_file))
    settings = RewardSettings(
        parts={label: RewardPartSettings(**part) for label, part in parts.items()}
    )
    with pytest.raises(ValueError, match=message):
        RewardPool(settings)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import no_such_library", "no_such_library"),
        ("import os; os._exit(4)", "ended with status 4"),
        ("import time; time.sleep(60)", "took more than 1 s"),
    ],
)
def test_user_code_that_fails_to_load_is_one_clear_error(
    tmp_path: Path, code: str, message: str
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(code)
    settings = RewardSettings(parts={"x": RewardPartSettings(name=f"{file}:f")})
    if "sleep" in code:
        settings.startup_timeout_seconds = 1.0
    with pytest.raises(RuntimeError, match=message):
        RewardPool(settings)


def test_in_process_scoring_needs_no_processes(user_file: Path) -> None:
    with RewardPool(user_settings(user_file, num_workers=0, timeout_seconds=0.0)) as pool:
        results = pool.score([item("pid"), item("raise")])
    assert results[0].answer is not None and results[0].answer.split()[0] == str(os.getpid())
    assert results[1].outcome == ERROR
