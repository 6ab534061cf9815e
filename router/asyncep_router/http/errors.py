"""Every refusal the router answers with by itself, on one page. Each becomes a JSON body with a reason."""

from __future__ import annotations

from http import HTTPStatus

from asyncep_router.errors import RouterError


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


class NotFound(Refusal):
    """No such endpoint or worker."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"


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


class WorkerUnreachable(Refusal):
    """The connection to the worker failed or broke before its answer was complete."""

    status = HTTPStatus.BAD_GATEWAY
    code = "worker_unreachable"


class WorkerTimeout(Refusal):
    """The worker did not answer within `--request-timeout-secs`, or hangs."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    code = "worker_timeout"


class StreamBroken(Refusal):
    """A worker's answer ended in the middle, after part of it had gone to the client."""

    status = HTTPStatus.BAD_GATEWAY
    code = "stream_broken"
