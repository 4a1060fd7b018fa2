"""A reward that another process computes: an address http(s)://host:port/path instead of a name.

JSON and base64 PNG files, nothing else; docs/http-rewards.md describes the protocol. A heavy or
delicate scorer lives in an environment of its own, behind twenty lines of server.
"""

import base64
import http.client
import json
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

import torch
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from craftune.config import STRICT, Count, Natural, Positive
from craftune.errors import UserError
from craftune.images import encode_png, to_rgb
from craftune.types import Reward

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first repetition, doubled with each, and at most."""
LARGEST = 1 << 20
"""Bytes of an answer."""
AGAIN = (429, 500, 502, 503, 504)
"""Answers after which a request is repeated: the server may come to itself."""


@dataclass(frozen=True, config=STRICT)
class RemoteSettings:
    """Keys of [reward."http://..."]."""

    timeout: Positive = 60.0
    """Seconds to wait for one answer."""
    retries: Natural = 4
    """Of a request that failed (no connection or answer in time, 429, 5xx), with growing pauses."""
    batch_size: Annotated[Count, Field(le=1024)] = 16
    """Images per request; changes no number."""


def is_address(name: str) -> bool:
    """Whether a reward's name is an address."""
    return "://" in name


def check_address(name: str, key: str) -> None:
    """Refuse what is no http(s) address; nothing is asked of the server.

    Raises:
        UserError: names the recipe key.
    """
    try:
        parts = urlsplit(name)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        parts, good = urlsplit(""), False
    if not good or parts.query or parts.fragment or "@" in parts.netloc:
        raise UserError(
            f"{key}: {name!r} is no address of a reward; write http://host:port/path, without "
            "user, password or query"
        )


def remote_reward(address: str, settings: RemoteSettings) -> Reward:
    """The reward at this address; asks the server who it is.

    Raises:
        UserError: the server answers something else than the protocol says.
        ConnectionError: it does not answer.
    """
    identity, uses_prompt = who(address, settings)

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        found: list[float] = []
        for start in range(0, len(images), settings.batch_size):
            stop = start + settings.batch_size
            pictures = [encode_png(to_rgb(image)) for image in images[start:stop]]
            question = {
                "images": [base64.b64encode(data).decode() for data in pictures],
                "prompts": prompts[start:stop],
            }
            answer = _asked(address, "POST", "", settings, question)
            found += _scores(address, answer, len(pictures), identity)
        return torch.tensor(found, dtype=torch.float32)

    return Reward(address, score, identity, uses_prompt=uses_prompt)


def who(address: str, settings: RemoteSettings) -> tuple[dict[str, str], bool]:
    """What the server says it is, and whether it reads prompts.

    Raises:
        UserError: no such thing in its answer.
        ConnectionError: it does not answer.
    """
    answer = _asked(address, "GET", "/identity", settings)
    identity, uses_prompt = answer.get("identity"), answer.get("uses_prompt", True)
    if not isinstance(identity, dict) or not identity or not isinstance(uses_prompt, bool):
        raise _nonsense(address, 'its /identity must answer {"identity": {"name": ...}}', answer)
    return {str(key): str(value) for key, value in identity.items()}, uses_prompt


def _scores(
    address: str, answer: Mapping[str, Any], n: int, identity: Mapping[str, str]
) -> list[float]:
    """The numbers of an answer; a score that is no number is NaN, which the caller refuses."""
    scores = answer.get("scores")
    if not isinstance(scores, list):
        raise _nonsense(address, 'it must answer {"scores": [one number per image]}', answer)
    if len(scores) != n:
        raise UserError(f"reward {address}: answered {len(scores)} scores for {n} images")
    for value in scores:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise _nonsense(address, "scores must be numbers", value)
    now = answer.get("identity", identity)
    if now != identity:
        raise UserError(
            f"reward {address}: is another reward than at the start: {_differing(identity, now)}; "
            "scores of the two do not compare, run again with --redo"
        )
    return [float("nan") if value is None else float(value) for value in scores]


def _differing(before: Mapping[str, str], now: Any) -> str:
    if not isinstance(now, dict):
        return f"identity is now {now!r}"
    key = min(k for k in {*before, *now} if before.get(k) != now.get(k))
    return f"{key} was {before.get(key)!r}, is {now.get(key)!r}"


def _asked(
    address: str,
    method: str,
    path: str,
    settings: RemoteSettings,
    question: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The answer to one request, repeated where that may help.

    Raises:
        UserError: the answer is none of the protocol.
        ConnectionError: no answer, or none but "try again".
    """
    body = None if question is None else json.dumps(question).encode()
    pause, failure = FIRST_PAUSE, ""
    for attempt in range(settings.retries + 1):
        try:
            status, headers, data = _exchange(address + path, method, body, settings.timeout)
        except (OSError, http.client.HTTPException) as error:
            failure = str(error) or type(error).__name__
        else:
            if status not in AGAIN:
                return _parsed(address, status, headers, data)
            failure = f"answers {status}: {_excerpt(data)}"
        if attempt < settings.retries:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
    raise ConnectionError(
        f"reward {address}: {failure} (tried {settings.retries + 1} times); is its server running, "
        "and awake?"
    )


def _exchange(
    url: str, method: str, body: bytes | None, timeout: float
) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and at most `LARGEST` bytes; no redirect is followed, no proxy asked.

    Raises:
        OSError: no connection, or not all within the time.
        http.client.HTTPException: what answers does not speak HTTP.
    """
    parts = urlsplit(url)
    kinds: dict[str, Callable[..., http.client.HTTPConnection]] = {
        "http": http.client.HTTPConnection,
        "https": http.client.HTTPSConnection,
    }
    connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=timeout)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    end = time.monotonic() + timeout
    try:
        connection.request(method, parts.path or "/", body, headers)
        answer = connection.getresponse()
        data = b""
        while len(data) <= LARGEST and (block := answer.read1(1 << 16)):
            data += block
            if time.monotonic() > end:
                raise TimeoutError(f"no whole answer within {timeout:g} s")
        return answer.status, dict(answer.getheaders()), data
    finally:
        connection.close()


def _parsed(address: str, status: int, headers: Mapping[str, str], data: bytes) -> dict[str, Any]:
    if 300 <= status < 400:
        where = {name.lower(): value for name, value in headers.items()}.get("location", "nowhere")
        raise UserError(
            f"reward {address}: is redirected to {where[:200]!r}, which is not followed; give the "
            "final address"
        )
    if len(data) > LARGEST:
        raise UserError(f"reward {address}: answered more than {LARGEST:,} bytes; is it a reward?")
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if status != 200:
        reason = answer.get("error") if isinstance(answer, dict) else None
        raise UserError(f"reward {address}: answers {status}: {reason or _excerpt(data)}")
    if not isinstance(answer, dict):
        raise UserError(f"reward {address}: answered no JSON object: {_excerpt(data)}")
    return answer


def _nonsense(address: str, expected: str, got: Any) -> UserError:
    return UserError(f"reward {address}: {expected}, got {_excerpt(repr(got).encode())}")


def _excerpt(data: bytes) -> str:
    """The beginning, on one line."""
    text = " ".join(data[:400].decode(errors="replace").split())
    return repr(text[:80] + "..." if len(text) > 80 else text)
