"""The refiner "openai" against a server of our own: replies, failures, the key, resuming."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import KEY, ChatServer, chat_server, failed, prompt_of, said
from forks import this_package

from craftune import refiners
from craftune.config import ChatConfig, RefineConfig
from craftune.errors import UserError
from craftune.records import Prompt, Refined, prompt_id, read_rows, write_rows
from craftune.refiners import endpoint
from craftune.stages.refine import refine

TEXTS = [f"thing number {i}" for i in range(6)]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def config(server: ChatServer, **chat: Any) -> RefineConfig:
    settings = {"model": "qwen-plus", "base_url": server.url, "key_env": "TEST_KEY", "retries": 2}
    return RefineConfig(by="openai", variants=2, chat=ChatConfig(**{**settings, **chat}))


def run(folder: Path, settings: RefineConfig, texts: list[str] = TEXTS) -> tuple[dict, list]:
    folder.mkdir(exist_ok=True)
    write_rows(folder / "prompts.jsonl", [Prompt(prompt_id(text), text) for text in texts])
    counts = refine(settings, 0, folder / "prompts.jsonl", folder)
    return counts, read_rows(Refined, folder / "refined.jsonl")


def two(body: dict[str, Any], number: int = 0) -> tuple[int, dict[str, str], Any]:
    return said(f"{prompt_of(body)}, by day\n{prompt_of(body)}, by night")


def complaint(folder: Path, settings: RefineConfig) -> str:
    with pytest.raises(UserError) as caught:
        run(folder, settings)
    text = str(caught.value)
    assert "\n" not in text
    assert KEY not in text
    return text


def test_every_prompt_is_one_request_and_its_cost_is_counted(tmp_path: Path) -> None:
    with chat_server(two) as server:
        counts, rows = run(tmp_path, config(server, temperature=0.5))
    assert [row.refined for row in rows[:2]] == [f"{TEXTS[0]}, by day", f"{TEXTS[0]}, by night"]
    assert {row.by for row in rows} == {"openai:qwen-plus"}
    assert [(row.prompt_id, row.variant) for row in rows] == [
        (prompt_id(text), j) for text in TEXTS for j in (1, 2)
    ]
    assert counts["requests"] == 6
    assert (counts["tokens in"], counts["tokens out"]) == (600, 120)
    assert counts["prompts with fewer rewrites"] == 0
    assert server.keys == {f"Bearer {KEY}"}
    body = server.asked[0]
    assert (body["model"], body["temperature"]) == ("qwen-plus", 0.5)
    assert len({body["seed"] for body in server.asked}) == 6


def test_requests_run_at_once_but_not_more_than_told(tmp_path: Path) -> None:
    barrier = threading.Barrier(3, timeout=10)

    def speak(body: dict[str, Any], number: int) -> Any:
        barrier.wait()
        return two(body)

    with chat_server(speak) as server:
        run(tmp_path, config(server, batch_size=3, retries=0))
    assert server.most_at_once == 3


def test_a_reply_that_was_cut_loses_its_last_line(tmp_path: Path) -> None:
    def speak(body: dict[str, Any], number: int) -> Any:
        return said(f"{prompt_of(body)}, by day\n{prompt_of(body)}, by ni", "length")

    with chat_server(speak) as server:
        counts, rows = run(tmp_path, config(server), TEXTS[:1])
    assert [row.refined for row in rows] == [f"{TEXTS[0]}, by day"]
    assert counts["rejected: cut off"] == 3  # once in every attempt


def test_passing_failures_are_repeated(tmp_path: Path) -> None:
    """500, then 429 with Retry-After, then the answer; for each prompt."""
    seen: dict[str, int] = {}

    def speak(body: dict[str, Any], number: int) -> Any:
        k = seen[prompt_of(body)] = seen.get(prompt_of(body), 0) + 1
        return {1: failed(500, "oh"), 2: failed(429, "slow", Retry_After="0.01")}.get(k) or two(
            body
        )

    with chat_server(speak) as server:
        counts, _ = run(tmp_path, config(server))
    assert set(seen.values()) == {3}
    assert counts["refined"] == 12
    assert counts["requests"] == 6


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (failed(401, f"wrong key {KEY}"), ["TEST_KEY", "401"]),
        (failed(403, "no"), ["TEST_KEY", "403", "'qwen-plus'"]),
        (failed(404, "no model"), ["404", "refine.chat.model"]),
        (failed(429, "no credit"), ["429", "after 1 retries", "refine.chat.batch_size"]),
        (failed(500, "broken"), ["(500)", "after 1 retries"]),
        (failed(400, f"seed not known {KEY}"), ["seed not known ***"]),
        ((200, {}, f"<html>{KEY}</html>"), ["no chat completion", "/v1", "<html>***"]),
        ((200, {"Content-Type": "application/json"}, "{nonsense"), ["no chat completion"]),
        ((200, {}, {"choices": []}), ["no chat completion"]),
        ((200, {}, {"choices": [{"index": 0}]}), ["no chat completion"]),
        ((200, {}, [1, 2]), ["no chat completion"]),
    ],
)
def test_a_lasting_failure_is_one_line_that_says_what_to_do(
    tmp_path: Path, answer: Any, words: list[str]
) -> None:
    with chat_server(lambda body, number: answer) as server:
        text = complaint(tmp_path, config(server, retries=1))
    for word in [*words, "finished prompts are kept"]:
        assert word in text
    assert server.url in text


def test_an_endpoint_that_does_not_answer(tmp_path: Path) -> None:
    release = threading.Event()

    def speak(body: dict[str, Any], number: int) -> Any:
        release.wait(20)
        return two(body)

    with chat_server(speak) as server:
        text = complaint(tmp_path, config(server, timeout=0.1, retries=1))
        release.set()
    assert "no answer within 0.1 s after 1 retries; raise refine.chat.timeout" in text


def test_nobody_there(tmp_path: Path) -> None:
    with chat_server(two) as server:
        pass
    assert "cannot be reached after 0 retries" in complaint(tmp_path, config(server, retries=0))


def test_a_failure_keeps_what_is_finished_and_under_way(tmp_path: Path) -> None:
    broken = True

    def speak(body: dict[str, Any], number: int) -> Any:
        return failed(401, "spent") if broken and prompt_of(body) == TEXTS[3] else two(body)

    with chat_server(speak) as server:
        complaint(tmp_path, config(server, batch_size=1))
        assert [prompt_of(body) for body in server.asked] == TEXTS[:4]
        broken = False
        counts, rows = run(tmp_path, config(server, batch_size=1))
        assert [prompt_of(body) for body in server.asked[4:]] == TEXTS[3:]
    assert counts["requests"] == 6
    assert len(rows) == 12


def test_what_is_under_way_when_one_fails_is_kept(tmp_path: Path) -> None:
    """The first fails at once; the second, asked with it, answers a little later."""
    failed_one, asked_both = threading.Event(), threading.Barrier(2, timeout=10)

    def speak(body: dict[str, Any], number: int) -> Any:
        if number > 2:
            return two(body)
        asked_both.wait()
        if prompt_of(body) == TEXTS[0]:
            failed_one.set()
            return failed(401, "spent")
        failed_one.wait(10)
        time.sleep(0.2)
        return two(body)

    with chat_server(speak) as server:
        complaint(tmp_path, config(server, batch_size=2, retries=0))
        assert len(server.asked) == 2
        counts, rows = run(tmp_path, config(server, batch_size=2, retries=0))
        assert TEXTS[1] not in [prompt_of(body) for body in server.asked[2:]]
    assert counts["requests"] == 6
    assert len(rows) == 12


KILLED = """
import sys
from pathlib import Path
from craftune.config import ChatConfig, RefineConfig
from craftune.stages.refine import refine
folder = Path(sys.argv[2])
chat = ChatConfig(
    model="qwen-plus", base_url=sys.argv[1], key_env="TEST_KEY", retries=2, batch_size=1
)
refine(RefineConfig(by="openai", variants=2, chat=chat), 0, folder / "prompts.jsonl", folder)
"""


def test_kill_9_loses_only_the_request_under_way(tmp_path: Path) -> None:
    fourth, release = threading.Event(), threading.Event()

    def speak(body: dict[str, Any], number: int) -> Any:
        if number == 4:
            fourth.set()
            release.wait(60)
        return two(body)

    write_rows(tmp_path / "prompts.jsonl", [Prompt(prompt_id(text), text) for text in TEXTS])
    with chat_server(speak) as server:
        command = [sys.executable, "-c", KILLED, server.url, str(tmp_path)]
        process = subprocess.Popen(command, env=this_package() | {"TEST_KEY": KEY})
        assert fourth.wait(60)
        process.kill()
        process.wait()
        release.set()
        with (tmp_path / "answers.jsonl").open("a") as file:
            file.write('{"prompt_id": "half a li')  # as a power cut leaves it
        counts, rows = run(tmp_path, config(server, batch_size=1))
        assert [prompt_of(body) for body in server.asked[4:]] == TEXTS[3:]
    assert counts["refined"] == len(rows) == 12
    assert counts["requests"] == 6


def test_other_settings_make_all_anew(tmp_path: Path) -> None:
    with chat_server(two) as server:
        run(tmp_path, config(server))
        run(tmp_path, config(server))
        assert len(server.asked) == 6
        run(tmp_path, config(server, temperature=0.3))
        assert len(server.asked) == 12


def test_bad_replies_are_asked_again_then_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak(body: dict[str, Any], number: int) -> Any:
        text = prompt_of(body)
        bad = {
            TEXTS[0]: said("I'm sorry, I can't help with that."),
            TEXTS[1]: said(f"{text}\n{text.title()}."),
            TEXTS[2]: said("one lamp\none lamp"),
            TEXTS[3]: said(None),
            TEXTS[4]: failed(400, "data_inspection_failed"),
        }
        return bad.get(text) or two(body)

    with chat_server(speak) as server:
        counts, rows = run(tmp_path, config(server))
    by_prompt = {
        text: [r.variant for r in rows if r.prompt_id == prompt_id(text)] for text in TEXTS
    }
    assert list(by_prompt.values()) == [[], [], [1], [], [], [1, 2]]
    assert counts["prompts with fewer rewrites"] == 5
    assert counts["rejected: refusal"] == 3 + 3
    assert counts["rejected: same as the prompt"] == 6
    assert counts["rejected: duplicate"] == 1 + 2 + 2  # its second line, then both of two rounds
    assert counts["rejected: empty"] == 3
    err = capsys.readouterr().err
    assert f"0 of 2 rewrites of {TEXTS[0]!r} after 3 attempts (3 refusal)" in err


def test_no_usable_rewrite_at_all(tmp_path: Path) -> None:
    with chat_server(lambda body, number: said("Sorry.")) as server:
        text = complaint(tmp_path, config(server))
    assert "no prompt got a usable rewrite from 'openai:qwen-plus' (18 refusal)" in text


def test_the_key_is_in_no_file(tmp_path: Path) -> None:
    with chat_server(two) as server:
        run(tmp_path, config(server))
    for path in tmp_path.rglob("*"):
        assert KEY.encode() not in path.read_bytes()


def test_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TEST_KEY")
    with chat_server(two) as server:
        assert "environment variable TEST_KEY is not set" in complaint(tmp_path, config(server))


def test_a_key_in_the_recipe_is_refused_and_not_repeated() -> None:
    planted: list[dict[str, Any]] = [{"key_env": KEY}, {"base_url": f"https://me:{KEY}@host/v1"}]
    for settings in planted:
        with pytest.raises(ValueError, match=r"refine.chat\.\w+ must") as caught:
            ChatConfig(model="m", **settings)
        assert KEY not in str(caught.value).partition("[type=")[0]


def test_no_client_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'craftune\[openai\]'"):
        endpoint.complete(RefineConfig(by="openai"), "cpu")


def test_no_model_named() -> None:
    with pytest.raises(UserError, match=r"refine\.chat\.model: missing"):
        refiners.check(RefineConfig(by="openai"))
