"""From rows of any format to tokenised problems, and what is said about bad ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.records import RewardItem
from rewards.registry import make_part
from treepo.data import DATA_SOURCES, Problem, held_out, load_problems
from treepo.data_settings import DataSettings

CHAIN_SUM = {"min_terms": 3, "max_terms": 5, "min_value": 1, "max_value": 20}
GSM8K_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
GSM8K_ROW = {"question": "How many are 3 boxes of 6?", "answer": "3*6 = <<3*6=18>>18\n#### 18"}
VERL_ROW = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "What is 2 + 3?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"index": 7, "split": "train"},
}
TRL_ROW = {"prompt": "What is 2 + 3?", "solution": "5", "level": 2}


class Tokenizer:
    """One token a character; its chat template names the roles, and <s> is its special token."""

    chat_template = "roles"

    def apply_chat_template(
        self, conversations: list, *, tokenize: bool, add_generation_prompt: bool, **kwargs: Any
    ) -> list[str]:
        assert not tokenize and add_generation_prompt
        start = "".join(f"[{key}={value}]" for key, value in kwargs.items())
        return [
            start + "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"
            for messages in conversations
        ]

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict:
        start = [1] if add_special_tokens else []
        return {"input_ids": [start + [ord(char) for char in text] for text in texts]}


class PlainTokenizer(Tokenizer):
    chat_template = None  # type: ignore[assignment]


def load(max_prompt_length: int = 1000, tokenizer: Any = None, **fields: Any) -> list[Problem]:
    return load_problems(DataSettings(**fields), tokenizer or Tokenizer(), max_prompt_length)


def write(path: Path, *rows: Any) -> str:
    """Rows as a .jsonl file; text stands as it is."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def load_file(path: str, **fields: Any) -> list[Problem]:
    return load(source="file", files=[path], **fields)


# ---------------------------------------------------------------- formats


def test_a_verl_row_keeps_its_source_truth_and_extra_info(tmp_path: Path) -> None:
    (problem,) = load_file(write(tmp_path / "a.jsonl", VERL_ROW))
    assert problem.id == "a.jsonl:0"
    assert problem.prompt_text == "<user>What is 2 + 3?<assistant>"
    assert problem.prompt_token_ids.dtype == np.int32
    assert problem.prompt_token_ids.tolist() == [ord(c) for c in problem.prompt_text]
    assert (problem.data_source, problem.ground_truth) == ("openai/gsm8k", "5")
    assert problem.extra_info == {
        "index": 7, "split": "train", "ability": "math", "prompt_messages": VERL_ROW["prompt"],
    }  # fmt: skip


def test_a_trl_row_hands_its_other_columns_to_the_reward(tmp_path: Path) -> None:
    (problem,) = load_file(write(tmp_path / "mine.jsonl", TRL_ROW))
    assert problem.prompt_text == "<user>What is 2 + 3?<assistant>"
    assert (problem.data_source, problem.ground_truth) == ("mine", "5")
    assert problem.extra_info == {"solution": "5", "level": 2}


def test_a_gsm8k_row_gives_the_number_after_its_mark(tmp_path: Path) -> None:
    (problem,) = load_file(write(tmp_path / "a.jsonl", GSM8K_ROW))
    assert (problem.data_source, problem.ground_truth) == ("openai/gsm8k", "18")
    item = RewardItem(
        data_source=problem.data_source,
        prompt=problem.prompt_text,
        solution_str="so #### 18.00",
        ground_truth=problem.ground_truth,
        extra_info=problem.extra_info,
    )
    assert make_part("auto", {})(item).value == 1.0


def test_data_source_names_the_verifier_of_rows_that_do_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TRL_ROW, {**TRL_ROW, "data_source": "own"})
    problems = load_file(path, data_source="math")
    assert [p.data_source for p in problems] == ["math", "own"]


def test_json_jsonl_and_parquet_give_the_same_problems(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{**VERL_ROW, "extra_info": {"index": i}} for i in range(5)]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [(p.prompt_text, p.ground_truth, p.extra_info["index"])
                for p in load_file(str(tmp_path / "a.jsonl"))]  # fmt: skip
    assert [index for _, _, index in expected] == [0, 1, 2, 3, 4]
    for name in ("a.json", "a.parquet"):
        problems = load_file(str(tmp_path / name))
        assert [(p.prompt_text, p.ground_truth, p.extra_info["index"]) for p in problems] == (
            expected
        )


