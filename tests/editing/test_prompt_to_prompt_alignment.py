import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_case import SHIPPED, load_json, load_tensors
from transformers import CLIPTokenizer

from icd_lightning.editing.baselines.base import PIE_CONTROL
from icd_lightning.editing.limits import PromptToPrompt
from icd_lightning.editing.prompt_to_prompt.alignment import (
    Pair,
    PromptTokens,
    align,
    changed_words,
    common_subsequence,
    refinement,
    replacement,
    stop_words,
)

CASES = load_json("p2p.json")["cases"]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")


@pytest.fixture(scope="module")
def other_tokenizer(random_family: Path) -> CLIPTokenizer:
    """With other special tokens, and room for fewer."""
    return CLIPTokenizer.from_pretrained(random_family / "tokenizer")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_alignments_are_those_of_the_reference(tokenizer, case):
    golden = load_tensors("p2p.safetensors")
    name = case["name"]
    source, target = (PromptTokens.read(prompt, tokenizer) for prompt in case["prompts"])
    for tokens, ids in zip((source, target), golden[f"{name}.input_ids"].tolist(), strict=True):
        assert list(tokens.ids) == ids[: len(tokens.ids)]
    found, expected = align(source, target, 77), golden[f"{name}.mapper"][0]
    if case["replace"]:
        assert torch.equal(found.mapper, expected)
        assert found.aligned.all()
    else:  # the source's token for each of the target's, or -1
        assert torch.equal(found.aligned, golden[f"{name}.alphas"][0])
        assert torch.equal(found.mapper.sum(0), found.aligned)
        assert torch.equal(found.mapper.argmax(0)[found.aligned == 1], expected[found.aligned == 1])


def test_every_token_but_the_special_ones_belongs_to_one_word(tokenizer, other_tokenizer):
    for of_family in (tokenizer, other_tokenizer):
        tokens = PromptTokens.read("  a corgi,  with a\tRED cap: (lego)", of_family)
        assert tokens.words == ("a", "corgi,", "with", "a", "RED", "cap:", "(lego)")
        assert list(itertools.chain(*tokens.places)) == list(range(1, len(tokens.ids) - 1))
        assert tokens.ids[0] == of_family.bos_token_id
        assert tokens.ids[-1] == of_family.eos_token_id


