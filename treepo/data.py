"""From a data source to tokenised problems."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from treepo.base.registry import Registry, load_object
from treepo.data_order import DataPosition, ProblemOrder
from treepo.data_rows import Row, parse_row
from treepo.data_settings import LARGEST_SIZE, DataSettings

__all__ = ["DATA_SOURCES", "DataPosition", "Problem", "ProblemOrder", "held_out", "load_problems"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One question, ready to be answered and judged.

    Attributes:
        id: unique within its data and the same in every run: ``{source}:{index}``.
        data_source: picks the verifier.
        extra_info: what else the reward gets; plain JSON data where the source is.
        prompt_text: the prompt as the model sees it, as text.
    """

    id: str
    prompt_token_ids: np.ndarray  # int32 [P], P >= 1
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]
    prompt_text: str


Source = Callable[[DataSettings], Iterable[Any]]

DATA_SOURCES: Registry[Source] = Registry("data source")


def load_problems(settings: DataSettings, tokenizer: Any, max_prompt_length: int) -> list[Problem]:
    """Read, check, render and tokenise all problems of a data section, in the source's order.

    Args:
        tokenizer: of transformers.
        max_prompt_length: in tokens; longer prompts are dropped with
            ``settings.filter_overlong_prompts`` and are an error without.

    Raises:
        ValueError: an unknown source, a file or row that cannot be read (the message says where and
            what is expected), two problems of one id, or no problem at all.
    """
    rows = list(islice(_rows(settings), settings.max_samples or None))
    if not rows:
        raise ValueError(f"data.source={settings.source}: there are no rows")
    most, count = Counter(row.id for row in rows).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} problems have the id {most!r}: each needs its own")
    texts = render(rows, settings, tokenizer)
    # A chat template writes the special tokens itself.
    encoded = tokenizer(texts, add_special_tokens=not settings.apply_chat_template)["input_ids"]
    problems = []
    for row, text, token_ids in zip(rows, texts, encoded, strict=True):
        if not token_ids:
            raise ValueError(f"{row.where}: the prompt has no tokens")
        if len(token_ids) > max_prompt_length:
            if settings.filter_overlong_prompts:
                continue
            raise ValueError(
                f"{row.where}: the prompt has {len(token_ids)} tokens, more than "
                f"max_prompt_length={max_prompt_length}; raise that, or drop such prompts with "
                "data.filter_overlong_prompts=true"
            )
        extra = dict(row.extra_info)
        if isinstance(row.prompt, list):
            extra["prompt_messages"] = row.prompt
        problems.append(
            Problem(
                id=row.id,
                prompt_token_ids=np.asarray(token_ids, dtype=np.int32),
                data_source=row.data_source,
                ground_truth=row.ground_truth,
                extra_info=extra,
                prompt_text=text,
            )
        )
    if len(problems) < len(rows):
        logger.warning(
            "%d of %d prompts are longer than max_prompt_length=%d and were dropped",
            len(rows) - len(problems), len(rows), max_prompt_length,
        )  # fmt: skip
    if not problems:
        raise ValueError(f"all {len(rows)} prompts are longer than {max_prompt_length} tokens")
    return problems


def held_out(
    split: Sequence[Problem], training: Sequence[Problem], *, name: str, on_overlap: str
) -> list[Problem]:
    """``split`` without the problems whose prompt is also trained on.

    Args:
        name: of the split, for messages.
        on_overlap: ``drop`` them, raise an ``error``, or ``allow`` them.

    Raises:
        ValueError: there are some and ``on_overlap`` is ``error``, or none is left.
    """
    if on_overlap == "allow":
        return list(split)
    trained = {problem.prompt_text for problem in training}
    kept = [problem for problem in split if problem.prompt_text not in trained]
    if len(kept) == len(split):
        return kept
    first = next(problem for problem in split if problem.prompt_text in trained)
    overlap = f"{len(split) - len(kept)} of {len(split)} problems of evaluation split {name!r}"
    if on_overlap == "error" or not kept:
        raise ValueError(
            f"{overlap} are also trained on, the first is {first.id!r} ({first.prompt_text!r}): "
            "use other files or another seed, or set on_overlap=allow"
        )
    logger.warning("%s are also trained on and were dropped", overlap)
    return kept


