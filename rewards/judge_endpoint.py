"""An OpenAI-compatible chat endpoint that gets one question at a time.

    endpoint = Endpoint(url="http://localhost:8000/v1", key_variable=None, request={"model": "Qwen/Qwen3-8B"},
                        concurrency=16, timeout=60.0, retries=3)
    reply = await endpoint.ask("Rate this from 0 to 10: ...")       # a Reply; JudgeError if no question would get one
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .texts import shorten

if TYPE_CHECKING:
    from openai import APIError, AsyncOpenAI

MAX_MESSAGE = 300
"""Characters of an endpoint's reply or error that are shown."""


class JudgeError(RuntimeError):
    """The judge cannot be used; the message says how to fix it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The reply to one question: its text, and the score in it or why there is none."""

    text: str | None = None
    score: float | None = None
    problem: str = ""


@dataclass(kw_only=True)
class Endpoint:
    """Connections and the limit on concurrent requests last from call to call, as long as the event loop is the same.

    `url` includes `/v1`, `key_variable` is the environment variable that holds the key, and `request` has the fields of every
    request, "model" among them; `judge` describes the others.

    Raises ValueError for invalid values, and if the variable is not set.
    """

    url: str
    key_variable: str | None
    request: dict[str, Any]
    concurrency: int
    timeout: float
    retries: int
    _opened: tuple[asyncio.AbstractEventLoop, AsyncOpenAI, asyncio.Semaphore] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise ValueError(
                "the judge needs concurrency >= 1, retries >= 0 and timeout > 0, "
                f"not {self.concurrency}, {self.retries} and {self.timeout}"
            )
        _check_key(self.url, self.key_variable)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # connections belong to this process, and hold the key

    async def ask(self, question: str) -> Reply:
        """The reply, or why this one question has none; JudgeError if every question would fail in the same way."""
        import openai

        client, slots = self._open()
        async with slots:
            try:
                answer = await client.chat.completions.create(messages=[{"role": "user", "content": question}], **self.request)
            except openai.APIError as error:
                status = error.status_code if isinstance(error, openai.APIStatusError) else None
                if status in (400, 413, 422):
                    return Reply(problem=f"the endpoint refused the request: {shorten(str(error), MAX_MESSAGE)}")
                raise JudgeError(self._explain(error, status)) from error
        choices = getattr(answer, "choices", None)  # the client returns a web page with status 200 as a string
        if not isinstance(choices, list):
            raise JudgeError(f"{self.url} answers, but not as a chat endpoint does: does base_url end in /v1?")
        if not choices:
            return Reply(problem="the endpoint sent no reply")
        text = choices[0].message.content
        if choices[0].finish_reason == "length":  # its last number need not be the score
            return Reply(text=text, problem="the reply was cut off: raise max_tokens, or ask for a shorter one")
        return Reply(text=text)

    def _open(self) -> tuple[AsyncOpenAI, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if self._opened is None or self._opened[0] is not loop:
            import openai

            client = openai.AsyncOpenAI(
                base_url=self.url,
                api_key=(self.key_variable and os.environ.get(self.key_variable)) or "none",  # the library requires a text
                timeout=self.timeout,
                max_retries=self.retries,
                # The library's default client closes itself during garbage collection, on whichever loop runs then.
                http_client=openai.DefaultAsyncHttpxClient(),
            )
            self._opened = loop, client, asyncio.Semaphore(self.concurrency)
        return self._opened[1:]

    def _explain(self, error: APIError, status: int | None) -> str:
        import openai

        endpoint = f"the judge's endpoint {self.url}"
        message = shorten(str(error), MAX_MESSAGE)
        if status in (401, 403):
            key = f"the key in {self.key_variable}" if self.key_variable else "a request without a key"
            return f"{endpoint} refused {key} ({status}): {message}"
        if status == 404:
            return f"{endpoint} does not know {self.request['model']!r}, or base_url lacks its /v1: {message}"
        tries = f"{self.retries + 1} tries"
        if isinstance(error, openai.APITimeoutError):
            return f"{endpoint} gave no answer within {self.timeout:g} s in {tries}: raise timeout, or lower concurrency"
        if isinstance(error, openai.APIConnectionError):
            return f"{endpoint} cannot be reached ({tries}): {error.__cause__ or error}"
        return f"{endpoint} failed in {tries}: {message}" + (": lower concurrency" if status == 429 else "")


def _check_key(url: str, variable: str | None) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url must begin with http:// or https://, not {url!r}")
    if variable is None:
        return
    if not variable.isidentifier():  # not shown: it may be a key
        raise ValueError("api_key_variable must be the name of an environment variable, such as OPENAI_API_KEY, not a key")
    if not os.environ.get(variable) and not _is_private(parts.hostname):
        raise ValueError(
            f"the environment variable {variable} is not set, and the judge at {url} needs the key that it should hold "
            "(set it, or name another variable as api_key_variable; null means that no key is needed)"
        )


def _is_private(host: str) -> bool:
    """Whether a host is this machine or has a private address."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:  # a host name
        return host == "localhost"
