"""Strings to token ids: a checkpoint's own tokenizer, or plain bytes for towers that start from nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Tokenizer(Protocol):
    """What both tokenizers offer. Calling one raises ValueError for a string that has no tokens."""

    vocab_size: int

    def __call__(self, texts: Sequence[str]) -> list[list[int]]: ...


class ByteTokenizer:
    """UTF-8 bytes plus 1, so that id 0 stays free; 257 ids, no file needed."""

    vocab_size = 257

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return _check_not_empty(texts, [[byte + 1 for byte in text.encode("utf-8")] for text in texts])

    def recipe(self) -> tuple[str, str]:
        """("module:function", text): the function, called with the text, makes an equal tokenizer in any process."""
        return "model.tokenizer:byte_tokenizer", ""


class AbsentTokenizer:
    """Stands where a model was opened without its text side; calling it raises ValueError."""

    vocab_size = 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        raise ValueError("tokenizer: this model was opened audio-only; open it whole to encode terms")


class CheckpointTokenizer:
    """The fast tokenizer in a checkpoint's folder, without special tokens or chat template."""

    def __init__(self, folder: str | Path) -> None:
        # Imported here: it takes seconds, and byte-level towers never need it.
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"tokenizer: no tokenizer.json in {folder}; add it from the checkpoint's repository")
        if (folder / "config.json").is_file() or (folder / "tokenizer_config.json").is_file():
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True)
        else:
            self._tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        self.vocab_size = len(self._tokenizer)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        return _check_not_empty(texts, encoded["input_ids"])

    def recipe(self) -> tuple[str, str]:
        return "model.tokenizer:FastTokenizer", self._tokenizer.backend_tokenizer.to_str()


class FastTokenizer:
    """What is inside a `CheckpointTokenizer`, from its own JSON: the same ids, and transformers is not imported."""

    def __init__(self, serialised: str) -> None:
        from tokenizers import Tokenizer as Backend

        self._tokenizer = Backend.from_str(serialised)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = self._tokenizer.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _check_not_empty(texts, [one.ids for one in encoded])

    def recipe(self) -> tuple[str, str]:
        return "model.tokenizer:FastTokenizer", self._tokenizer.to_str()


def byte_tokenizer(text: str) -> ByteTokenizer:
    assert not text
    return ByteTokenizer()


def _check_not_empty(texts: Sequence[str], ids: list[list[int]]) -> list[list[int]]:
    for i, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(f"texts[{i}]: got {texts[i]!r}, which has no tokens; leave empty strings out")
    return ids
