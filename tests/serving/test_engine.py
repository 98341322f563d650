"""What vLLM gives becomes pieces of answers, and what would open it to strangers is refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.errors import ConfigError, InfrastructureError
from rlhf_ray.serving.backends import TokenLogprob
from rlhf_ray.serving.engine import FORBIDDEN, _piece, refuse_open_doors


def choice(**overrides: Any) -> Any:
    fields = {"index": 0, "text": "we", "token_ids": [4], "finish_reason": None, "logprobs": None}
    return SimpleNamespace(**{**fields, **overrides})


def likely(logprob: float, token: str | None) -> Any:
    return SimpleNamespace(logprob=logprob, decoded_token=token)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_an_environment_that_opens_the_engine_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_open_doors()
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"{name} is set.*unset it"):
        refuse_open_doors()
    monkeypatch.setenv(name, "0")
    refuse_open_doors()


def test_a_piece_is_what_a_choice_has_grown_by() -> None:
    piece = _piece(choice(finish_reason="stop", token_ids=(4, 2)), None)
    assert (piece.index, piece.text, piece.token_ids, piece.finish_reason) == (0, "we", (4, 2), "stop")
    assert piece.logprobs is None


def test_alternatives_are_the_likeliest_that_could_have_been_drawn() -> None:
    position = {4: likely(-1.5, "we"), 9: likely(-0.4, "you"), 7: likely(float("-inf"), "they"), 8: likely(-3.0, None)}
    piece = _piece(choice(logprobs=[position]), 3)
    alternatives = (TokenLogprob("you", 9, -0.4), TokenLogprob("we", 4, -1.5), TokenLogprob("", 8, -3.0))
    assert piece.logprobs == (TokenLogprob("we", 4, -1.5, alternatives),)
    assert _piece(choice(logprobs=[position]), 0).logprobs == (TokenLogprob("we", 4, -1.5),)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_the_engine_gave_up_is_not_passed_off_as_whole(reason: str) -> None:
    with pytest.raises(InfrastructureError, match="gave an answer up"):
        _piece(choice(finish_reason=reason), None)