# -------------------------------------------------------------------- sources


@DATA_SOURCES.register("reasoning_gym")
def reasoning_gym_rows(settings: DataSettings) -> Iterator[Row]:
    """Problems of a reasoning-gym task; ``extra_info`` holds what the library's scorer needs."""
    from rewards.reasoning_gym import KEY, entry_as_json, make_dataset

    # The library seeds row i with seed + i, so neighbouring seeds would share all rows but one.
    seed = settings.seed * LARGEST_SIZE
    config = {**settings.task_config, "seed": seed, "size": settings.size}
    dataset = make_dataset(settings.task, config)
    source = f"reasoning_gym/{settings.task}"
    # Where JSON cannot hold the task's first row, the scorer makes all its rows again.
    by_value = entry_as_json(dataset[0]) is not None
    for index in range(settings.size):
        entry = dataset[index]
        info = {
            "task": settings.task,
            "config": config,
            "index": index,
            "entry": entry_as_json(entry) if by_value else None,
        }
        yield Row(
            id=f"{source}/seed{settings.seed}:{index}",
            where=f"{settings.task}, row {index} of seed {settings.seed}",
            prompt=entry["question"],
            data_source=source,
            ground_truth=entry["answer"],
            extra_info={KEY: info},
        )


@DATA_SOURCES.register("file")
def file_rows(settings: DataSettings) -> Iterator[Row]:
    """Rows of local files."""
    return (parsed(raw, settings) for raw in raw_file_rows(settings))


@DATA_SOURCES.register("hub")
def hub_rows(settings: DataSettings) -> Iterator[Row]:
    """Rows of a data set of the Hugging Face Hub, or of a local folder of data files."""
    return (parsed(raw, settings) for raw in raw_hub_rows(settings))


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row as it stands in its source.

    Attributes:
        columns: as they were read, unchecked.
        where: file and line, for errors.
        origin: the file; "" where there is none.
        data_source: for a row that names none.
    """

    columns: Any
    id: str
    where: str
    origin: str
    data_source: str


def parsed(raw: RawRow, settings: DataSettings) -> Row:
    """The problem that a row holds.

    Raises:
        ValueError: of ``parse_row``.
    """
    return parse_row(
        raw.columns,
        id=raw.id,
        where=raw.where,
        row_format=settings.row_format,
        data_source=raw.data_source,
    )


def raw_file_rows(settings: DataSettings) -> Iterator[RawRow]:
    """Rows of local files as they stand there."""
    names = Counter(Path(file).name for file in settings.files)
    for file in settings.files:
        path = Path(file).expanduser()
        if not path.is_file():
            raise ValueError(f"data.files: {file!r} does not exist (from {Path.cwd()})")
        readers = {".jsonl": read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
        if path.suffix not in readers:
            raise ValueError(
                f"data.files: {file!r} must end in one of {', '.join(readers)} to be read"
            )
        # The same id wherever the file lies, unless two have one name.
        label = path.name if names[path.name] == 1 else file
        for index, (where, row) in enumerate(readers[path.suffix](path)):
            yield RawRow(
                columns=row,
                id=f"{label}:{index}",
                where=where,
                origin=file,
                data_source=settings.data_source or path.stem,
            )


def raw_hub_rows(settings: DataSettings) -> Iterator[RawRow]:
    """Rows of a data set as they stand there."""
    import datasets

    try:
        rows = datasets.load_dataset(
            settings.name,
            settings.config_name or None,
            split=settings.split,
            revision=settings.revision or None,
        )
    except (OSError, ValueError) as error:  # no such set, configuration or split; no network
        raise ValueError(
            f"data set {settings.name!r} (config_name={settings.config_name!r}, "
            f"split={settings.split!r}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    for index, row in enumerate(rows):
        yield RawRow(
            columns=row,
            id=f"{settings.name}/{settings.split}:{index}",
            where=f"{settings.name}, split {settings.split}, row {index}",
            origin="",
            data_source=settings.data_source or settings.name,
        )


def given_rows(settings: DataSettings) -> Iterator[RawRow | Row]:
    """What a registered source or user code gives, each row with its place.

    Raises:
        ValueError: it gives no rows.
    """
    given = DATA_SOURCES.get(settings.source)(settings)
    if not isinstance(given, Iterable):
        raise ValueError(
            f"data source {settings.source!r} must return rows, it returned {type(given).__name__}"
        )
    for index, row in enumerate(given):
        if isinstance(row, Row):
            yield row
        else:
            yield RawRow(
                columns=row,
                id=f"{settings.source}:{index}",
                where=f"{settings.source}, row {index}",
                origin="",
                data_source=settings.data_source,
            )


def _rows(settings: DataSettings) -> Iterator[Row]:
    given = given_rows(settings)
    return (row if isinstance(row, Row) else parsed(row, settings) for row in given)


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, value) of each line that is not blank."""
    with _utf8(path), path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _json(line, f"{path}:{number}")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    with _utf8(path):
        text = path.read_text(encoding="utf-8")
    rows = _json(text, str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield f"{path}, row {index}", row


@contextmanager
def _utf8(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error.reason}); convert it") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where}: lists or objects are nested too deeply to be a row") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from error
    with file:
        index = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield f"{path}, row {index}", row
                index += 1


