"""Token ids back to text, for verifiers and people. Text is never tokenised again: token in, token
out.
"""

from __future__ import annotations

from typing import Any

from rollout.tree import Tree


class Decoder:
    """A tokenizer's decoding half.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def response_text(self, tree: Tree, leaf: int) -> str:
        """The text of the path from the prompt to segment ``leaf``, without special tokens."""
        return self.text(tree.path_token_ids(leaf, with_prompt=False).tolist())

    def text(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer.

    Raises:
        ValueError: the folder holds none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be loaded from {path!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {path!r} has no end-of-sequence token, so responses would never end"
        )
    return tokenizer


def stop_token_ids(path: str, tokenizer: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's end of sequence and those that the model's
    generation config lists.
    """
    from transformers import GenerationConfig

    stops = {int(tokenizer.eos_token_id)}
    try:
        listed = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model folder need not have one
        listed = None
    if listed is not None:
        stops.update([listed] if isinstance(listed, int) else listed)
    return sorted(stops)
