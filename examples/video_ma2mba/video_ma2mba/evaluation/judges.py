"""Who decides whether an open answer is right. A judge's name is part of every result: figures of different judges must
not be compared.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import string
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from video_ma2mba.errors import ConfigError, FormatError, VideoMa2mbaError
from video_ma2mba.evaluation.jsonl import append_line, read_lines


class JudgeError(VideoMa2mbaError, RuntimeError):
    """A judge could not be asked."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a judge is to decide.

    Attributes:
        key: names the case.
        aspect: what is judged: "match" (is it right?), or one of VideoChatGPT's five.
        question, reference, prediction: asked, right, answered.
        second_question, second_prediction: the other way of asking, for "consistency".
    """

    key: str
    aspect: str
    question: str
    reference: str
    prediction: str
    second_question: str = ""
    second_prediction: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's decision.

    Attributes:
        correct: yes or no.
        score: 0 to 5.
        raw: the judge's own words.
    """

    correct: bool
    score: float
    raw: str = ""


class Judge(Protocol):
    """Decides cases."""

    @property
    def name(self) -> str:
        """As results call it."""
        ...

    def decide(self, case: Case) -> Verdict:
        """The verdict on a case."""
        ...


class ExactJudge:
    """Right is what equals the reference, regardless of case, punctuation and articles; scores are 0 or 5."""

    name = "exact"

    def decide(self, case: Case) -> Verdict:
        """See `Judge`."""
        right = normalized(case.prediction) == normalized(case.reference)
        if case.aspect == "consistency":
            right = right and normalized(case.second_prediction) == normalized(case.reference)
        return Verdict(right, 5.0 * right)


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalized(text: str) -> str:
    """Lower case without punctuation and articles, words one space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


class ReplayJudge:
    """Verdicts that were saved before, as `SavedVerdicts` writes them.

    Args:
        path: JSON lines with key, aspect, correct, score, raw and judge.

    Raises:
        FormatError: the file is missing or malformed, or has verdicts of more than one judge.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        if not Path(path).is_file():
            raise FormatError(f"{path} does not exist; give a file of saved verdicts")
        self._verdicts, names = _read_verdicts(Path(path))
        if len(names) != 1:
            raise FormatError(f"{path} must hold the verdicts of one judge, got those of {sorted(names) or 'none'}")
        self.name = f"{names.pop()} (replayed)"

    def decide(self, case: Case) -> Verdict:
        """See `Judge`.

        Raises:
            JudgeError: there is no verdict for the case, or the saved one is on another answer.
        """
        found = self._verdicts.get((case.key, case.aspect))
        if found is None:
            raise JudgeError(f"there is no saved verdict on {case.aspect} of {case.key}; let a judge decide it first")
        verdict, digest = found
        if digest != digest_of(case):
            raise JudgeError(f"the saved verdict on {case.aspect} of {case.key} is on another answer; judge it again")
        return verdict


_FOCUS = {
    "match": "whether the predicted answer means the same as the correct answer; synonyms and paraphrases count as equal",
    "correctness": "factual accuracy: the prediction must be consistent with the correct answer and contain nothing wrong",
    "detail": "detail: the prediction must cover all major points of the correct answer, specifically and not generically",
    "context": "context: the prediction must fit the main themes and sentiment of what the correct answer describes",
    "temporal": "temporal order: the prediction must give events in the order in which the correct answer gives them",
    "consistency": "consistency: both predictions must agree with the correct answer and not contradict each other",
}
DEFAULT_TEMPLATES: dict[str, str] = {
    aspect: (
        f"You grade answers to questions about a video. Judge {focus}.\n\nQuestion: {{question}}\n"
        + ("Question, asked otherwise: {second_question}\n" if aspect == "consistency" else "")
        + "Correct answer: {reference}\nPredicted answer: {prediction}\n"
        + ("Predicted answer to the other question: {second_prediction}\n" if aspect == "consistency" else "")
        + "\nReply with nothing but a JSON object such as "
        + (
            '{{"pred": "yes", "score": 4}}, where pred is yes or no and '
            if aspect == "match"
            else '{{"score": 4}}, where '
        )
        + "score is an integer from 0 to 5, 5 being best."
    )
    for aspect, focus in _FOCUS.items()
}
"""Prompts by aspect, in this package's own words. Published figures were made with the benchmarks' own prompts: give those
(`templates`) to compare with them."""


