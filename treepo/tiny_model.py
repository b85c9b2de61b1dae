"""The tiny model of the quickstart: a Qwen3 of some 0.4M parameters and its tokenizer.

The tokenizer reads bytes, so any text has tokens and digits stand alone, and knows as single tokens
the few phrases that chain sums and their worked answers are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from treepo.demonstrations import term_label

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PAD_TOKEN = "<|pad|>"
USER_TOKEN = "<|user|>"
ASSISTANT_TOKEN = "<|assistant|>"
END_TOKEN = "<|end|>"  # of a turn: the end-of-sequence token
SPECIAL_TOKENS = (PAD_TOKEN, USER_TOKEN, ASSISTANT_TOKEN, END_TOKEN)
PHRASES = (
    "State the final answer to the following arithmetic problem: ",
    " + ",
    " - ",
    " = ",
    " =",
    "\n#### ",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '" + ASSISTANT_TOKEN + "' + message['content'] + '" + END_TOKEN + "' }}"
    "{%- else -%}"
    "{{ '" + USER_TOKEN + "' + message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + ASSISTANT_TOKEN + "' }}{%- endif -%}"
)


def numbered_phrases(max_terms: int, values: Sequence[int]) -> tuple[str, ...]:
    """Phrases for numbered chains of up to ``max_terms`` terms out of ``values``: a term's number,
    and its operator with its value. The first term has neither.
    """
    labels = (term_label(index) for index in range(2, max_terms + 1))
    steps = (f" {operator} {value}" for operator in "+-" for value in values)
    return (*PHRASES, *labels, *steps)


def build_tokenizer(phrases: Sequence[str] = PHRASES) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with ``phrases`` as whole tokens and a chat template.

    Ids: special tokens, then the 256 bytes, then the phrases. Every text is decoded to itself.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        extra_special_tokens=[USER_TOKEN, ASSISTANT_TOKEN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_layers: int = 3,
    hidden_size: int = 96,
    intermediate_size: int = 256,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    rope_theta: float = 10_000.0,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """A freshly initialised Qwen3 (float32, tied embeddings) for ``tokenizer``."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
