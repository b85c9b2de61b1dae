"""Rows of data files as cleaning items, and changed items as rows again, in the format they had."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from treepo.atomic import write_text
from treepo.cleaning.records import CleanItem
from treepo.data import RawRow, given_rows, parsed, raw_file_rows, raw_hub_rows
from treepo.data_rows import TRUTH_COLUMNS, Row, recognise
from treepo.data_settings import DataSettings

# Beside the rows in the output folder.
CHANGES, REPORT = "changes.jsonl", "report.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """A row, and what it holds.

    Attributes:
        output: name of the file that it is written to, in the output folder.
    """

    raw: RawRow
    row: Row
    row_format: str
    output: str

    @property
    def columns(self) -> Mapping[str, Any]:
        return self.raw.columns

    def item(self) -> CleanItem:
        """What the rules see of it."""
        *before, last = _messages(self.row)
        truth = self.row.ground_truth
        single = isinstance(truth, str | int | float) and not isinstance(truth, bool)
        return CleanItem(
            id=self.row.id,
            where=self.row.where,
            question=last,
            context="\n".join(before),
            answer=str(truth) if single else None,
            truth=json.dumps(truth, sort_keys=True, default=str, ensure_ascii=False),
            original_question=last,
            columns=self.columns,
        )

    def changed(self, item: CleanItem) -> dict[str, Any]:
        """The row's columns with the question and answer of ``item``."""
        before, columns = self.item(), dict(self.columns)
        if item.question != before.question:
            _set_question(columns, self.row_format, item.question)
        if item.answer != before.answer:
            assert item.answer is not None, "a rule took an answer away"
            _set_answer(columns, self.row_format, item.answer)
        return columns


def read_rows(settings: DataSettings) -> list[SourceRow]:
    """All rows of a data section, checked as training checks them.

    Raises:
        ValueError: a row that training could not read (says file and line), a source that has no
            rows of its own, or two files of one name.
    """
    rows: list[SourceRow] = []
    for raw in islice(_raw(settings), settings.max_samples or None):
        row = parsed(raw, settings)  # refuses what is no row
        _check_text(raw)
        told = settings.row_format
        row_format = recognise(raw.columns, raw.where) if told == "auto" else told
        rows.append(
            SourceRow(raw=raw, row=row, row_format=row_format, output=_output(raw, settings))
        )
    if not rows:
        raise ValueError(f"data.source={settings.source}: there are no rows")
    return rows


def _check_text(raw: RawRow) -> None:
    """
    Raises:
        ValueError: half of a surrogate pair, which JSON may name but no file of text can hold.
    """
    try:
        json.dumps(raw.columns, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{raw.where}: the row has half of a character, {error.object[error.start]!r}: mend it"
        ) from error


def write_rows(path: Path, rows: list[dict[str, Any]], like: str) -> None:
    """Write rows in the form that the file's name says.

    Args:
        like: the file that they came from, whose schema a parquet file keeps; "" for none.

    Raises:
        ValueError: a value that the form cannot hold.
    """
    if path.suffix == ".parquet":
        _write_parquet(path, rows, Path(like).expanduser())
        return
    try:
        if path.suffix == ".json":
            write_text(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(path, "".join(lines))
    except TypeError as error:
        raise ValueError(
            f"{path.name} cannot hold the rows of {like or 'this set'}: {error}; only text, "
            "numbers, lists and objects can be written as JSON"
        ) from error


def _raw(settings: DataSettings) -> Iterator[RawRow]:
    if settings.source == "file":
        names = [Path(file).name for file in settings.files]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(
                f"data.files names two files {twice[0]!r}, which would be written over one "
                "another: clean them one after the other"
            )
        for name in set(names) & {CHANGES, REPORT}:
            raise ValueError(
                f"data.files names a file {name!r}, as the one that tells what was done to the "
                "rows: give it another name"
            )
        return raw_file_rows(settings)
    if settings.source == "hub":
        return raw_hub_rows(settings)
    if settings.source == "reasoning_gym":
        raise ValueError(
            "data.source=reasoning_gym generates its problems, so there is nothing to clean: "
            "choose data=file data.files=[...], or data.source=hub"
        )
    return _raw_user_rows(settings)


def _raw_user_rows(settings: DataSettings) -> Iterator[RawRow]:
    for row in given_rows(settings):
        if isinstance(row, Row):
            raise ValueError(
                f"{row.where}: rows to be cleaned must be dicts in one of the row formats"
            )
        yield row


def _output(raw: RawRow, settings: DataSettings) -> str:
    if raw.origin:
        return Path(raw.origin).name
    if settings.source == "hub":
        parts = [Path(settings.name).name, settings.config_name, settings.split]
        return "-".join(part for part in parts if part).replace("/", "-") + ".jsonl"
    return "rows.jsonl"


def with_source(row: SourceRow, columns: dict[str, Any], settings: DataSettings) -> dict[str, Any]:
    """``columns``; of a row without a file also the name of its data source, which it would lose
    in one.
    """
    if row.raw.origin or settings.data_source or columns.get("data_source"):
        return columns
    return {**columns, "data_source": row.row.data_source}


def _messages(row: Row) -> list[str]:
    if isinstance(row.prompt, str):
        return [row.prompt]
    return [message["content"] for message in row.prompt]


def _set_question(columns: dict[str, Any], row_format: str, question: str) -> None:
    key = "question" if row_format == "gsm8k" else "prompt"
    prompt = columns[key]
    if isinstance(prompt, str):
        columns[key] = question
    else:
        columns[key] = [*prompt[:-1], {**prompt[-1], "content": question}]


def _set_answer(columns: dict[str, Any], row_format: str, answer: str) -> None:
    if row_format == "verl":
        columns["reward_model"] = {**columns["reward_model"], "ground_truth": answer}
    elif row_format == "gsm8k":
        solution, mark, _ = str(columns["answer"]).rpartition("####")
        columns["answer"] = f"{solution}{mark} {answer}"
    else:
        key = next(name for name in TRUTH_COLUMNS if columns.get(name) is not None)
        columns[key] = answer


def _write_parquet(path: Path, rows: list[dict[str, Any]], like: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(like)
    try:
        table = pyarrow.Table.from_pylist(rows, schema=schema)
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{like}: a changed row no longer fits the file's columns ({error}): an answer that "
            "was a number there and is text now, say; give such files as jsonl"
        ) from error
    partial = path.with_name(f".{path.name}.tmp")
    pyarrow.parquet.write_table(table, partial)
    partial.replace(path)
