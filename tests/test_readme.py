"""What the README and the documentation tell people to type is accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from treepo.clean import CleanConfig
from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.evaluate import EvaluateConfig
from treepo.export import ExportConfig
from treepo.names import check_names
from treepo.report import ReportConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
SCHEMAS = {
    "clean": CleanConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "report": ReportConfig,
}


def commands(*files: str) -> list[list[str]]:
    """Words of every command in the files' bash blocks."""
    found = []
    for file in files:
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / file).read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    found.append(words)
    return found


README_REWARD = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
ALL = commands(*PAGES)
OURS = [(words[2], words[3:]) for words in ALL if words[1:2] == ["-m"]]


def test_the_two_commands_come_first() -> None:
    assert [words[:2] for words in ALL[:2]] == [["make", "quickstart"], ["make", "test"]]


@pytest.mark.parametrize("target", sorted({words[1] for words in ALL if words[0] == "make"}))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("module", "words"), OURS, ids=[" ".join(w[1][:3]) for w in OURS])
def test_every_command_line_composes_and_passes_its_checks(
    module: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text(README_REWARD)
    name = module.removeprefix("treepo.")
    config = compose(name, SCHEMAS[name], [word for word in words if word != "--dry-run"])
    if isinstance(config, TrainConfig):
        check_names(config)


@pytest.mark.parametrize("file", PAGES)
def test_every_link_to_a_file_leads_somewhere(file: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / file).read_text()):
        assert ((ROOT / file).parent / target).exists(), f"{file} links to {target}"


def test_files_named_in_the_docs_exist() -> None:
    for file in ("docs/architecture.md", "docs/algorithms.md"):
        for name in re.findall(r"`((?:treepo|rollout|trainers|rewards)/[\w/]+\.py)", read(file)):
            assert (ROOT / name).is_file(), f"{file} names {name}"


def read(file: str) -> str:
    return (ROOT / file).read_text()
