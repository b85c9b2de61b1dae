"""Small tokenizers of the kinds that matter, trained on a few lines."""

from __future__ import annotations

import json

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = [
    "the answer is <answer> 42 </answer> and that is the end",
    "你好 世界 你好吗 naïve café déjà vu 🙂🙂 🙃",
    "so we have x = 3\n\nand y = 4\n\n the answer </answer>",
] * 20
END = "<|end|>"


def byte_level(vocab_size: int = 330) -> PreTrainedTokenizerFast:
    """GPT-2's kind: tokens are bytes, and characters may be cut anywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's kind: spaces are part of tokens and one is dropped in front; what the vocabulary
    lacks is spelled in byte tokens.
    """
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    known = [line.replace("🙂", "").replace("你", "") for line in TEXT]
    trained.train_from_iterator(known, trainer)
    vocab = trained.get_vocab()
    vocab.update({f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)})
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: what a token adds to the text depends on its place."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def of_pieces(pieces: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with exactly these tokens, written in the byte alphabet."""
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