def test_words_are_found_whole_wherever_they_occur(tokenizer):
    tokens = PromptTokens.read("a dog and a corgi, a dog", tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(list(tokens.ids))
    assert [pieces[i] for i in tokens.places_of("dog")] == ["dog</w>", "dog</w>"]
    assert [pieces[i] for i in tokens.places_of("Corgi")] == ["cor", "gi</w>", ",</w>"] or "," not in pieces
    assert tokens.places_of("corgi dog") == tokens.places_of("corgi") + tokens.places_of("dog")
    assert tokens.places_of("") == []
    with pytest.raises(ValueError, match="'do' is no word of the prompt 'a dog and a corgi, a dog'"):
        tokens.places_of("do")


def test_a_prompt_that_is_too_long_says_what_is_cut(other_tokenizer):
    fits = "a red circle on a blue " + "background " * 16
    assert len(PromptTokens.read(fits, other_tokenizer).ids) == 24
    with pytest.raises(ValueError, match=r"longer than the 24 tokens .* 'plain ring' would be cut"):
        PromptTokens.read(fits + "plain ring", other_tokenizer)


@pytest.mark.parametrize("kind", ["replace", "refine"])
def test_a_prompt_is_aligned_with_itself_token_by_token(tokenizer, kind):
    tokens = PromptTokens.read("a corgi with a graduation cap", tokenizer)
    found = align(tokens, tokens, 77, kind)
    assert torch.equal(found.mapper, torch.eye(77))
    assert found.aligned.all()


def test_words_of_different_lengths_share_their_attention(tokenizer):
    short, long = (PromptTokens.read(f"a {word} on a bench", tokenizer) for word in ("dog", "graduation"))
    (dog,), (graduation,) = (tokens.places[1:2] for tokens in (short, long))
    assert len(dog) == 1 < len(graduation)
    longer = replacement(short, long, 77).mapper
    assert longer[dog[0], list(graduation)].tolist() == pytest.approx([1 / len(graduation)] * len(graduation))
    shorter = replacement(long, short, 77).mapper
    assert shorter[list(graduation), dog[0]].tolist() == [1] * len(graduation)
    between = align(
        PromptTokens.read("a corgi on a dog", tokenizer), PromptTokens.read("a dog on a cat", tokenizer), 77
    ).mapper
    assert between[4, 3] == between[5, 4] == 1  # "on a" before the last new word: shifted by corgi's second token


def test_words_are_replaced_by_as_many(tokenizer):
    source, target = (PromptTokens.read(prompt, tokenizer) for prompt in ("a cat", "a big cat"))
    with pytest.raises(ValueError, match=r"'a cat' has 2 words and 'a big cat' 3.*choose the alignment refine"):
        align(source, target, 77, "replace")
    automatic, refined = align(source, target, 77), refinement(source, target, 77)
    assert torch.equal(automatic.mapper, refined.mapper)
    assert torch.equal(automatic.aligned, refined.aligned)


def longest_by_trying_all(a: list[int], b: list[int]) -> int:
    return max(
        size
        for size in range(min(len(a), len(b)) + 1)
        if set(itertools.combinations(a, size)) & set(itertools.combinations(b, size))
    )


def test_the_common_subsequence_is_one_and_the_longest():
    draw = random.Random(0)
    for _ in range(100):
        a, b = ([draw.randrange(3) for _ in range(draw.randrange(7))] for _ in range(2))
        matches = common_subsequence(a, b)
        pairs = [(i, j) for j, i in enumerate(matches) if i is not None]
        assert all(a[i] == b[j] for i, j in pairs)
        assert pairs == sorted(pairs)
        assert len({i for i, _ in pairs}) == len(pairs) == longest_by_trying_all(a, b)


@pytest.mark.parametrize(
    ("source", "target", "gone", "new"),
    [
        ("a red cat on the bench", "a red dog on the bench", ["cat"], ["dog"]),
        ("a photo of a bird", "a photo of a lego bird", [], ["lego"]),
        ("a cat with a cap", "a cat", ["with", "cap"], []),
        ("the cat", "a dog", ["cat"], ["dog"]),
        ("a cat and a dog", "a cat and a cat", ["dog"], ["cat"]),
        ("a cat", "a cat", [], []),
    ],
)
def test_changed_words_are_those_that_differ_but_for_articles(tokenizer, source, target, gone, new):
    prompts = [PromptTokens.read(prompt, tokenizer) for prompt in (source, target)]
    found = [
        tokenizer.decode([tokens.ids[i] for i in places]).split()
        for tokens, places in zip(prompts, changed_words(*prompts), strict=True)
    ]
    assert found == [gone, new]


@pytest.mark.parametrize(
    ("source", "target", "amplified"),
    [
        ("a cat on a bench", "a lego cat under the bench", "lego"),  # under, the: stop words
        ("a cat and a dog", "a dog and a cat", ""),  # in another order, yet there
        ("a cat, asleep", "a cat asleep", "cat"),  # spelling counts, and so punctuation
        ("a cat", "Under A cat", "under a"),  # stop words are lower case
        ("a cat", "a red cat red", "red red"),
    ],
)
def test_words_are_amplified_as_in_the_reference_s_script(tokenizer, source, target, amplified):
    pair = Pair(*(PromptTokens.read(prompt, tokenizer) for prompt in (source, target)), PromptToPrompt(amplify=3.0))
    factors = pair.factors(77)
    assert set(factors.tolist()) <= {1.0, 3.0}
    assert (
        tokenizer.decode([pair.target.ids[i] for i in (factors == 3).nonzero().flatten()]).split() == amplified.split()
    )


@pytest.mark.parametrize(
    ("blend", "amplified"), [(("bench", "bench"), "bench"), (False, ""), (True, "dog"), (("cat", "a"), "a a")]
)
def test_pie_bench_amplifies_the_word_that_its_blend_looks_at(tokenizer, blend, amplified):
    settings = replace(PIE_CONTROL, blend=blend)
    prompts = (PromptTokens.read(prompt, tokenizer) for prompt in ("a cat on a bench", "a dog on a bench"))
    pair = Pair(*prompts, settings)
    factors = pair.factors(77)
    assert set(factors.tolist()) <= {1.0, 2.0}
    assert (
        tokenizer.decode([pair.target.ids[i] for i in (factors == 2).nonzero().flatten()]).split() == amplified.split()
    )


def test_stop_words_are_nltk_s():
    assert len(stop_words()) == 179
    assert {"i", "above", "don't", "wouldn't"} < stop_words()
    assert not {"cat", "red", "large"} & stop_words()
