"""Frozen feedback as it may be learnt from: less what is about the prompts that the policy is measured on."""

from collections.abc import Callable

from rlhf_ray.config import Config
from rlhf_ray.feedback.schema import Feedback, names_of
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.training.recipe import make_recipe


def read_frozen(store: str, snapshot: str, *, config: Config, say: Callable[[str], None]) -> list[Feedback]:
    """A snapshot, without the groups that the recipe holds out.

    The recipe's own annotators are never asked about those, but whoever rates a served policy's answers may be.
    """
    with FeedbackStore(store, read_only=True) as opened:
        feedback = list(opened.read(snapshot))
    held_out = {
        name for prompt in make_recipe(config).held_out_prompts for name in (prompt.group, names_of(prompt.messages)[1])
    }  # the latter is what the service calls it
    kept = [item for item in feedback if item.group not in held_out]
    if len(kept) < len(feedback):
        say(
            f"{len(feedback) - len(kept)} of {len(feedback)} rows of feedback are left out: "
            "they are about prompts that only measure the policy"
        )
    return kept