def test_a_folder_of_data_files_loads_as_a_hub_data_set_does(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    rows = [{**GSM8K_ROW, "question": f"{GSM8K_ROW['question']} ({i})"} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-0.parquet")
    name = str(tmp_path / "set")
    problems = load(source="hub", name=name)
    assert [p.id for p in problems] == [f"{name}/train:{i}" for i in range(3)]
    assert [p.ground_truth for p in problems] == ["18"] * 3
    with pytest.raises(ValueError, match="split='test'.*cannot be loaded"):
        load(source="hub", name=name, split="test")


def test_a_hub_name_that_cannot_be_reached_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="'no-such-owner/no-such-set'.*cannot be loaded"):
        load(source="hub", name="no-such-owner/no-such-set")


def test_gsm8k_itself_loads(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *[GSM8K_ROW] * 50)
    file = GSM8K_FOLDER / "train.jsonl"
    path = str(file if file.is_file() else tmp_path / "train.jsonl")
    problems = load_file(path, max_prompt_length=5000, max_samples=50)
    assert len(problems) == 50
    assert all(float(p.ground_truth.replace(",", "")) is not None for p in problems)


# ---------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a"', r"b\.jsonl:2: not valid JSON: .* column"),
        ("[1, 2]", r"b\.jsonl:2: expected a row of columns, got list"),
        ("{}", r"b\.jsonl:2: the row is empty; expected 'prompt' and 'reward_model' \(verl\)"),
        ({"text": "a"}, r"b\.jsonl:2: the row has the columns text; expected 'prompt'"),
        ({"question": "a"}, r"b\.jsonl:2: the row has the columns question; expected"),
        ({"question": "a", "answer": "18"}, r"b\.jsonl:2: the answer does not end in '#### <n"),
        ({"question": "a", "answer": "####"}, r"b\.jsonl:2: the answer does not end in"),
        ({"question": "", "answer": "#### 1"}, r"b\.jsonl:2: the prompt is empty"),
        ({"question": None, "answer": "#### 1"}, r"b\.jsonl:2: a GSM8K row needs question"),
        ({"prompt": " \n"}, r"b\.jsonl:2: the prompt is empty"),
        ({"prompt": []}, r"b\.jsonl:2: the prompt must be text or a list of chat messages"),
        ({"prompt": 3}, r"b\.jsonl:2: the prompt must be text.*got int"),
        ({"prompt": ["hi"]}, r"b\.jsonl:2: each chat message needs the texts 'role'"),
        ({"prompt": [{"role": "user"}]}, r"b\.jsonl:2: each chat message needs"),
        ({"prompt": [{"role": "user", "content": " "}]}, r"b\.jsonl:2: the prompt is empty"),
        (
            {"prompt": [{"role": "assistant", "content": "a"}]},
            r"b\.jsonl:2: the last chat message is the assistant's",
        ),
        ({**VERL_ROW, "data_source": None}, r"b\.jsonl:2: a verl row needs data_source"),
        ({**VERL_ROW, "reward_model": {}}, r"b\.jsonl:2: reward_model.ground_truth is missing"),
        ({**VERL_ROW, "reward_model": "5"}, r"b\.jsonl:2: reward_model.ground_truth is missing"),
        ({**VERL_ROW, "extra_info": "x"}, r"b\.jsonl:2: extra_info must be an object, got str"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "b.jsonl", TRL_ROW, row)
    with pytest.raises(ValueError, match=message):
        load_file(path)


def test_a_named_row_format_is_demanded_of_every_row(tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl", TRL_ROW)
    with pytest.raises(ValueError, match=r"b\.jsonl:1: a verl row needs data_source, reward_model"):
        load_file(path, row_format="verl")


def test_blank_lines_are_passed_over_and_lines_counted_with_them(tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl", "", TRL_ROW, "   ", "{}")
    with pytest.raises(ValueError, match=r"b\.jsonl:4: the row is empty"):
        load_file(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "there are no rows"),
        ("a.json", '{"rows": []}', "expected a list of rows, got dict"),
        ("a.json", "[1", "not valid JSON"),
        ("a.json", "[{}]", r"a\.json, row 0: the row is empty"),
        ("a.parquet", "nonsense", "not a parquet file"),
        ("a.csv", "x", "must end in one of .jsonl, .json, .parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_file(str(tmp_path / name))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match="'no/such.jsonl' does not exist"):
        load_file("no/such.jsonl")


def test_files_of_one_name_keep_their_ids_apart_and_one_file_twice_is_an_error(
    tmp_path: Path,
) -> None:
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "a.jsonl", TRL_ROW))
    problems = load(source="file", files=paths)
    assert [p.id for p in problems] == [f"{path}:0" for path in paths]
    with pytest.raises(ValueError, match="2 problems have the id"):
        load(source="file", files=[paths[0], paths[0]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "file"}, "data.files is empty"),
        ({"source": "hub"}, "data.name is empty"),
        ({"row_format": "csv"}, "data.row_format='csv': must be one of auto, verl, trl, gsm8k"),
        ({"on_overlap": "warn"}, "data.on_overlap='warn': must be one of drop, error, allow"),
        ({"max_samples": -1}, "data.max_samples=-1"),
        ({"size": 0}, "data.size=0"),
        ({"seed": -1}, "data.seed=-1"),
        ({"task_config": {"seed": 3}}, "set data.seed instead"),
        ({"task": "chain_sums"}, "unknown reasoning-gym task 'chain_sums'"),
        ({"task_config": {"terms": 3}}, "no setting 'terms'"),
        ({"source": "disk"}, "unknown data source 'disk'.*Known: file, hub, reasoning_gym"),
        ({"source": "no_such_module:rows"}, "no module of that name"),
        ({"prompt_template": "Solve it"}, r"expected text with \{question\}"),
    ],
)
def test_a_bad_setting_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(**fields)


