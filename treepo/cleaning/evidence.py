"""What models' answers say of a problem: too easy to learn from, or its reference is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from treepo.cleaning.answers import shortened
from treepo.cleaning.equality import answer_key, same_answer
from treepo.cleaning.records import CleanItem, Drop, Outcome
from treepo.cleaning.settings import Contradicted, RuleSettings
from treepo.cleaning.texts import normalised
from treepo.data import read_jsonl


def mastered(items: Sequence[CleanItem], settings: RuleSettings) -> list[Outcome]:
    """Drop problems that the model to start from always solves, by an evaluation's samples or by a
    column. A problem with too few judged samples, or without the column, stays.

    Raises:
        ValueError: a file or value that cannot be read, or samples of other problems.
    """
    limits = settings.mastered
    if limits.pass_rate_column:
        rates = [_rate_in_column(item, limits.pass_rate_column) for item in items]
        return [
            Drop(reason="always solved", detail=f"{rate:g} solved")
            if rate is not None and rate >= limits.max_pass_rate
            else None
            for rate in rates
        ]
    verdicts: dict[str, list[bool]] = {}
    for _, where, row in _rows(items, limits.samples, "mastered.samples", ("correct",)):
        if row["correct"] is not None:  # without a verdict
            if not isinstance(row["correct"], bool):
                raise ValueError(f"{where}: correct={row['correct']!r} must be true, false or null")
            verdicts.setdefault(str(row["problem_id"]), []).append(row["correct"])
    outcomes: list[Outcome] = []
    for item in items:
        judged = verdicts.get(item.id, [])
        rate = sum(judged) / len(judged) if judged else 0.0
        always = len(judged) >= limits.min_samples and rate >= limits.max_pass_rate
        detail = f"{sum(judged)} of {len(judged)} solved"
        outcomes.append(Drop(reason="always solved", detail=detail) if always else None)
    return outcomes


def contradicted(items: Sequence[CleanItem], settings: RuleSettings) -> list[Outcome]:
    """Drop problems whose reference differs from the answer that enough models agree on. A model
    with several samples of a problem speaks by its most frequent answer, the first of equals.

    Raises:
        ValueError: a file that cannot be read, or answers to other problems.
    """
    limits = settings.contradicted
    said: dict[str, dict[str, list[str]]] = {}  # problem -> model -> answers
    for file, _, row in _rows(items, limits.answers, "contradicted.answers"):
        if row.get("answer") is not None and str(row["answer"]).strip():
            of_problem = said.setdefault(str(row["problem_id"]), {})
            model = str(row.get("model") or file)
            of_problem.setdefault(model, []).append(shortened(str(row["answer"])))
    return [_against(item, said.get(item.id, {}).values(), limits) for item in items]


def _against(
    item: CleanItem, answers_of_models: Collection[Sequence[str]], limits: Contradicted
) -> Drop | None:
    if item.answer is None or len(answers_of_models) < limits.min_models:
        return None
    votes = [_most_frequent(answers) for answers in answers_of_models]
    agreed = _most_frequent(votes)
    share = sum(answer_key(vote) == answer_key(agreed) for vote in votes) / len(votes)
    if share < limits.min_agreement or same_answer(shortened(item.answer), agreed):
        return None
    detail = f"{share:.0%} of {len(votes)} models say {agreed[:100]}"
    return Drop(reason="models agree on another answer", detail=detail)


def _most_frequent(answers: Sequence[str]) -> str:
    counts = Counter(map(answer_key, answers))
    return max(answers, key=lambda answer: counts[answer_key(answer)])


def _rows(
    items: Sequence[CleanItem], files: Sequence[str], key: str, columns: Sequence[str] = ()
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(file, where, row) of jsonl files whose rows have ``problem_id`` and ``columns``.

    A problem is found by its id, which is file and line: samples made of another version of the
    file would be taken for those of other problems. So where a sample has its prompt, the question
    must stand in it.

    Raises:
        ValueError: a file or row that cannot be read, a prompt without the question, or no row is
            of the data's files.
    """
    questions = {item.id: normalised(item.original_question) for item in items}
    files_of_items = {_file_of(item.id) for item in items}
    found = False
    for file in files:
        for where, row in _read(file, key, ("problem_id", *columns)):
            problem_id = str(row["problem_id"])
            found |= _file_of(problem_id) in files_of_items
            # None: an earlier rule dropped it, or it is of another file
            question = questions.get(problem_id)
            if (
                question is not None
                and "prompt" in row
                and question not in normalised(str(row["prompt"]))
            ):
                raise ValueError(
                    f"{where}: the prompt of problem {row['problem_id']!r} does not hold the "
                    "question that the data has under this id: the samples are of another version "
                    "of the file, or of another one"
                )
            yield file, where, row
    if items and not found:
        raise ValueError(
            f"settings.{key}: no row is of a file of the data; problems are named like "
            f"{items[0].id!r}, as an evaluation of the same files names them"
        )


def _read(file: str, key: str, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"settings.{key}: {file!r} does not exist (from {Path.cwd()})")
    for where, row in read_jsonl(path):
        missing = [c for c in columns if not isinstance(row, Mapping) or c not in row]
        if missing:
            raise ValueError(
                f"{where}: a row of settings.{key} needs {', '.join(columns)}; "
                f"{', '.join(missing)} is missing"
            )
        yield where, row


def _file_of(problem_id: str) -> str:
    return problem_id.rpartition(":")[0]


def _rate_in_column(item: CleanItem, column: str) -> float | None:
    value: Any = item.columns
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{item.where}: {column}={value!r} is no share solved, a number in 0..1")
    return float(value)
