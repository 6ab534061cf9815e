"""Every refusal the router answers with by itself, on one page. Each becomes a JSON body with a reason."""

from __future__ import annotations

import math
from http import HTTPStatus

from asyncep_router.errors import RouterError
from asyncep_router.http.judgement import Outcome


class Refusal(RouterError):
    """A request is answered with `status` and a reason instead of a result.

    `code` is for programs, the message for people. `retry_after`: seconds for the header of that name.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal_error"
    retry_after: int | None = None

    @property
    def kind(self) -> str:
        """The family of the error, as OpenAI's clients know it."""
        return "invalid_request_error" if self.status < 500 and self.status not in (408, 429) else "service_error"


class BadRequest(Refusal):
    """The body cannot be read."""

    status = HTTPStatus.BAD_REQUEST
    code = "bad_request"


class Unauthorized(Refusal):
    """The API key is missing or wrong."""

    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"


class Forbidden(Refusal):
    """Who asks is known, or needs not be, and may not do this."""

    status = HTTPStatus.FORBIDDEN
    code = "forbidden"


class NotFound(Refusal):
    """No such endpoint or worker."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class WrongMethod(Refusal):
    """The endpoint exists, but not with this method. `allowed`: the methods that it has."""

    status = HTTPStatus.METHOD_NOT_ALLOWED
    code = "method_not_allowed"

    def __init__(self, message: str, allowed: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allowed = allowed


class ExpectationFailed(Refusal):
    """The header `Expect` asks for something other than `100-continue`."""

    status = HTTPStatus.EXPECTATION_FAILED
    code = "expectation_failed"


class SlowBody(Refusal):
    """The body did not arrive within `--body-timeout-secs`."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "body_timeout"


class TooManyBodies(Refusal):
    """The bodies of the requests that are being received and served fill `--max-held-bytes`."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "too_many_bodies"
    retry_after = 1


class RateLimited(Refusal):
    """The key's own rate, `prompts_per_second` in the key file, is used up."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "rate_limited"

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.retry_after = math.ceil(seconds)


class Conflict(Refusal):
    """The worker is there already."""

    status = HTTPStatus.CONFLICT
    code = "conflict"


class TooLarge(Refusal):
    """The body exceeds `--max-payload-size`."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "payload_too_large"


class QueueFull(Refusal):
    """`--max-concurrent-requests` are being served and `--queue-size` wait."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "queue_full"
    retry_after = 1


class QueueTimeout(Refusal):
    """The request waited `--queue-timeout-secs` without being sent."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "queue_timeout"


class NoWorker(Refusal):
    """No worker takes requests."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "no_available_workers"
    retry_after = 1


class ShuttingDown(Refusal):
    """The router drains."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "shutting_down"
    retry_after = 5


class ClientGone(RouterError):
    """The client left, or takes nothing of its answer. There is nobody to tell."""


class WorkerUnreachable(Refusal):
    """The connection to the worker failed or broke before its answer was complete."""

    status = HTTPStatus.BAD_GATEWAY
    code = "worker_unreachable"

    def __init__(self, message: str, outcome: Outcome = Outcome.DROPPED) -> None:
        super().__init__(message)
        self.outcome = outcome


class WorkerTimeout(Refusal):
    """The worker did not answer within `--request-timeout-secs`, or hangs."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    code = "worker_timeout"
    outcome = Outcome.TIMED_OUT


class StreamBroken(Refusal):
    """A worker's answer ended in the middle, after part of it had gone to the client."""

    status = HTTPStatus.BAD_GATEWAY
    code = "stream_broken"
