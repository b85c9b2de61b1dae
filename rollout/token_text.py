"""The tokenizer as the engine needs it: decoding, and the bytes that each token spells."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")  # by one of which a tokenizer is known

Speller = Callable[[str], bytes]  # a token as the vocabulary writes it -> what it adds to the text


class TokenText:
    """A tokenizer, loaded when it is first needed.

    Args:
        tokenizer: a folder or Hub name (of which there must be a local copy), a tokenizer of
            transformers, or None where there is none.
    """

    def __init__(self, tokenizer: str | Path | Any | None) -> None:
        self._source = tokenizer

    def decode(self, token_ids: np.ndarray) -> str:
        """Text of a response, special tokens included."""
        return self._tokenizer.decode(
            token_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    @property
    def spells_bytes(self) -> bool:
        """Whether the text of every token sequence is what its tokens spell, one after the other.

        Complete characters are meant: how bytes that make none are shown, and whether a space
        begins the text, may differ.
        """
        return self._speller is not None

    def spell(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token adds to the text, perhaps of a part of a character."""
        assert self._speller is not None
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        return b"" if piece is None else self._speller(piece)

    @cached_property
    def _tokenizer(self) -> Any:
        if self._source is None:
            raise ValueError(
                "stop_strings need the model's tokenizer and the engine was built without one: "
                "give Engine(..., tokenizer=<folder or tokenizer>), or use stop_token_sequences"
            )
        if not isinstance(self._source, str | Path):
            return self._source
        from transformers import AutoTokenizer

        source = Path(self._source).expanduser()
        try:
            # Without files transformers makes an empty tokenizer of the model's kind.
            if source.is_dir() and not any(p for k in _FILES for p in source.glob(k)):
                raise ValueError("it has no tokenizer files")
            return AutoTokenizer.from_pretrained(str(source), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"stop_strings need a tokenizer and none can be loaded from {str(source)!r}: put "
                "the model's tokenizer files there, name another folder with Engine(..., "
                f"tokenizer=...), or use stop_token_sequences ({error})"
            ) from error

    @cached_property
    def _speller(self) -> Speller | None:
        """How tokens are spelled, if the tokenizer's decoder is one of the two usual kinds."""
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        if decoder is None:
            return None
        speller = _speller(json.loads(decoder.__getstate__()))
        return speller if speller and self._agrees(speller) else None

    def _agrees(self, speller: Speller) -> bool:
        """Whether tokens from all over the vocabulary are decoded as they are spelled."""
        tokenizer = self._tokenizer
        ids = np.linspace(0, len(tokenizer) - 1, 256).astype(int)
        ids = np.random.default_rng(0).permutation(np.unique(ids))
        pieces = [tokenizer.convert_ids_to_tokens(int(i)) for i in ids]
        kept = [i for i, piece in zip(ids, pieces, strict=True) if piece and not _is_byte(piece)]
        spelled = b"".join(speller(tokenizer.convert_ids_to_tokens(int(i))) for i in kept)
        return _readable(spelled.decode("utf-8", "replace")) == _readable(
            self.decode(np.array(kept, np.int64))
        )


def _readable(text: str) -> str:
    return text.replace("\ufffd", "").lstrip(" ")


def _speller(decoder: dict[str, Any]) -> Speller | None:
    """Byte-level BPE (GPT-2, Llama 3, Qwen) or SentencePiece with byte fallback (Llama 2, Gemma,
    Mistral); None for anything else.
    """
    steps = decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        table = _byte_level()
        return lambda piece: _spell_byte_level(piece, table)
    if not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    blanks = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
    for step in steps:
        if step["type"] == "Replace":
            if step["content"] != " " or "String" not in step["pattern"]:
                return None
            blanks.append(step["pattern"]["String"])
        if step["type"] == "Strip" and (step["content"] != " " or step["stop"]):
            return None
    if len(blanks) != 1:
        return None
    falls_back = "ByteFallback" in kinds
    return lambda piece: (
        bytes([int(piece[3:5], 16)])
        if falls_back and _is_byte(piece)
        else piece.replace(blanks[0], " ").encode()
    )


def _is_byte(piece: str) -> bool:
    """Whether a token is SentencePiece's name of a byte, such as <0xE4>."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _spell_byte_level(piece: str, table: dict[str, int]) -> bytes:
    """A piece's bytes; added tokens that are not written in the byte alphabet spell themselves."""
    if all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return piece.encode()


def _byte_level() -> dict[str, int]:
    """GPT-2's alphabet: each byte as a printable character (Radford et al. 2019, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table
