"""Every refusal has OpenAI's envelope: `{"error": {"message", "type", "param", "code"}}`."""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "wrong_role",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "body_too_large",
    415: "unsupported_media_type",
    422: "unprocessable",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "unavailable",
    504: "deadline_exceeded",
}


class ErrorBody(BaseModel):
    """What went wrong, for people (`message`) and for programs (`type`, `param`, `code`)."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    message: str
    """What to do about it; never a prompt, a key or a comment."""
    type: str
    param: str | None
    """The field at fault, dotted, where one is."""
    code: str | None


class ErrorEnvelope(BaseModel):
    """The body of every answer that is not a 2xx."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "error": {
                    "message": "unknown field 'chat_template': leave it out",
                    "type": "invalid_request_error",
                    "param": "chat_template",
                    "code": "unknown_field",
                }
            }
        },
    )

    error: ErrorBody


class ApiError(Exception):
    """A refusal with its HTTP status; whoever raises it in a route or a replica, the caller gets the envelope.

    Example: `ApiError(400, "n is at most 8", param="n")`
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        *,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code or CODES.get(status)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        # Replicas raise it in another process; an exception is remade from its positional arguments alone.
        return _remake, (self.status, self.message, self.type, self.param, self.code, self.retry_after)

    def body(self) -> dict[str, Any]:
        """The envelope; also what an event of a stream that broke off carries."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {name: _sendable(value) for name, value in fields.items()}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The whole HTTP answer."""
        extra = dict(headers or {})
        if self.retry_after is not None:
            extra["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            extra["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, extra)


def _remake(
    status: int, message: str, type: str, param: str | None, code: str | None, retry_after: float | None
) -> ApiError:
    return ApiError(status, message, type, param, code, retry_after=retry_after)


def _sendable(text: str | None) -> str | None:
    # A field's name may hold half a character (a lone surrogate), which no answer can carry.
    return None if text is None else text.encode(errors="replace").decode()
