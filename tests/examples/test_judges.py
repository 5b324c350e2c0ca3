"""Judges: exact, a model behind an endpoint, and saved verdicts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from video_ma2mba.errors import ConfigError, FormatError
from video_ma2mba.evaluation.judges import (
    DEFAULT_TEMPLATES,
    Case,
    ExactJudge,
    JudgeError,
    OpenAIJudge,
    ReplayJudge,
    SavedVerdicts,
    Verdict,
    normalized,
    parse_verdict,
)

CASE = Case("q1", "match", "What colour {x}?", "red", "The red.")


@pytest.mark.parametrize(
    ("prediction", "right"), [("red", True), ("The Red!", True), (" red . ", True), ("dark red", False), ("", False)]
)
def test_exact(prediction: str, right: bool) -> None:
    assert ExactJudge().decide(replace(CASE, prediction=prediction)) == Verdict(right, 5.0 * right)


def test_normalized() -> None:
    assert normalized("A man's  hat, THE (old) one") == "man s hat old one"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"pred": "yes", "score": 4}', (True, 4)),
        ("{'pred': 'no', 'score': 1.5}", (False, 1.5)),
        ('Sure! ```json\n{"pred": "Yes", "score": "3"}\n```', (True, 3)),
        ("{'score': 9}", (False, 5)),
        ("{''score': 4.8}", (False, 0)),
        ("I think yes", (False, 0)),
        ("{}", (False, 0)),
        ('{"pred": "yes", "score": null}', (True, 0)),
    ],
)
def test_replies(reply: str, verdict: tuple[bool, float]) -> None:
    found = parse_verdict(reply)
    assert (found.correct, found.score) == verdict
    assert found.raw == reply


class Endpoint(HTTPServer):
    """Replies as told, status and content; the last reply for ever."""

    def __init__(self, *replies: tuple[int, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = list(replies)
        self.requests: list[tuple[dict[str, Any], str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/chat/completions"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((payload, self.headers.get("Authorization")))
        status, content = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def reply(content: str) -> str:
    return json.dumps({"choices": [{"message": {"content": content}}]})


@pytest.fixture
def serve() -> Iterator[Any]:
    running: list[Endpoint] = []

    def start(*replies: tuple[int, str]) -> Endpoint:
        endpoint = Endpoint(*replies)
        threading.Thread(target=endpoint.serve_forever, args=(0.01,), daemon=True).start()
        running.append(endpoint)
        return endpoint

    yield start
    for endpoint in running:
        endpoint.shutdown()
        endpoint.server_close()


def test_endpoint(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    endpoint = serve((200, reply('{"pred": "yes", "score": 5}')))
    judge = OpenAIJudge(endpoint.url, "judge-1", key_variable="JUDGE_KEY")
    assert judge.decide(CASE) == Verdict(True, 5.0, '{"pred": "yes", "score": 5}')
    (payload, key), *_ = endpoint.requests
    assert (payload["model"], payload["temperature"], key) == ("judge-1", 0, "Bearer secret")
    prompt = payload["messages"][0]["content"]
    assert all(text in prompt for text in ("What colour {x}?", "Correct answer: red", "Predicted answer: The red."))


def test_every_aspect_has_its_prompt(serve: Any) -> None:
    endpoint = serve((200, reply('{"score": 2}')))
    judge = OpenAIJudge(endpoint.url, "judge-1", key_variable="NO_SUCH_KEY")
    for aspect in DEFAULT_TEMPLATES:
        case = replace(CASE, aspect=aspect, second_question="Otherwise?", second_prediction="blue")
        assert judge.decide(case).score == 2
    prompts = [payload["messages"][0]["content"] for payload, _ in endpoint.requests]
    assert len(set(prompts)) == 6
    assert [("Otherwise?" in prompt, "blue" in prompt) for prompt in prompts] == [(False, False)] * 5 + [(True, True)]
    assert endpoint.requests[0][1] is None


def test_repeated_until_there_is_a_reply(serve: Any) -> None:
    endpoint = serve((503, ""), (429, ""), (200, "no json"), (200, reply('{"pred": "yes", "score": 3}')))
    assert OpenAIJudge(endpoint.url, "m", wait=0).decide(CASE).score == 3
    assert len(endpoint.requests) == 4


def test_no_reply(serve: Any) -> None:
    endpoint = serve((500, ""))
    with pytest.raises(JudgeError, match="no verdict in 3 attempts"):
        OpenAIJudge(endpoint.url, "m", wait=0, retries=2).decide(CASE)
    refused = serve((401, ""))
    with pytest.raises(JudgeError, match="refused to judge"):
        OpenAIJudge(refused.url, "m", wait=0).decide(CASE)
    assert len(refused.requests) == 1


def test_names_tell_prompts_apart() -> None:
    plain = OpenAIJudge("http://x", "m")
    other = OpenAIJudge("http://x", "m", templates={**DEFAULT_TEMPLATES, "match": "{question}"})
    assert plain.name == "m"
    assert other.name.startswith("m (prompts ")
    with pytest.raises(ConfigError, match="templates lack consistency"):
        OpenAIJudge("http://x", "m", templates={"match": ""})


class Counting:
    """Decides by turns, and counts how often it is asked."""

    name = "counting"

    def __init__(self) -> None:
        self.asked = 0

    def decide(self, case: Case) -> Verdict:
        self.asked += 1
        return Verdict(True, float(self.asked), "because")


def test_saved_verdicts_are_replayed(tmp_path: Path) -> None:
    path, judge = tmp_path / "verdicts.jsonl", Counting()
    saved = SavedVerdicts(judge, path)
    first = saved.decide(CASE)
    assert saved.decide(CASE) == first
    assert SavedVerdicts(judge, path).decide(CASE) == first
    assert judge.asked == 1
    replayed = ReplayJudge(path)
    assert replayed.name == "counting (replayed)"
    assert replayed.decide(CASE) == first
    with pytest.raises(JudgeError, match="no saved verdict on match of q2"):
        replayed.decide(replace(CASE, key="q2"))
    changed = replace(CASE, prediction="blue")
    with pytest.raises(JudgeError, match="is on another answer"):
        replayed.decide(changed)
    assert SavedVerdicts(judge, path).decide(changed).score == 2


def test_verdicts_of_judges_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    SavedVerdicts(Counting(), path).decide(CASE)
    with pytest.raises(ConfigError, match=r"holds verdicts of \['counting'\], but the judge is exact"):
        SavedVerdicts(ExactJudge(), path)
    path.write_text('{"key": 1}\n')
    with pytest.raises(FormatError, match="line 1 is not a verdict"):
        ReplayJudge(path)
    with pytest.raises(FormatError, match="does not exist"):
        ReplayJudge(tmp_path / "none")