def test_the_settings_are_a_config_node() -> None:
    from omegaconf import OmegaConf

    node = OmegaConf.merge(
        OmegaConf.structured(DataSettings), {"task_config": CHAIN_SUM, "files": ["a"]}
    )
    settings = OmegaConf.to_object(node)
    assert settings == DataSettings(task_config=dict(CHAIN_SUM), files=["a"])


# ---------------------------------------------------------------- prompts


def test_long_prompts_are_an_error_or_dropped_with_a_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "short"}, {"prompt": "x" * 80}, {"prompt": "b"})
    with pytest.raises(
        ValueError,
        match=r"a\.jsonl:2: the prompt has 97 tokens, more than max_prompt_length=50.*"
        "filter_overlong_prompts=true",
    ):
        load_file(path, max_prompt_length=50)
    with caplog.at_level(logging.WARNING):
        problems = load_file(path, max_prompt_length=50, filter_overlong_prompts=True)
    assert [p.id for p in problems] == ["a.jsonl:0", "a.jsonl:2"]
    assert "1 of 3 prompts" in caplog.text
    with pytest.raises(ValueError, match="all 3 prompts"):
        load_file(path, max_prompt_length=2, filter_overlong_prompts=True)


def test_a_prompt_of_exactly_the_limit_passes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "12345"})
    assert len(load_file(path, max_prompt_length=5, apply_chat_template=False,
                         tokenizer=NoSpecials())) == 1  # fmt: skip
    with pytest.raises(ValueError, match="has 5 tokens, more than max_prompt_length=4"):
        load_file(path, max_prompt_length=4, apply_chat_template=False, tokenizer=NoSpecials())


class NoSpecials(PlainTokenizer):
    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict:
        return super().__call__(texts, add_special_tokens=False)


def test_system_prompt_suffix_and_template_shape_the_question(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TRL_ROW)
    (problem,) = load_file(
        path,
        system_prompt="Be brief.",
        instruction_suffix=" Think.",
        prompt_template="Q: {question}",
        chat_template_kwargs={"enable_thinking": False},
    )
    assert problem.prompt_text == (
        "[enable_thinking=False]<system>Be brief.<user>Q: What is 2 + 3? Think.<assistant>"
    )


def test_a_template_may_be_the_users_function(tmp_path: Path) -> None:
    file = tmp_path / "t.py"
    file.write_text(
        "def shout(question): return question.upper()\ndef nothing(question): return ''\n"
    )
    path = write(tmp_path / "a.jsonl", {"prompt": "why {x}"})
    (problem,) = load_file(path, prompt_template=f"{file}:shout")
    assert problem.prompt_text == "<user>WHY {X}<assistant>"
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*nothing.* made '' of the question"):
        load_file(path, prompt_template=f"{file}:nothing")


def test_raw_text_has_the_tokenizers_special_tokens_and_no_template(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TRL_ROW)
    (problem,) = load_file(
        path, apply_chat_template=False, system_prompt="S", tokenizer=PlainTokenizer()
    )
    assert problem.prompt_text == "S\n\nWhat is 2 + 3?"
    assert problem.prompt_token_ids[0] == 1
    chat = [{"role": r, "content": r} for r in ("user", "assistant", "user")]
    conversation = write(tmp_path / "b.jsonl", {"prompt": chat})
    with pytest.raises(ValueError, match=r"b\.jsonl:1: a conversation"):
        load_file(conversation, apply_chat_template=False)


