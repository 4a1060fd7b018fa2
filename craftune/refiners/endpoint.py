"""A language model behind an OpenAI-compatible endpoint, by the `openai` client.

The key stays in the environment and in the client's memory: it is in no setting, and is struck out
of every message. Failed requests are repeated by the client (429, 5xx, no answer), which honours
Retry-After; what then still fails ends the stage, and finished prompts are kept.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from craftune.config import ChatConfig, RefineConfig
from craftune.errors import UserError
from craftune.refiners.chat import Complete, Reply, Request

KEPT = "finished prompts are kept, so run again"

BLOCKED = ("content_filter", "content_policy", "data_inspection", "moderation", "inappropriate")
"""In the error of a provider that refuses one prompt: no fault of the recipe."""


def complete(config: RefineConfig, device: str) -> Complete:
    """Any OpenAI-compatible endpoint: qwen-plus, your own vLLM server ... (refine.chat)."""
    del device
    client = _client(config.chat)

    def answer(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """At most `batch_size` at once; after a failure, what is under way is still taken."""
        waiting = iter(enumerate(requests))
        running: dict[Future[Reply], int] = {}
        failure: BaseException | None = None
        pool = ThreadPoolExecutor(config.chat.batch_size)
        try:
            while True:
                while failure is None and len(running) < config.chat.batch_size:
                    if (following := next(waiting, None)) is None:
                        break
                    i, request = following
                    running[pool.submit(_reply, config.chat, client, request)] = i
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    i = running.pop(future)
                    if error := future.exception():
                        failure = failure or error
                    else:
                        yield i, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    return answer


def _client(chat: ChatConfig) -> Any:
    try:
        import openai
    except ImportError:
        raise UserError(
            "refine.by 'openai': the openai library is not installed; "
            "pip install 'craftune[openai]'"
        ) from None
    key = os.environ.get(chat.key_env, "").strip()
    if not key:
        raise UserError(
            f"refine.chat.key_env: the environment variable {chat.key_env} is not set; put the key "
            "of the endpoint there (any text for a server of your own without keys)"
        )
    return openai.OpenAI(
        api_key=key, base_url=chat.base_url, timeout=chat.timeout, max_retries=chat.retries
    )


def _reply(chat: ChatConfig, client: Any, request: Request) -> Reply:
    """One request, in a thread of its own."""
    import openai

    try:
        found = client.chat.completions.create(
            model=chat.model,
            messages=[{"role": "user", "content": request.text}],
            temperature=chat.temperature,
            top_p=chat.top_p,
            max_tokens=chat.max_tokens,
            seed=request.seed,
        )
    except openai.BadRequestError as error:
        if any(word in str(error).lower() for word in BLOCKED):
            return Reply("I'm sorry: the endpoint's filter refused this prompt.")
        raise UserError(_complaint(chat, client, error)) from None
    except openai.OpenAIError as error:
        raise UserError(_complaint(chat, client, error)) from None
    except ValueError:  # a body that is no JSON
        raise UserError(_no_completion(chat, "no JSON")) from None
    choices = getattr(found, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        raise UserError(_no_completion(chat, repr(found).replace(client.api_key, "***")))
    text, reason = choices[0].message.content, choices[0].finish_reason
    usage = getattr(found, "usage", None)
    return Reply(
        text.replace(client.api_key, "***") if isinstance(text, str) else "",
        reason != "length",
        int(getattr(usage, "prompt_tokens", None) or 0),
        int(getattr(usage, "completion_tokens", None) or 0),
    )


def _no_completion(chat: ChatConfig, got: str) -> str:
    return (
        f"refine.chat.base_url {chat.base_url!r}: answered with no chat completion ({got:.80}); it "
        f"must be the address before /chat/completions, often ending in /v1; {KEPT}"
    )


def _complaint(chat: ChatConfig, client: Any, error: Any) -> str:
    """What failed and what would mend it, on one line, without the key."""
    import openai

    place = f"refine.chat.base_url {chat.base_url!r}:"
    often = f"after {chat.retries} retries"
    mends = [
        (
            openai.AuthenticationError,
            f"refused the key in {chat.key_env} (401); set a valid key there",
        ),
        (
            openai.PermissionDeniedError,
            f"the key in {chat.key_env} may not use {chat.model!r} (403); choose another model "
            "or key",
        ),
        (
            openai.NotFoundError,
            f"knows no model {chat.model!r} or no such address (404); mend refine.chat.model or "
            "base_url",
        ),
        (
            openai.RateLimitError,
            f"too many requests or no credit left (429) {often}; lower refine.chat.batch_size, "
            "raise refine.chat.retries, or look at your account",
        ),
        (
            openai.APITimeoutError,
            f"no answer within {chat.timeout:g} s {often}; raise refine.chat.timeout or lower "
            "refine.chat.batch_size",
        ),
        (openai.APIConnectionError, f"cannot be reached {often}; check address and network"),
        (openai.InternalServerError, f"failed ({getattr(error, 'status_code', 0)}) {often}"),
    ]
    for kind, text in mends:
        if isinstance(error, kind):
            return f"{place} {text}; {KEPT}"
    lines = str(error).replace(client.api_key, "***").splitlines() or [type(error).__name__]
    return f"{place} {lines[0]:.200}; {KEPT}"
