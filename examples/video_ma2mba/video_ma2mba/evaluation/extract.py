"""Letters out of answers, by the rules of lmms-eval (in words here; its tests are this package's test cases)."""

from __future__ import annotations

import random
import re

_OPENINGS = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)


def first_letter(response: str, letters: str) -> str:
    """The first capital that is an option's letter, after usual opening words are taken away; "" if there is none.

    Video-MME's and LongVideoBench's rule. (lmms-eval's list for Video-MME runs two pairs of openings together, so that it
    reads "Best answer: A" as B; here they are apart, as in its list for LongVideoBench.)
    """
    for opening in _OPENINGS:
        response = response.replace(opening, "")
    found = re.search(f"[{letters}]", response)
    return found[0] if found else ""


def first_letter_or_guess(response: str, letters: str, options: int, seed: str) -> str:
    """`first_letter`, or a guess among the options where there is none: LongVideoBench's rule.

    Args:
        response: the answer.
        letters: that are looked for.
        options: how many there are to guess from.
        seed: the guess of a question is always the same; lmms-eval's is not.
    """
    return first_letter(response, letters) or letters[random.Random(seed).randrange(options)]


_LETTER_DOT = re.compile(r"^([A-E])\.\s*(.+)$", re.IGNORECASE)
_PUNCTUATION = ';/[]"{}()=+\\_->' + "<@`,?!"


def standalone_letter(response: str) -> str:
    """The letter an answer begins with ("B. red"), else the first letter A to E that stands alone, small or capital; else
    the cleaned text: MVBench's rule.
    """
    if found := _LETTER_DOT.match(response.strip()):
        return found[1].upper()
    text = response.replace("\n", " ").replace("\t", " ").strip()
    digits_apart = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        # A mark beside a space goes; one between words parts them.
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or digits_apart else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned).strip("'").strip('"').strip(")").strip("(").strip().lower()
    found = re.search(r"\b[a-e]\b", cleaned)
    return found[0].upper() if found else cleaned