@dataclass
class OpenAIJudge:
    """A model behind an OpenAI-compatible endpoint, remote or local.

    Attributes:
        url: of the chat completions, e.g. "http://localhost:8000/v1/chat/completions".
        model: asked for by this name.
        key_variable: environment variable with the key; a local server may need none.
        templates: prompts by aspect with {question}, {reference}, {prediction}, {second_question}, {second_prediction}.
        retries: attempts after the first.
        wait: seconds before the first repetition; doubled each time.
        timeout: seconds for a reply.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    templates: Mapping[str, str] = field(default_factory=lambda: DEFAULT_TEMPLATES)
    retries: int = 5
    wait: float = 2.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if missing := set(_FOCUS) - set(self.templates):
            raise ConfigError(f"the judge's templates lack {', '.join(sorted(missing))}")

    @property
    def name(self) -> str:
        """The model, and a digest of the prompts where they are not the default."""
        if self.templates == DEFAULT_TEMPLATES:
            return self.model
        digest = hashlib.sha256(json.dumps(dict(self.templates), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.model} (prompts {digest})"

    def decide(self, case: Case) -> Verdict:
        """See `Judge`.

        Raises:
            JudgeError: no reply after all attempts.
        """
        prompt = self.templates[case.aspect].format(
            question=case.question,
            reference=case.reference,
            prediction=case.prediction,
            second_question=case.second_question,
            second_prediction=case.second_prediction,
        )
        payload = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 64,
        }
        return parse_verdict(self._ask(payload))

    def _ask(self, payload: Mapping[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(payload).encode(), headers)
        wait, reason = self.wait, ""
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):
                    raise JudgeError(f"{self.url} refused to judge ({reason})") from error
            except (OSError, ValueError, LookupError, TypeError) as error:
                reason = repr(error)
            if attempt < self.retries:
                time.sleep(wait)
                wait *= 2
        raise JudgeError(f"{self.url} gave no verdict in {self.retries + 1} attempts ({reason}); go on later")


def parse_verdict(reply: str) -> Verdict:
    """Read `{"pred": "yes", "score": 4}` out of a reply; what cannot be read is a no with score 0, as in lmms-eval."""
    match = re.search(r"\{.*\}", reply, re.DOTALL)
    found: Any = None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(match[0]) if match else None
            break
        except (ValueError, SyntaxError):
            continue
    if not isinstance(found, dict):
        return Verdict(False, 0.0, reply)
    try:
        score = min(5.0, max(0.0, float(found.get("score", 0))))
    except (TypeError, ValueError):
        score = 0.0
    return Verdict(str(found.get("pred", "no")).strip().lower() == "yes", score, reply)


class SavedVerdicts:
    """A judge that is asked once for each case: verdicts are appended to a file and read from it.

    Args:
        judge: who decides.
        path: JSON lines.
    """

    def __init__(self, judge: Judge, path: str | PathLike[str]) -> None:
        self.name = judge.name
        self._judge, self._path = judge, Path(path)
        self._verdicts, names = _read_verdicts(self._path)
        if names - {judge.name}:
            raise ConfigError(
                f"{path} holds verdicts of {sorted(names)}, but the judge is {judge.name}; use another folder"
            )

    def decide(self, case: Case) -> Verdict:
        """See `Judge`."""
        found = self._verdicts.get((case.key, case.aspect))
        if found is not None and found[1] == digest_of(case):
            return found[0]
        verdict, digest = self._judge.decide(case), digest_of(case)
        self._verdicts[case.key, case.aspect] = verdict, digest
        line = {"key": case.key, "aspect": case.aspect, "correct": verdict.correct, "score": verdict.score}
        append_line(self._path, {**line, "raw": verdict.raw, "judge": self.name, "case": digest})
        return verdict


def digest_of(case: Case) -> str:
    """Tells whether a verdict is on the same answer."""
    parts = (case.question, case.reference, case.prediction, case.second_question, case.second_prediction)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _read_verdicts(path: Path) -> tuple[dict[tuple[str, str], tuple[Verdict, str]], set[str]]:
    verdicts: dict[tuple[str, str], tuple[Verdict, str]] = {}
    names: set[str] = set()
    for number, line in enumerate(read_lines(path), 1):
        try:
            verdict = Verdict(bool(line["correct"]), float(line["score"]), str(line["raw"]))
            verdicts[line["key"], line["aspect"]] = verdict, str(line["case"])
            names.add(str(line["judge"]))
        except (ValueError, LookupError, TypeError) as error:
            raise FormatError(f"{path}: line {number} is not a verdict ({error!r})") from error
    return verdicts, names
