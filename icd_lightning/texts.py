"""What others wrote: captions, prompts, names. The standard library only, since everything may need it."""

from __future__ import annotations

CONTROL = {chr(code) for code in (*range(32), *range(127, 160), *range(0xD800, 0xE000), 0xFFFD)} - set("\t\n\r")
"""What no text has that is UTF-8 and for people to read; U+FFFD stands for what was not UTF-8."""
MOST_CHARACTERS = 10_000  # of a caption or prompt, of which encoders see some 400 at most


def wrong_with(text: str) -> str:
    """What no caption does, such as to hold control characters; nothing of one that is well."""
    if (not text.isprintable() or "\ufffd" in text) and (odd := set(text) & CONTROL):
        return f"holds {min(odd)!r}; is it UTF-8?"
    return f"has {len(text):,} characters" if len(text) > MOST_CHARACTERS else ""


def check_prompt(prompt: str) -> None:
    """ValueError for what is no text to be read; what a shell gives need not be UTF-8."""
    if wrong := wrong_with(prompt):
        raise ValueError(f"prompt {prompt[:80]!r} {wrong}")


def printable(text: str) -> str:
    """Text from a file as a terminal may be given it: what would control the terminal is written out."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
