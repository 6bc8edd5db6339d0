"""What others wrote is taken for text, or what is wrong with it is said; nothing of it controls a terminal."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_lightning.texts import CONTROL, check_prompt, printable, wrong_with

searched = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@searched
@given(st.text(st.one_of(st.characters(), st.sampled_from(sorted(CONTROL)), st.sampled_from("\n\t\u200b猫é"))))
def test_control_characters_and_what_was_no_utf8_are_always_found(text):
    assert bool(wrong_with(text)) == any(char in CONTROL for char in text)
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text


@pytest.mark.parametrize("prompt", ["caf\ufffd", "a\0b", "\x1b[31m", "\udce9", "x" * 10_001])
def test_a_prompt_that_is_no_text_is_refused(prompt):
    with pytest.raises(ValueError, match=r"is it UTF-8\?|has 10,001 characters"):
        check_prompt(prompt)


@pytest.mark.parametrize("prompt", ["", "a cat", "une photo en été", "紅い円", "דג", "👨‍👩‍👧 family", "a\nb\tc"])
def test_prompts_of_every_script_pass(prompt):
    check_prompt(prompt)
