"""This project's own format: feedback as the store keeps it, a row each."""

import json
from collections.abc import Mapping
from typing import Any

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback.formats.rows import BadRow
from rlhf_ray.feedback.schema import Feedback, parse_feedback, to_json


def read_own(row: Mapping[str, Any]) -> list[Feedback]:
    """A row as it stands, its id included."""
    try:
        return [parse_feedback(json.dumps(row))]  # by way of JSON, whose lists are what the schema's tuples are
    except (FeedbackError, TypeError) as error:
        raise BadRow(str(error).removeprefix("feedback is refused: ")) from None


def write_own(feedback: Feedback, *, conversational: bool) -> list[dict[str, Any]]:
    """All of it."""
    del conversational  # it always is
    return [json.loads(to_json(feedback))]