# -------------------------------------------------------------------- prompts


def render(rows: Sequence[Row], settings: DataSettings, tokenizer: Any) -> list[str]:
    """The prompts as the model sees them.

    Raises:
        ValueError: no chat template, a template that gives no text, or a conversation where raw
            text is asked for.
    """
    rewrite = _rewriter(settings.prompt_template)
    if settings.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "data.apply_chat_template=true, but the tokenizer has no chat template; set it to "
            "false to use the questions as raw text"
        )
    conversations = [_messages(row, settings, rewrite) for row in rows]
    if not settings.apply_chat_template:
        return [_raw_text(messages, row) for messages, row in zip(conversations, rows, strict=True)]
    return tokenizer.apply_chat_template(
        conversations, tokenize=False, add_generation_prompt=True, **settings.chat_template_kwargs
    )


def _messages(
    row: Row, settings: DataSettings, rewrite: Callable[[str], str]
) -> list[dict[str, str]]:
    """The conversation up to the answer, its last message rewritten as asked."""
    if isinstance(row.prompt, str):
        messages = [{"role": "user", "content": row.prompt}]
    else:
        messages = [dict(message) for message in row.prompt]
    question = rewrite(messages[-1]["content"])
    if not isinstance(question, str) or not question.strip():
        raise ValueError(
            f"{row.where}: data.prompt_template={settings.prompt_template!r} made {question!r} of "
            "the question; it must give text"
        )
    messages[-1]["content"] = question + settings.instruction_suffix
    if settings.system_prompt:
        if messages[0]["role"] == "system":
            raise ValueError(
                f"{row.where}: the row has a system message of its own; leave data.system_prompt "
                "empty"
            )
        messages.insert(0, {"role": "system", "content": settings.system_prompt})
    return messages


def _raw_text(messages: list[dict[str, str]], row: Row) -> str:
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(
            f"{row.where}: a conversation ({', '.join(roles)}) cannot become raw text; set "
            "data.apply_chat_template=true"
        )
    return "\n\n".join(message["content"] for message in messages)


def _rewriter(template: str) -> Callable[[str], str]:
    if not template:
        return lambda question: question
    if "{question}" in template:
        return lambda question: template.replace("{question}", question)
    if ":" in template:
        return load_object(template, kind="data.prompt_template")
    raise ValueError(
        f"data.prompt_template={template!r}: expected text with {{question}} in it, or "
        "'module:function'"
    )
