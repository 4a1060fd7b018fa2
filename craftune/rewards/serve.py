"""`craftune serve-reward`: one reward behind an address, for runs in other environments.

The protocol is in docs/http-rewards.md. Requests are computed one after the other. Nothing is kept
of what is sent, and nothing but pictures and texts is read from it.
"""

import base64
import binascii
import contextlib
import io
import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image

from craftune.errors import UserError
from craftune.images import decode
from craftune.types import Reward

MOST_BYTES = 512 << 20
"""Of a request."""
MOST_IMAGES = 1024
MOST_PIXELS = 1 << 26
"""Of an image, 8192 x 8192."""
SECONDS = 60.0
"""Without a byte, after which a connection is closed."""

Answer = tuple[int, dict[str, Any]]


def serve(reward: Reward, host: str, port: int) -> ThreadingHTTPServer:
    """A server that answers once its `serve_forever` runs; port 0 takes a free one.

    Raises:
        UserError: the address cannot be had.
    """
    lock = threading.Lock()
    about = {"identity": dict(reward.identity), "uses_prompt": reward.uses_prompt}

    def answer(body: bytes) -> Answer:
        try:
            images, prompts = _question(body)
        except ValueError as error:
            return 400, {"error": str(error)}
        with lock:
            return _scored(reward, images, prompts, about)

    try:
        server = ThreadingHTTPServer((host, port), _handler(about, answer))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port}: {reason}; choose another --host or --port") from None
    server.daemon_threads = True
    return server


def _question(body: bytes) -> tuple[list[Image.Image], list[str]]:
    """Images and prompts of a request.

    Raises:
        ValueError: it is none; says what is wrong.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(asked, dict) or set(asked) != {"images", "prompts"}:
        raise ValueError('expected {"images": [base64 PNG], "prompts": [text]}')
    images, prompts = asked["images"], asked["prompts"]
    for name, values in (("images", images), ("prompts", prompts)):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{name} must be a list of strings")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    if not 1 <= len(images) <= MOST_IMAGES:
        raise ValueError(f"{len(images)} images; 1 to {MOST_IMAGES} are taken at once")
    return [_image(number, text) for number, text in enumerate(images)], prompts


def _image(number: int, text: str) -> Image.Image:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"image {number}: no base64") from None
    try:
        picture = Image.open(io.BytesIO(data), formats=["PNG"])
        if math.prod(picture.size) > MOST_PIXELS:
            raise ValueError(f"more than {MOST_PIXELS:,} pixels")
        return decode(data)
    except Exception as error:  # whatever a stranger sends
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"image {number}: no readable PNG ({reason})") from None


def _scored(
    reward: Reward, images: list[Image.Image], prompts: list[str], about: dict[str, Any]
) -> Answer:
    try:
        with torch.no_grad():
            values = reward.score(images, prompts).tolist()
    except ValueError as error:  # UserError, too: this question cannot be answered
        return 422, {"error": str(error)}
    except Exception as error:  # the server outlives what one request brings about
        return 500, {"error": f"{type(error).__name__}: {error}"}
    scores = [value if math.isfinite(value) else None for value in values]
    return 200, {"scores": scores, "identity": about["identity"]}


def _handler(
    about: dict[str, Any], answer: Callable[[bytes], Answer]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = SECONDS
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            known = self.path.rstrip("/") in ("", "/identity")
            self.say(200, about) if known else self.say(404, {"error": "there is /identity"})

        def do_POST(self) -> None:
            self.close_connection = True  # what was not read must not be taken for a request
            if self.path.rstrip("/"):
                return self.say(404, {"error": "images are sent to /"})
            # A web page in the user's browser cannot send this type to another site unasked.
            if self.headers.get_content_type() != "application/json":
                return self.say(415, {"error": "expected Content-Type: application/json"})
            length = self.headers.get("Content-Length", "")
            if not length.isascii() or not length.isdigit():
                return self.say(411, {"error": "expected a Content-Length"})
            if int(length) > MOST_BYTES:
                return self.say(
                    413, {"error": f"more than {MOST_BYTES:,} bytes; send fewer images"}
                )
            body = self.rfile.read(int(length))
            if len(body) == int(length):
                self.say(*answer(body))
            return None

        def say(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value, allow_nan=False).encode()
            with contextlib.suppress(ConnectionError):  # who asked has gone
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
