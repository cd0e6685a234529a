"""Captions to token ids: the published cleaning, and BERT's WordPiece, by default without the closing [SEP]."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from umt_fast.errors import RunError
from umt_fast.files import expand_home, read_small

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST_TEXT = 1 << 20
"""Characters of a text that are read; the rest cannot fit any model here."""


class BadVocabulary(RunError, ValueError):
    """A vocabulary cannot be read or is invalid."""


def clean_text(text: str, max_words: int | None = None) -> str:
    """Clean a caption or question as the published code does; answers are not cleaned.

    Lower case; `, . ' ! ? " ( ) * # : ; ~` are removed, `-` and `/` become spaces, `<person>` becomes `person`.
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text[:LONGEST_TEXT].lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return text if max_words is None else " ".join(text.split(" ")[:max_words])


class Tokenizer:
    """Lower-casing WordPiece of one vocabulary. A literal [SEP] in a text is one token."""

    def __init__(self, vocabulary: Sequence[str], closing_sep: bool = False) -> None:
        """`closing_sep` ends every text with [SEP], as Hugging Face's tokenizer does; the published code does not.

        Raises BadVocabulary if a special token is missing or a word is repeated.
        """
        words = {word: number for number, word in enumerate(vocabulary)}
        missing = [word for word in SPECIAL if word not in words]
        if missing or len(words) < len(vocabulary):
            raise BadVocabulary(f"the vocabulary lacks {missing[0]}" if missing else "the vocabulary has a word twice")
        self.vocabulary = list(vocabulary)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (words[word] for word in SPECIAL)
        self._closing = [self.sep_id] if closing_sep else []
        self._pieces = WordPieceTokenizer(models.WordPiece(words, unk_token="[UNK]"))
        _as_bert(self._pieces)
        self._pieces.add_special_tokens(list(SPECIAL))

    @classmethod
    def read(cls, path: str | Path, closing_sep: bool = False) -> Tokenizer:
        """Read a vocab.txt, one word a line, or the one in a folder. Raises BadVocabulary."""
        path = expand_home(path)
        path = path / "vocab.txt" if path.is_dir() else path
        try:
            words = read_small(path).decode().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise BadVocabulary(f"cannot read the vocabulary {path}: {error}") from None
        try:
            return cls([word.rstrip("\r") for word in words[: -1 if words[-1] == "" else None]], closing_sep)
        except BadVocabulary as error:
            raise BadVocabulary(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        """Write a vocab.txt."""
        path.write_text("".join(f"{word}\n" for word in self.vocabulary), "utf-8")

    def __call__(self, texts: Sequence[str], max_length: int) -> tuple[Int[Tensor, "n l"], Int[Tensor, "n l"]]:
        """Ids of `[CLS] words`, cut or padded to `max_length`, and a mask with 1 at the tokens."""
        texts = [text[:LONGEST_TEXT].encode("utf-8", "replace").decode() for text in texts]
        ids = torch.full((len(texts), max_length), self.pad_id)
        mask = torch.zeros(len(texts), max_length, dtype=torch.int64)
        for row, encoded in enumerate(self._pieces.encode_batch(texts, add_special_tokens=False)):
            kept = [self.cls_id, *encoded.ids[: max_length - 1 - len(self._closing)], *self._closing]
            ids[row, : len(kept)] = torch.tensor(kept)
            mask[row, : len(kept)] = 1
        return ids, mask


def make_vocabulary(texts: Iterable[str], size: int = 2000) -> list[str]:
    """A WordPiece vocabulary of at most `size` entries: special tokens, every letter, the most frequent words.

    Equal texts give equal vocabularies; the trainer of the `tokenizers` library does not guarantee this.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        normal = normalizers.BertNormalizer(lowercase=True).normalize_str(text)
        counts.update(word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(normal))
    letters = sorted({letter for word in counts for letter in word})
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words])
    return list(vocabulary)[:size]


def _as_bert(pieces: WordPieceTokenizer) -> None:
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
