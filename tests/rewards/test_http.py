"""Rewards behind an address: our own server, and servers that fail in every way."""

import base64
import contextlib
import http.client
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import loaded
from PIL import Image
from tiny import call

import craftune
from craftune import rewards
from craftune.errors import UserError
from craftune.images import encode_png
from craftune.rewards import remote, serve
from craftune.types import Reward

rng = np.random.default_rng(0)
IMAGES = [Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)) for _ in range(5)]
TEXTS = ["a red cube", "", "über 😀", "x" * 2000, "</s>\n"]
WHO = {"identity": {"name": "planted", "sha256": "1"}, "uses_prompt": False}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short pauses, and no reward of an earlier test."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    rewards.unload()
    yield
    rewards.unload()


@contextlib.contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    """The address of a server that answers in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- our own server ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "jpeg-compressibility"])
def test_a_served_reward_is_the_reward(name: str) -> None:
    """Same numbers to the bit, same identity, whatever the batch."""
    served = loaded(name)
    with running(serve.serve(served, "127.0.0.1", 0)) as address:
        for batch_size in (16, 2):
            rewards.unload()
            reward = rewards.load(address, settings={address: {"batch_size": batch_size}})
            parts = [slice(i, i + batch_size) for i in range(0, 5, batch_size)]
            expected = torch.cat([served.score(IMAGES[p], TEXTS[p]) for p in parts])
            assert torch.equal(reward.score(IMAGES, TEXTS), expected)
            assert reward.name == address
            assert dict(reward.identity) == dict(served.identity)
            assert reward.uses_prompt == served.uses_prompt


def test_every_mode_of_picture_arrives() -> None:
    seen: list[Image.Image] = []
    ones = Reward("x", lambda i, p: seen.extend(i) or torch.ones(len(i)), {"name": "x"})  # type: ignore[func-returns-value]
    odd = [IMAGES[0].convert(mode) for mode in ("L", "RGBA", "P", "CMYK", "1", "I;16")]
    with running(serve.serve(ones, "127.0.0.1", 0)) as address:
        rewards.load(address).score(odd, [""] * len(odd))
    assert [image.mode for image in seen] == ["RGB"] * len(odd)
    assert seen[0].tobytes() == odd[0].convert("RGB").tobytes()


def test_requests_are_computed_one_after_the_other() -> None:
    running_now, most = 0, 0

    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        time.sleep(0.02)
        running_now -= 1
        return torch.ones(len(images))

    with running(serve.serve(Reward("x", score, {"name": "x"}), "127.0.0.1", 0)) as address:
        reward = rewards.load(address)
        threads = [threading.Thread(target=reward.score, args=(IMAGES, TEXTS)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1


PNG = base64.b64encode(encode_png(IMAGES[0])).decode()
JPEG = io.BytesIO()
IMAGES[0].save(JPEG, "JPEG")
GOOD = {"images": [PNG], "prompts": ["a"]}


@pytest.mark.parametrize(
    ("status", "body", "headers", "said"),
    [
        (200, GOOD, {}, '"identity": {"name": "jpeg-compressibility"'),
        (400, "{", {}, "no JSON"),
        (400, "[" * 100_000, {}, "no JSON"),
        (400, b"\xff", {}, "no JSON"),
        (400, [], {}, "expected {"),
        (400, GOOD | {"more": 1}, {}, "expected {"),
        (400, {"images": PNG, "prompts": "a"}, {}, "images must be a list"),
        (400, {"images": [PNG], "prompts": [1]}, {}, "prompts must be a list"),
        (400, {"images": [PNG], "prompts": []}, {}, "1 images but 0 prompts"),
        (400, {"images": [], "prompts": []}, {}, "0 images; 1 to 1024"),
        (400, {"images": [PNG] * 1025, "prompts": ["a"] * 1025}, {}, "1025 images; 1 to 1024"),
        (400, {"images": ["!!"], "prompts": ["a"]}, {}, "image 0: no base64"),
        (400, {"images": ["aaaa"], "prompts": ["a"]}, {}, "image 0: no readable PNG"),
        (400, {"images": [PNG[:80]], "prompts": ["a"]}, {}, "image 0: no readable PNG"),
        (
            400,
            {"images": [base64.b64encode(JPEG.getvalue()).decode()], "prompts": ["a"]},
            {},
            "image 0: no readable PNG",
        ),
        (415, GOOD, {"Content-Type": "text/plain"}, "expected Content-Type"),
        (413, GOOD, {"Content-Length": str(10**12)}, "send fewer images"),
        (411, GOOD, {"Content-Length": "-5"}, "expected a Content-Length"),
    ],
)
def test_the_server_refuses_what_is_no_question(
    status: int, body: Any, headers: dict[str, str], said: str
) -> None:
    """And it answers the next one."""
    data = body if isinstance(body, bytes) else body if isinstance(body, str) else json.dumps(body)
    served = loaded("jpeg-compressibility")
    with running(serve.serve(served, "127.0.0.1", 0)) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
        connection.request("POST", "/", data, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        assert (answer.status, said in text) == (status, True), text
        connection.close()
        assert rewards.load(address).score(IMAGES, TEXTS).shape == (5,)


def test_a_large_picture_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MOST_PIXELS", 20)
    with (
        running(serve.serve(loaded("jpeg-compressibility"), "127.0.0.1", 0)) as address,
        pytest.raises(UserError, match=r"answers 400: image 0: .*more than 20 pixels"),
    ):
        rewards.load(address).score(IMAGES, TEXTS)


def test_a_prompt_that_the_served_reward_cannot_judge_is_said() -> None:
    with (
        running(serve.serve(loaded("shapes-verifier"), "127.0.0.1", 0)) as address,
        pytest.raises(UserError, match=r"answers 422: .*not a prompt of the shapes world"),
    ):
        rewards.load(address).score(IMAGES, TEXTS)


def test_a_served_score_that_is_no_number_names_the_image() -> None:
    """NaN is no JSON; it is sent as null."""
    values = torch.tensor([1.0, torch.nan, torch.inf])
    served = Reward("x", lambda images, prompts: values, {"name": "x"})
    with (
        running(serve.serve(served, "127.0.0.1", 0)) as address,
        pytest.raises(UserError, match=rf"'{address}' returned nan for image 1 "),
    ):
        craftune.score(IMAGES[:3], TEXTS[:3], rewards=[address])


def test_an_address_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: .*choose another --host or --por"):
            serve.serve(loaded("jpeg-compressibility"), "127.0.0.1", port)


# --- servers of others ---------------------------------------------------------------------------

Speak = Callable[[str, int], tuple[int, dict[str, str], bytes]]


@contextlib.contextmanager
def speaking(speak: Speak) -> Iterator[tuple[str, list[str]]]:
    """A server that answers POST as told (method, number of the request) and knows /identity."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer()

        def answer(self) -> None:
            asked.append(f"{self.command} {self.path}")
            status, headers, data = speak(self.command, len(asked))
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        yield address, asked


