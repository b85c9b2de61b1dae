"""The tiny model's tokenizer, its builder, and the folder that ships with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treepo.tiny_model import PHRASES, SPECIAL_TOKENS, build_model, build_tokenizer

ASSET = Path(__file__).resolve().parents[2] / "treepo" / "assets" / "tiny_chain_sum"
TOKENIZER = build_tokenizer()
QUESTION = "State the final answer to the following arithmetic problem: 4 - 13 ="


def _ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@given(st.text() | st.lists(st.sampled_from([*PHRASES, " ", "#", "é", "7"])).map("".join))
def test_any_text_is_decoded_to_itself(text: str) -> None:
    for special in SPECIAL_TOKENS:
        text = text.replace(special, "")
    assert TOKENIZER.decode(_ids(text), skip_special_tokens=True) == text


def test_phrases_are_one_token_each_and_digits_stand_alone() -> None:
    assert [len(_ids(phrase)) for phrase in PHRASES] == [1] * len(PHRASES)
    assert len(_ids("12 + 345 = 357")) == 2 + 1 + 3 + 1 + 3
    assert len(set(_ids("0123456789"))) == 10


def test_the_chat_template_marks_turns_and_opens_the_answer() -> None:
    messages = [{"role": "user", "content": QUESTION}]
    asked = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == f"<|user|>{QUESTION}<|assistant|>"
    messages.append({"role": "assistant", "content": "-9"})
    told = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert told == f"<|user|>{QUESTION}<|assistant|>-9<|end|>"
    # the answer after the opened turn is what the whole conversation's tokens say
    assert _ids(asked) + _ids("-9") + [TOKENIZER.eos_token_id] == _ids(told)


def test_the_same_seed_builds_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    shape = {"num_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    before = torch.get_rng_state()
    first, again, other = (build_model(TOKENIZER, seed=seed, **shape) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.fixture(scope="module")
def shipped():  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(ASSET), AutoTokenizer.from_pretrained(ASSET)


def test_the_shipped_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in ASSET.iterdir()) <= 4 * 2**20


def test_the_shipped_tokenizer_is_the_one_that_is_built(shipped) -> None:  # type: ignore[no-untyped-def]
    _, tokenizer = shipped
    text = f"{QUESTION}\n#### Ω"
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer(text)["input_ids"] == _ids(text)
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert tokenizer.eos_token_id == TOKENIZER.eos_token_id


def test_the_shipped_model_answers_easy_sums_in_the_taught_form(shipped) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = shipped
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    chains = {"12 + 5 - 3": 14, "1 + 2 + 3": 6, "19 - 8 + 4": 15, "11 + 11 + 11": 33}
    answers = []
    for chain in chains:
        question = f"State the final answer to the following arithmetic problem: {chain} ="
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    right = [
        text.endswith(f"\n#### {total}")
        for text, total in zip(answers, chains.values(), strict=True)
    ]
    assert sum(right) >= 3, answers
