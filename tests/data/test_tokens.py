"""Text cleaning and tokens against the recorded cases of the published code."""

from __future__ import annotations

import json

import pytest
import stage2_cases as stage2

from umt_fast.data.tokens import BadVocabulary, Tokenizer, clean_text, make_vocabulary

CASES = json.loads((stage2.GOLDEN / "data_cases.json").read_text())


def test_texts_are_cleaned_as_published():
    for raw, cleaned, three in CASES["pre_text"]:
        assert clean_text(raw) == cleaned
        assert clean_text(raw, 3) == three


def test_tokens_are_the_published_ones():
    tokenizer = Tokenizer(CASES["vocab"])
    ids, mask = tokenizer([text for text, *_ in CASES["tokens"]], 8)
    assert ids.tolist() == [ids for _, ids, _ in CASES["tokens"]]
    assert mask.tolist() == [mask for *_, mask in CASES["tokens"]]
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 2, 3, 4)


def test_a_closing_sep_and_the_tokens_of_hugging_faces_bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer(CASES["vocab"], closing_sep=True)
    ours.write(tmp_path / "vocab.txt")
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    texts = ["a man is playing guitar", "The DOG", "zzz", "", "caf\u00e9 \u4e2d\u6587 #1!", "a man " * 20]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=9)
    ids, mask = ours(texts, 9)
    assert ids.tolist() == expected["input_ids"]
    assert mask.tolist() == expected["attention_mask"]


def test_a_long_text_is_cleaned_to_its_end():
    raw = "A <person> walks-up, then (slowly)   turns! " * 10_000
    assert clean_text(raw) == " ".join(["a person walks up then slowly turns"] * 10_000)


@pytest.mark.parametrize("text", ["word " * 10_000, "x" * 10**6, "\ud800 \x00\n", ""])
def test_any_text_has_tokens(text):
    ids, mask = Tokenizer(CASES["vocab"])([clean_text(text), "a"], 8)
    assert ids.shape == mask.shape == (2, 8)
    assert ids[0, 0] == 2


def test_a_vocabulary_of_captions(tmp_path):
    captions = ["a red ball rolls", "a blue ball spins", "the red square rolls"] * 3
    vocabulary = make_vocabulary(captions, 80)
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert vocabulary == make_vocabulary(captions, 80)
    assert {"ball", "rolls", "##e"} < set(vocabulary)
    assert make_vocabulary(captions, 9) == vocabulary[:9]
    tokenizer = Tokenizer(vocabulary)
    tokenizer.write(tmp_path / "vocab.txt")
    assert Tokenizer.read(tmp_path).vocabulary == vocabulary
    ids, _ = tokenizer(captions[:3], 12)
    assert (ids != tokenizer.unk_id).all()


def test_a_vocabulary_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(BadVocabulary, match="cannot read the vocabulary"):
        Tokenizer.read(tmp_path / "none.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    with pytest.raises(BadVocabulary, match=r"vocab.txt: the vocabulary lacks \[SEP\]"):
        Tokenizer.read(tmp_path)
    with pytest.raises(BadVocabulary, match="a word twice"):
        Tokenizer([*CASES["vocab"], "a"])
