"""A server on this machine that speaks the OpenAI chat API as a test tells it to."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-planted-0123456789"


@dataclass
class ChatServer:
    """`speak(body, number)` gives (status, headers, body as text or value) of a request."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    most_at_once: int = 0


def said(text: str | None, reason: str = "stop") -> tuple[int, dict[str, str], Any]:
    """A completion as the API documents it."""
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant"}}
    choice["message"]["content"] = text  # type: ignore[index]
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
    return 200, {}, body | {"choices": [choice]}


def failed(status: int, message: str, **headers: str) -> tuple[int, dict[str, str], Any]:
    """An error as the API documents it."""
    return status, headers, {"error": {"message": message, "type": "error", "code": message}}


def prompt_of(body: dict[str, Any]) -> str:
    """The prompt that a request asks to rewrite."""
    return body["messages"][0]["content"].rpartition("Prompt: ")[2]


@contextlib.contextmanager
def chat_server(
    speak: Callable[[dict[str, Any], int], tuple[int, dict[str, str], Any]],
) -> Iterator[ChatServer]:
    state, lock, running = ChatServer(), threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running += 1
                state.most_at_once = max(state.most_at_once, running)
                state.asked.append(body)
                number = len(state.asked)
            state.keys.add(self.headers["Authorization"])
            status, headers, value = (
                speak(body, number)
                if self.path == "/v1/chat/completions"
                else failed(404, "no such address")
            )
            data = (value if isinstance(value, str) else json.dumps(value)).encode()
            with lock:
                running -= 1
            with contextlib.suppress(ConnectionError):  # the client has given up
                self.send_response(status)
                kind = "application/json" if not isinstance(value, str) else "text/html"
                for name, text in {"Content-Type": kind, **headers}.items():
                    self.send_header(name.replace("_", "-"), text)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
