"""The cleaning command: rows in, rows of the same format out, and nothing lost on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from treepo.clean import CleanConfig, work
from treepo.cleaning.settings import DEFAULT_RULES
from treepo.cli import compose
from treepo.data import file_rows, read_jsonl
from treepo.data_settings import DataSettings

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


def verl(question: str, answer: Any, **fields) -> dict:
    return {
        "data_source": "math",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": 1},
        **fields,
    }


def trl(question: str, solution: Any) -> dict:
    return {"prompt": question, "solution": solution, "data_source": "math", "level": 2}


def gsm8k(question: str, answer: str) -> dict:
    return {"question": question, "answer": f"We think.\n#### {answer}"}


CHOICE = "What is 2 + 3? (A) 4 (B) 5 (C) 6"
MAKERS = {"verl": verl, "trl": trl, "gsm8k": gsm8k}


def rows(make) -> list[dict]:
    """Kept, changed, dropped, shortened, a repetition of the second as it is after its change."""
    return [
        make("What is 3 * 4?", "12"),
        make(CHOICE, "B"),
        make("Prove that 2 is even.", "obvious"),
        make("What is 1 + 1?", "$x = 2$."),
        make("What is 2+3?", "5"),
    ]


def write(path: Path, kept: list[Any]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(kept), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(kept))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return str(path)


def run(tmp_path: Path, *words: str, dry_run: bool = False) -> dict:
    config = compose("clean", CleanConfig, [f"output={tmp_path / 'out'}", *words])
    work(config, dry_run)
    return {} if dry_run else json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("row_format", MAKERS)
def test_every_format_is_cleaned_and_read_again_as_training_reads_it(tmp_path, row_format, suffix):
    make = MAKERS[row_format]
    file = write(tmp_path / f"rows{suffix}", rows(make))
    report = run(tmp_path, f"data.files=[{file}]")
    assert {name: report[name] for name in ("read", "unchanged", "changed", "dropped")} == {
        "read": 5,
        "unchanged": 1,
        "changed": 2,
        "dropped": 2,
    }
    settings = DataSettings(source="file", files=[str(tmp_path / "out" / f"rows{suffix}")])
    left = list(file_rows(settings))
    questions = [r.prompt if isinstance(r.prompt, str) else r.prompt[-1]["content"] for r in left]
    assert questions == ["What is 3 * 4?", "What is 2 + 3?", "What is 1 + 1?"]
    assert [row.ground_truth for row in left] == ["12", "5", "2"]
    first = next(iter(file_rows(DataSettings(source="file", files=[file]))))
    assert (left[0].extra_info, left[0].data_source) == (first.extra_info, first.data_source)
    assert report["files"] == {f"rows{suffix}": 3}


def test_what_was_dropped_or_changed_is_written_with_the_reason(tmp_path):
    file = write(tmp_path / "rows.jsonl", rows(verl))
    run(tmp_path, f"data.files=[{file}]")
    events = [event for _, event in read_jsonl(tmp_path / "out" / "changes.jsonl")]
    told = [(e["rule"], e["action"], e["where"].rpartition("/")[2]) for e in events]
    assert told == [
        ("shorten_answer", "changed", "rows.jsonl:4"),
        ("multiple_choice", "changed", "rows.jsonl:2"),
        ("proof", "dropped", "rows.jsonl:3"),
        ("near_duplicate", "dropped", "rows.jsonl:5"),
    ]
    assert events[1]["question"] == CHOICE and events[1]["new_question"] == "What is 2 + 3?"
    assert (events[1]["answer"], events[1]["new_answer"]) == ("B", "5")
    assert events[2]["reason"] == "asks for a proof" and "new_answer" not in events[2]


def test_cleaning_its_own_output_leaves_the_file_as_it_is(tmp_path):
    file = write(tmp_path / "rows.jsonl", rows(trl))
    run(tmp_path, f"data.files=[{file}]")
    once = tmp_path / "out" / "rows.jsonl"
    again = run(tmp_path / "out", f"data.files=[{once}]")
    assert (again["unchanged"], again["changed"], again["dropped"]) == (3, 0, 0)
    assert (tmp_path / "out" / "out" / "rows.jsonl").read_text() == once.read_text()


def test_rows_of_other_data_sources_and_truths_that_are_no_text_pass_untouched(tmp_path):
    code = verl("Prove that 1 = 1.", {"tests": [1]}, data_source="code")
    several = verl("What is 2 + 3?", ["5", "five"])
    file = write(tmp_path / "rows.jsonl", [code, several, verl("Prove that 1 = 1.", "x")])
    report = run(tmp_path, f"data.files=[{file}]", "data_sources=[ma*]")
    assert (report["not_chosen"], report["without_single_answer"]) == (1, 1)
    assert [row for _, row in read_jsonl(tmp_path / "out" / "rows.jsonl")] == [code, several]
    with pytest.raises(ValueError, match=r"data_sources=\['gsm\*'\] match none of code, math"):
        run(tmp_path / "out", f"data.files=[{file}]", "data_sources=[gsm*]")


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", rows(verl))
    run(tmp_path, f"data.files=[{file}]", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert "5 read, 1 left as they were, 2 changed, 2 dropped" in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_samples_of_an_evaluation_and_a_rule_of_one_s_own_are_used(tmp_path):
    file = write(tmp_path / "rows.jsonl", rows(verl))
    samples = [{"problem_id": "rows.jsonl:0", "correct": True, "prompt": "What is 3 * 4? Think."}]
    evaluated = write(tmp_path / "samples.jsonl", samples * 4)
    own = tmp_path / "mine.py"
    own.write_text(
        "from treepo.cleaning.records import Drop\n"
        "def no_sums(items, settings):\n"
        "    return [Drop(reason='a sum') if '1 + 1' in i.question else None for i in items]\n"
    )
    report = run(
        tmp_path,
        f"data.files=[{file}]",
        f"rules=[mastered,'{own}:no_sums']",
        f"settings.mastered.samples=[{evaluated}]",
    )
    assert report["rules"]["mastered"]["reasons"] == {"always solved": 1}
    assert report["rules"][f"{own}:no_sums"]["reasons"] == {"a sum": 1}
    assert report["files"] == {"rows.jsonl": 3}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "x"', ""], r"rows\.jsonl:1: not valid JSON"),
        (['{"question": "x", "answer": "#### 1"}', '{"a": 1}'], r"rows\.jsonl:2: .*expected"),
        ([], "there are no rows"),
    ],
)
def test_bad_rows_are_refused_by_file_and_line(tmp_path, lines, words):
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=words):
        run(tmp_path, f"data.files=[{tmp_path / 'rows.jsonl'}]")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'\xff\xfe{"prompt": "x"}\n', r"rows\.jsonl: not text in UTF-8"),
        (b"[" * 100_000, r"rows\.jsonl:1: .*nested too deeply"),
        (b'{"data_source": "m", "prompt": "x \\ud800", "answer": "2."}', r"rows\.jsonl:1: .*half"),
    ],
)
def test_bytes_that_are_no_rows_are_refused_before_anything_is_written(tmp_path, content, words):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        run(tmp_path, f"data.files=[{tmp_path / 'rows.jsonl'}]")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_cleaned_is_refused(tmp_path):
    file = write(tmp_path / "rows.jsonl", rows(verl))
    (tmp_path / "other").mkdir()
    twin = write(tmp_path / "other" / "rows.jsonl", rows(verl))
    with pytest.raises(ValueError, match=r"two files 'rows\.jsonl'"):
        run(tmp_path, f"data.files=[{file},{twin}]")
    for name in ("changes.jsonl", "report.json"):  # would be written over what is told of the rows
        named = write(tmp_path / "other" / name, rows(verl))
        with pytest.raises(ValueError, match=f"a file '{name}'.*another name"):
            run(tmp_path, f"data.files=[{named}]")
    with pytest.raises(ValueError, match="nothing to clean"):
        run(tmp_path, "data=chain_sum")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(ValueError, match="is not empty"):
        run(tmp_path, f"data.files=[{file}]")


def test_rows_of_a_source_of_one_s_own_are_cleaned_if_they_are_in_a_format(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(
        "from treepo.data_rows import parse_row\n"
        "def raw(settings):\n"
        "    return [{'question': 'What is 2?', 'answer': '#### 2.'}]\n"
        "def read(settings):\n"
        "    return [parse_row(row, id='a', where='row a') for row in raw(settings)]\n"
        "def nothing(settings):\n"
        "    return None\n"
    )
    run(tmp_path, f"data.source='{own}:raw'")
    (row,) = [row for _, row in read_jsonl(tmp_path / "out" / "rows.jsonl")]
    assert row == {"question": "What is 2?", "answer": "#### 2", "data_source": "openai/gsm8k"}
    for source, words in (("read", "row a: .*must be dicts"), ("nothing", "must return rows")):
        with pytest.raises(ValueError, match=words):
            run(tmp_path / source, f"data.source='{own}:{source}'")


def test_a_changed_answer_that_no_longer_fits_a_parquet_column_is_an_error(tmp_path):
    numbers = [trl("How long is it?", 2), trl("What is 1?", 1)]
    file = write(tmp_path / "rows.parquet", numbers)
    own = tmp_path / "mine.py"
    own.write_text(
        "from treepo.cleaning.records import Change\n"
        "def units(items, settings):\n"
        "    return [Change(reason='unit', answer=i.answer + ' cm') for i in items]\n"
    )
    with pytest.raises(ValueError, match="no longer fits the file's columns"):
        run(tmp_path, f"data.files=[{file}]", f"rules=['{own}:units']")


def test_the_shipped_configuration_runs_every_rule_that_needs_no_files():
    config = compose("clean", CleanConfig, ["data.files=[x.jsonl]", "output=out"])
    assert config.rules == list(DEFAULT_RULES) and "mastered" not in config.rules


def test_gsm8k_s_rows_pass_untouched(tmp_path):
    made = [gsm8k(f"Ann has {i} apples and buys {i}. How many?", str(2 * i)) for i in range(20)]
    kept = made + ([row for _, row in read_jsonl(GSM8K)] if GSM8K.is_file() else [])
    file = write(tmp_path / "gsm8k.jsonl", kept)
    report = run(tmp_path, f"data.files=[{file}]")
    assert (report["changed"], report["dropped"]) == (0, 0)
    left = [row for _, row in read_jsonl(tmp_path / "out" / "gsm8k.jsonl")]
    assert left == kept


def test_the_command_prints_help_and_one_line_for_a_user_s_mistake(tmp_path):
    def command(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "treepo.clean", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )

    helped = command("--help")
    assert helped.returncode == 0 and all(name in helped.stdout for name in DEFAULT_RULES)
    done = command("data.files=[none.jsonl]", "output=out", "rules=[proofs]")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown cleaning rule 'proofs'")
