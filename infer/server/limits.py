"""How much may wait: a queue that is bounded by prompts and by their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from infer.server.errors import ApiError, invalid

__all__ = ["Admission", "Seat"]


class Seat:
    """The prompts of one request, as far as they still wait; as a context, what is left is given back at its end."""

    def __init__(self, admission: Admission, tokens: Sequence[int]) -> None:
        self._admission, self._tokens = admission, dict(enumerate(tokens))

    def begun(self, place: int) -> None:
        """A prompt has its first token: it waits no longer."""
        tokens = self._tokens.pop(place, None)
        if tokens is not None:
            self._admission.requests -= 1
            self._admission.tokens -= tokens

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, *error: object) -> None:
        for place in list(self._tokens):
            self.begun(place)


class Admission:
    """Counts what waits.

    Args:
        most_requests, most_tokens: that may wait.
        retry_s: when to come back.

    Attributes:
        requests, tokens: that wait now.
    """

    def __init__(self, most_requests: int, most_tokens: int, retry_s: int) -> None:
        self.most_requests, self.most_tokens, self.retry_s = most_requests, most_tokens, retry_s
        self.requests = self.tokens = 0

    def check(self) -> None:
        """Refuse early, before anything of a request is looked at.

        Raises:
            ApiError: 429, nobody else may wait.
        """
        if self.requests >= self.most_requests or self.tokens >= self.most_tokens:
            raise self._full()

    def seat(self, tokens: Sequence[int], param: str) -> Seat:
        """A seat for prompts of so many tokens.

        Raises:
            ApiError: 429, there is none now; 400, there can be none.
        """
        count, total = len(tokens), sum(tokens)
        if count > self.most_requests or total > self.most_tokens:
            most = f"{self.most_requests} prompts and {self.most_tokens} tokens may wait"
            raise invalid(f"{param}: {count} prompts of {total} tokens; at most {most}", param)
        if self.requests + count > self.most_requests or self.tokens + total > self.most_tokens:
            raise self._full()
        self.requests += count
        self.tokens += total
        return Seat(self, tokens)

    def _full(self) -> ApiError:
        headers = {"retry-after": str(self.retry_s)}
        return ApiError(429, "too many requests are waiting; try again later", headers=headers)
