"""``python -m treepo.clean data.files=[rows.jsonl] output=FOLDER``: training data without problems
that a reward cannot judge or a model cannot learn from, by rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treepo.cleaning.settings import DEFAULT_RULES, RULES, RuleSettings, check_rules
from treepo.cli import run_command
from treepo.data_settings import DataSettings

if TYPE_CHECKING:
    from treepo.cleaning.records import CleanItem
    from treepo.cleaning.rows import SourceRow
    from treepo.cleaning.run import Event


@dataclass
class CleanConfig:
    """What to clean, by which rules, and where to."""

    output: str = "???"  # a folder that is new or empty
    rules: list[str] = field(default_factory=lambda: list(DEFAULT_RULES))  # run in this order
    settings: RuleSettings = field(default_factory=RuleSettings)  # of the rules
    # only rows of these data sources, e.g. [math*]; others pass untouched. Empty: all
    data_sources: list[str] = field(default_factory=list)
    data: DataSettings = field(default_factory=DataSettings)

    def __post_init__(self) -> None:
        check_rules(self.rules, self.settings)


def work(config: CleanConfig, dry_run: bool) -> None:
    """Read, clean, print what the rules did and, but for a dry run, write it."""
    output = Path(config.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={config.output!r} is not empty: name a new folder")
    from treepo.cleaning.rows import read_rows
    from treepo.cleaning.run import clean

    rows = read_rows(config.data)
    items = [row.item() for row in rows]
    chosen = [is_chosen(row.row.data_source, config.data_sources) for row in rows]
    if not any(chosen):
        names = sorted({row.row.data_source for row in rows})
        raise ValueError(f"data_sources={config.data_sources} match none of {', '.join(names)}")
    cleaned = clean(
        [item for item, is_on in zip(items, chosen, strict=True) if is_on],
        {name: RULES.get(name) for name in config.rules},
        config.settings,
    )
    counts = cleaned.counts()
    counts["not_chosen"] = len(rows) - len(cleaned.items)
    print_counts(counts)
    if dry_run:
        print(f"would write to {output}")
        return
    left = iter(cleaned.items)
    after = [next(left) if is_on else item for item, is_on in zip(items, chosen, strict=True)]
    _write(output, config.data, rows, after, counts, cleaned.events)
    print(f"wrote {output}: rows, changes.jsonl, report.json")


def is_chosen(data_source: str, patterns: list[str]) -> bool:
    """Whether the rules look at rows of this source."""
    return not patterns or any(fnmatch(data_source, pattern) for pattern in patterns)


def _write(
    output: Path,
    data: DataSettings,
    rows: Sequence[SourceRow],
    after: Sequence[CleanItem | None],
    counts: dict[str, Any],
    events: Sequence[Event],
) -> None:
    """Files of rows named as those that were read, ``changes.jsonl``, ``report.json``."""
    from treepo.atomic import write_json, write_json_lines
    from treepo.cleaning.rows import CHANGES, REPORT, with_source, write_rows
    from treepo.data import parsed

    files: dict[str, list[dict[str, Any]]] = {row.output: [] for row in rows}
    origin = {row.output: row.raw.origin for row in rows}
    for row, now in zip(rows, after, strict=True):
        if now is None:
            continue
        columns = with_source(row, row.changed(now), data)
        again = parsed(replace(row.raw, columns=columns), data)
        assert now.answer is None or str(again.ground_truth) == now.answer, row.row.where
        files[row.output].append(columns)
    output.mkdir(parents=True, exist_ok=True)
    for name, kept in files.items():
        write_rows(output / name, kept, origin[name])
    write_json_lines(output / CHANGES, [event.as_dict() for event in events])
    write_json(output / REPORT, {**counts, "files": {n: len(k) for n, k in files.items()}})


def print_counts(counts: dict[str, Any]) -> None:
    """What each rule did, and in all."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("rule", "looked at", "changed", "dropped", "reasons")
    for name, found in counts["rules"].items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in found["reasons"].items())
        numbers = [str(found[key]) for key in ("looked_at", "changed", "dropped")]
        table.add_row(name, *numbers, reasons)
    console.print(table)
    words = {
        "read": "read",
        "unchanged": "left as they were",
        "changed": "changed",
        "dropped": "dropped",
        "not_chosen": "not chosen",
        "without_single_answer": "without a single answer",
    }
    line = ", ".join(f"{counts[name]} {text}" for name, text in words.items())
    console.print(line, highlight=False)


def main() -> None:
    run_command("clean", CleanConfig, work)


if __name__ == "__main__":
    main()