def says(*answers: tuple[int, Any] | tuple[int, Any, dict[str, str]]) -> Speak:
    """To POST: one after the other, the last one again and again."""
    rest = list(answers)

    def speak(method: str, number: int) -> tuple[int, dict[str, str], bytes]:
        status, value, *more = rest.pop(0) if method == "POST" and len(rest) > 1 else rest[0]
        if method == "GET":
            status, value, more = 200, WHO, []
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        return status, more[0] if more else {}, data

    return speak


ONES = (200, {"scores": [1.0] * 5})


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([(200, b"<html><body>Welcome</body></html>")], r"no JSON object: '<html><body>Welcome"),
        ([(200, b"")], "no JSON object"),
        ([(200, b"[" * 100_000)], "no JSON object"),
        ([(200, [1, 2, 3, 4, 5])], r"no JSON object: '\[1, 2"),
        ([(200, {"score": [1] * 5})], r'must answer {"scores": \[one number per image\]}, got'),
        ([(200, {"scores": 1})], "one number per image"),
        ([(200, {"scores": [1] * 4})], "answered 4 scores for 5 images"),
        ([(200, {"scores": [1] * 6})], "answered 6 scores for 5 images"),
        ([(200, {"scores": [[1]] * 5})], r"scores must be numbers, got '\[1\]'"),
        ([(200, {"scores": ["1"] * 5})], "scores must be numbers"),
        ([(200, {"scores": [True] * 5})], "scores must be numbers"),
        ([(302, b"", {"Location": "http://elsewhere/x"})], "redirected to 'http://elsewhere/x', w"),
        ([(404, b"<h1>Not\nFound</h1>")], "answers 404: '<h1>Not Found</h1>'"),
        ([(401, {"error": "no token"})], "answers 401: no token"),
        ([(200, b" " * (remote.LARGEST + 9))], "answered more than 1,048,576 bytes"),
        ([(200, {"scores": [1] * 5, "identity": {"name": "other"}})], "name was 'planted', is 'ot"),
    ],
)
def test_nonsense_is_one_line(answers: list[Any], said: str) -> None:
    with speaking(says(*answers)) as (address, asked):
        reward = rewards.load(address)
        with pytest.raises(UserError, match=said) as caught:
            reward.score(IMAGES, TEXTS)
    assert f"reward {address}: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert asked == ["GET /identity", "POST /"]  # what is nonsense once is not asked again


@pytest.mark.parametrize("value", [b"NaN", b"null", b"Infinity", b"1e999"])
def test_a_score_that_is_none_names_the_image(value: bytes) -> None:
    answer = b'{"scores": [1, 2, ' + value + b", 4, 5]}"
    with (
        speaking(says((200, answer))) as (address, _),
        pytest.raises(UserError, match=rf"'{address}' returned (nan|inf) for image 2 "),
    ):
        craftune.score(IMAGES, TEXTS, rewards=[address])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_comes_to_itself(status: int) -> None:
    with speaking(says((status, {}), (status, {}), ONES)) as (address, asked):
        assert rewards.load(address).score(IMAGES, TEXTS).tolist() == [1] * 5
    assert asked.count("POST /") == 3