def test_a_missing_chat_template_and_a_second_system_message_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TRL_ROW)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_file(path, tokenizer=PlainTokenizer())
    chat = [{"role": r, "content": r} for r in ("system", "user")]
    path = write(tmp_path / "b.jsonl", {"prompt": chat})
    with pytest.raises(ValueError, match=r"b\.jsonl:1: the row has a system message of its own"):
        load_file(path, system_prompt="S")


def test_max_samples_keeps_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TRL_ROW, TRL_ROW, "not json")
    assert [p.id for p in load_file(path, max_samples=2)] == ["a.jsonl:0", "a.jsonl:1"]


def test_a_real_tokenizer_gives_the_ids_of_its_own_template(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    (problem,) = load(tokenizer=tokenizer, size=1, task_config=CHAIN_SUM)
    assert "State the final answer to the following arithmetic problem: " in problem.prompt_text
    message = [{"role": "user", "content": "2 + 3 ="}]
    (plain,) = load_file(write(tmp_path / "a.jsonl", {"prompt": "2 + 3 ="}), tokenizer=tokenizer)
    expected = tokenizer.apply_chat_template(message, tokenize=True, add_generation_prompt=True)
    assert plain.prompt_token_ids.tolist() == list(expected["input_ids"])
    assert tokenizer.decode(plain.prompt_token_ids.tolist()) == plain.prompt_text


# ---------------------------------------------------------------- generated problems


def test_generated_problems_carry_what_their_scorer_needs_through_json() -> None:
    for problem in load(size=20, task_config=CHAIN_SUM):
        part = make_part("auto", {})
        info = json.loads(json.dumps(problem.extra_info))
        for answer, right in ((problem.ground_truth, True), ("12345", False)):
            item = RewardItem(
                data_source=problem.data_source,
                prompt=problem.prompt_text,
                solution_str=f"I think\n#### {answer}",
                ground_truth=problem.ground_truth,
                extra_info=info,
            )
            assert (part(item).value == 1.0) == right


def test_generated_problems_are_the_same_in_every_run_and_apart_between_seeds() -> None:
    first, again = (load(size=200, seed=1, task_config=CHAIN_SUM) for _ in range(2))
    assert [(p.id, p.prompt_text) for p in first] == [(p.id, p.prompt_text) for p in again]
    other = load(size=200, seed=2, task_config=CHAIN_SUM)
    assert not {p.id for p in first} & {p.id for p in other}
    shared = {p.prompt_text for p in first} & {p.prompt_text for p in other}
    assert len(shared) < 10  # by chance only: neighbouring seeds of the library share 199 rows


def test_a_problem_that_is_trained_on_is_not_held_out() -> None:
    training = load(size=300, seed=1, task_config=CHAIN_SUM)
    split = load(size=100, seed=2, task_config=CHAIN_SUM) + training[:3]
    kept = held_out(split, training, name="val", on_overlap="drop")
    trained = {p.prompt_text for p in training}
    assert kept and not {p.prompt_text for p in kept} & trained
    assert [p for p in split if p.prompt_text not in trained] == kept
    with pytest.raises(ValueError, match=r"of 103 problems of evaluation split 'val' are also"):
        held_out(split, training, name="val", on_overlap="error")
    assert held_out(split, training, name="val", on_overlap="allow") == split
    with pytest.raises(ValueError, match="3 of 3 problems"):
        held_out(training[:3], training, name="val", on_overlap="drop")


# ---------------------------------------------------------------- user code


def test_user_code_may_be_a_source(tmp_path: Path) -> None:
    file = tmp_path / "source.py"
    file.write_text(
        "def rows(settings):\n"
        "    for i in range(settings.size):\n"
        "        yield {'prompt': f'what is {i}', 'ground_truth': i, 'data_source': 'mine'}\n"
        "def wrong(settings):\n"
        "    return 3\n"
    )
    problems = load(source=f"{file}:rows", size=2)
    assert [(p.prompt_text, p.ground_truth) for p in problems] == [
        ("<user>what is 0<assistant>", 0),
        ("<user>what is 1<assistant>", 1),
    ]
    with pytest.raises(ValueError, match="must return rows, it returned int"):
        load(source=f"{file}:wrong")


def test_the_sources_are_listed() -> None:
    assert DATA_SOURCES.names() == ["file", "hub", "reasoning_gym"]
