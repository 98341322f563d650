"""Refusals look like OpenAI's, from whichever process they come."""

import copy
import json

import pytest

from rlhf_ray.serving.errors import CODES, ApiError, ErrorEnvelope


@pytest.mark.parametrize("status", CODES)
def test_each_status_has_an_envelope_with_all_four_fields(status: int) -> None:
    answer = ApiError(status, "what to do").response()
    envelope = ErrorEnvelope.model_validate_json(bytes(answer.body))
    assert (answer.status_code, envelope.error.message, envelope.error.code) == (status, "what to do", CODES[status])


def test_a_refusal_crosses_processes_whole() -> None:
    error = ApiError(400, "n is at most 8", param="n", code="too_many", retry_after=2.5)
    again = copy.copy(error)  # by the same __reduce__ that carries it between processes
    assert isinstance(again, ApiError)
    assert (again.status, again.body(), again.retry_after, str(again)) == (400, error.body(), 2.5, "n is at most 8")


def test_retry_after_is_whole_seconds_and_never_none() -> None:
    said = [ApiError(429, "wait", retry_after=wait).response().headers["Retry-After"] for wait in (0, 0.2, 1.0, 7.3)]
    assert said == ["1", "1", "1", "8"]
    assert "Retry-After" not in ApiError(404, "no").response().headers


def test_a_401_says_how_to_authenticate() -> None:
    assert ApiError(401, "give a key").response().headers["WWW-Authenticate"] == "Bearer"


def test_half_a_character_in_a_fields_name_can_be_answered() -> None:
    answer = ApiError(400, "unknown field '\ud800'", param="\ud800").response()
    assert json.loads(bytes(answer.body))["error"]["param"] == "?"