def test_a_server_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    with speaking(says((500, b"out of memory"))) as (address, asked):
        reward = rewards.load(address, settings={address: {"retries": 3}})
        with pytest.raises(ConnectionError, match=r"500: 'out of memory' \(tried 4 times\)"):
            reward.score(IMAGES, TEXTS)
    assert asked.count("POST /") == 4
    assert pauses == [0.001, 0.002, 0.004]
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.003)
    pauses.clear()
    with speaking(says((500, b""))) as (address, _), pytest.raises(ConnectionError):
        rewards.load(address, settings={address: {"retries": 4}}).score(IMAGES, TEXTS)
    assert pauses == [0.001, 0.002, 0.003, 0.003]


def test_a_server_that_is_not_there_or_hangs_up_or_is_silent() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    few = {"retries": 1, "timeout": 0.1}
    with pytest.raises(ConnectionError, match=r"refused \(tried 2 times\); is its server running"):
        rewards.load(address, settings={address: few})
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"timed out \(tried 2 times\)"):
            rewards.load(address, settings={address: few})

    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.process_request = lambda request, address: server.shutdown_request(request)  # type: ignore[method-assign]
    with (
        running(server) as address,
        pytest.raises(ConnectionError, match=r"(closed|reset|peer).*\(tried 2 times\)"),
    ):
        rewards.load(address, settings={address: few})


def test_an_answer_that_drips_is_not_waited_for() -> None:
    def slow() -> None:
        client, _ = listening.accept()
        client.recv(1000)
        client.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                client.sendall(b" ")
                time.sleep(0.02)
        client.close()

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=slow)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ConnectionError, match=r"no whole answer within 0.2 s"):
            rewards.load(address, settings={address: {"timeout": 0.2, "retries": 0}})
        assert time.monotonic() - started < 1.5
        thread.join()


@pytest.mark.parametrize("value", [[], {}, {"identity": "x"}, {"identity": {}}])
def test_who_it_is_must_be_said(value: Any) -> None:
    speak = lambda method, number: (200, {}, json.dumps(value).encode())  # noqa: E731
    with (
        speaking(speak) as (address, _),
        pytest.raises(UserError, match=r"/identity must answer|no JSON object"),
    ):
        rewards.load(address)


def test_a_path_is_part_of_the_address() -> None:
    with speaking(says(ONES)) as (address, asked):
        rewards.load(f"{address}/heavy").score(IMAGES, TEXTS)
    assert asked == ["GET /heavy/identity", "POST /heavy"]


@pytest.mark.parametrize(
    "address",
    [
        "ftp://h",
        "http://",
        "http://h:0",
        "http://h:x",
        "http://h?key=1",
        "http://h#a",
        "http://a@h",
    ],
)
def test_what_is_no_address(address: str) -> None:
    """Nothing is asked; a password would be stored with every score."""
    with pytest.raises(UserError, match="without user, password or query"):
        rewards.check_names([address], "score.rewards")


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match=r'reward."http://h".time: unknown setting .time.; did you'):
        rewards.check_settings({"http://h": {"time": 3}})


# --- in the command line -------------------------------------------------------------------------


def test_an_address_wherever_a_reward_is_named(tmp_path: Path) -> None:
    for i, image in enumerate(IMAGES):
        image.save(tmp_path / f"{i}.png")
    served = loaded("jpeg-compressibility")
    with running(serve.serve(served, "127.0.0.1", 0)) as address:
        given = ["--rewards", address, f'--set=reward."{address}".batch_size=2']
        answer = call(["score", tmp_path, *given], tmp_path)
        assert answer.status == 0, answer.err
        assert max(map(len, answer.out.splitlines())) <= 80
        names = ["--rewards", f"jpeg-incompressibility,{address}", "--out", "two.parquet"]
        assert call(["score", tmp_path, *names], tmp_path).status == 0
    few = f'--set=reward."{address}".retries=0'
    gone = call(["score", tmp_path, "--rewards", address, few, "--out", "3.parquet"], tmp_path)
    assert f"reward {address}: " in gone.complaint
    assert "is its server running" in gone.complaint


def test_the_example_in_the_manual_is_a_server() -> None:
    text = (Path(__file__).parents[2] / "docs" / "http-rewards.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    body, last = source.rstrip().rsplit("\n", 1)
    assert len([line for line in body.splitlines() if line.strip()]) <= 20
    names: dict[str, Any] = {}
    exec(body, names)
    assert last == 'HTTPServer(("127.0.0.1", 8765), Handler).serve_forever()'
    names["Handler"].log_message = lambda *_: None
    with running(names["HTTPServer"](("127.0.0.1", 0), names["Handler"])) as address:
        pictures = [Image.new("RGB", (4, 4), (level,) * 3) for level in (0, 51, 255)]
        found = craftune.score(pictures, rewards=[address])[address]
    assert found.tolist() == pytest.approx([0, 0.2, 1])
