"""The tiny family's tokenizer: a CLIP tokenizer in every respect but its vocabulary."""

import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from icd_lightning.models.text import build_tokenizer
from icd_lightning.tiny.scenes import vocabulary

LENGTH = 24
CAPTION = "a small red striped circle left of a large blue ring on an orange checkered background"


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer(vocabulary(), LENGTH)


def test_each_word_of_the_world_is_one_token(tokenizer):
    for word in vocabulary():
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert tokenizer.tokenize(CAPTION) == [f"{word}</w>" for word in CAPTION.split()]


def test_it_does_not_matter_how_the_words_come(tokenizer):
    again = build_tokenizer(sorted(vocabulary(), reverse=True) * 2, LENGTH)
    assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    "words", [("ab", "abc", "bc"), ("abab", "ab", "aba"), ("aaaa", "aa", "aaa"), ("abx", "bcx", "zabcy"), ("a", "b")]
)
def test_words_made_of_each_other_stay_whole(words):
    tokenizer = build_tokenizer(words, LENGTH)
    assert [tokenizer.tokenize(word) for word in words] == [[f"{word}</w>"] for word in words]


@pytest.mark.parametrize("word", ["greenish", "turquoise", "ring2", "café", "日本", "on-the", "🙂"])
def test_other_words_survive_in_pieces(tokenizer, word):
    ids = tokenizer(f"a {word} ring").input_ids
    assert len(ids) > 5
    assert ids.count(tokenizer.unk_token_id) == 1  # the end, which CLIP also takes for what it does not know
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == f"a{word}ring"


def test_case_and_spaces_do_not_matter(tokenizer):
    assert tokenizer("  A  SMALL red\nRing ").input_ids == tokenizer("a small red ring").input_ids


def test_prompts_are_framed_cut_and_padded(tokenizer):
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    (empty, short, long) = tokenizer(["", "a ring", "red " * 50], padding="max_length", truncation=True).input_ids
    assert empty == [start] + [end] * (LENGTH - 1)
    assert short[0] == start
    assert short[3:] == [end] * (LENGTH - 3)
    assert (long[0], long[-1], len(long)) == (start, end, LENGTH)
    assert tokenizer.pad_token_id == end


def test_ids_fill_the_embedding_table(tokenizer):
    """From 0 to len - 1, special tokens last; none of them is Stable Diffusion's."""
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert len(tokenizer) < 1000


@pytest.mark.parametrize("loader", [CLIPTokenizer, AutoTokenizer])
def test_it_survives_its_files(tokenizer, tmp_path, loader):
    tokenizer.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    prompts = [CAPTION, "", "a greenish café " * 20]
    options = {"padding": "max_length", "truncation": True}
    assert again(prompts, **options).input_ids == tokenizer(prompts, **options).input_ids
    assert again.model_max_length == LENGTH
    assert again.pad_token_id == tokenizer.pad_token_id
