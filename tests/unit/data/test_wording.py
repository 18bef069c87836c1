"""What makes another prompt: letters, digits and symbols of every script, and nothing that a reader would not see."""

import hashlib
import random
import unicodedata

import pytest

from pipeline.data import wording
from pipeline.data.overlap import normalise

SAME = [
    ("What is 7+3?", "what is 7 + 3"),
    ("How do we, please, open it?!", "how do we please open it"),
    ("“How do I open it ?”", "How do I open it"),
    ("don’t do ‘it’", "don't do 'it'"),
    ("don´t", "don't"),
    ("5 − 3 – 1", "5 - 3 - 1"),
    ("Ｃ＋＋　１２？", "c++ 12"),
    ("用 Python 写，好吗？", "用Python写,好吗"),
    ("你好 世界。", "你好世界"),
    ("「你好」", "你好"),
    ("كيف حالك؟", "كيف حالك"),
    ("क्या है।", "क्या है"),
    ("नमस्ते, दुनिया", "नमस्ते दुनिया"),
    ("¿Cómo estás?", "cómo estás"),
    ("Comment ça va ?", "comment ça va"),
    ("Τι κάνεις;", "ΤΙ ΚΆΝΕΙΣ"),
    ("STRASSE", "Straße"),
    ("Hello , world", "hello world"),
    ("I ❤️ it", "i ❤ it"),
    ("a\u00adb\u200bc\ufeff", "abc"),
    ("one\n\n\ttwo ", "one two"),
    ("cafe\u0301", "café"),
    ("Well…", "well..."),
]
DIFFERENT = [
    (
        "7 + 3",
        "7 - 3",
        "7 * 3",
        "7 / 3",
        "7 × 3",
        "7 ÷ 3",
        "7 = 3",
        "7 % 3",
        "7 ^ 3",
        "7 & 3",
        "7 | 3",
        "7 ~ 3",
        "7 3",
        "73",
    ),
    ("a < b", "a > b", "a ≤ b", "a <= b", "a == b", "a != b"),
    ("C", "C++", "C#", ".C", "@C", "$C", "C!x"),
    ("x_1", "x1", "x 1", "x-1", "x.1"),
    ("What is -7", "What is 7", "What is +7"),
    ("1.5", "1,5", "15", "1 5", "1:5", "1/5"),
    ("1, 2", "12", "1 2"),
    ("10²", "102", "10₂"),
    ("1½", "11/2", "1 1/2"),
    ("f(a, b)", "f(a b)", "f[a, b]"),
    ("5%", "5", "5€", "5$", "5°"),
    ("don't", "dont"),
    ("feel 😀", "feel 😢", "feel"),
    ("👍", "👎", "👍🏽", "?", "!", "..."),
    ("👨‍👩‍👧", "👨👩👧"),
    ("🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🏴󠁧󠁢󠁳󠁣󠁴󠁿"),
    ("कि", "की", "क", "कु"),
    ("عَلِمَ", "عُلِمَ", "علم"),
    ("ไก่", "ไข่", "ไก"),
    ("か", "が", "カ"),
    ("é", "e", "è"),
    ("你", "妳", "你们"),
    ("שלום", "שלומ"),
    ("'a' or 'b'", "a or b"),
    ("٣", "٤"),
    ("a b", "ab"),
]
PAIRS = [
    (one, other)
    for group in DIFFERENT
    for number, one in enumerate(group)
    for other in group[number + 1 :]
]


@pytest.mark.parametrize("one, other", SAME, ids=ascii)
def test_what_no_reader_counts_as_another_prompt_is_the_same(one, other):
    assert normalise(one) == normalise(other) and wording.wording(one) == wording.wording(other)


@pytest.mark.parametrize("one, other", PAIRS, ids=ascii)
def test_symbols_digits_marks_and_letters_of_every_script_count(one, other):
    assert normalise(one) != normalise(other)
    assert normalise(f"Does {one} work?") != normalise(f"does {other} work?")


def test_every_letter_mark_digit_and_symbol_is_kept():
    """A sample of all there are, between two letters."""
    kept = ("Lo", "Mn", "Mc", "Nd", "Nl", "Sm", "Sc", "So")
    for code in random.Random(0).sample(range(0x21, 0x30000), 20_000):
        char = chr(code)
        if (
            unicodedata.category(char) in kept
            and unicodedata.normalize("NFKC", char) == char.casefold() == char
        ):
            assert normalise(f"a{char}b") == unicodedata.normalize("NFKC", f"a{char}b"), hex(code)


@pytest.mark.parametrize("prompt", ["?", "!?", "...", "”", "👍", "-", "¿", "''"])
def test_a_prompt_of_signs_alone_is_what_it_is(prompt):
    assert normalise(prompt)


def test_white_space_alone_is_nothing_and_a_digest_is_of_what_is_compared(monkeypatch):
    assert normalise(" \n\u3000\u200b") == ""
    monkeypatch.setattr(wording, "_KNOWN_AT_MOST", 2)
    for prompt in ("One?", "two", "Three", "one", "\ud800"):
        assert (
            wording.wording(prompt)
            == hashlib.sha256(normalise(prompt).encode("utf-8", "surrogatepass")).digest()
        )
