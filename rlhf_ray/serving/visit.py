"""The end of the demo: its run served for a moment, asked by OpenAI's own client, and its answer rated.

Everything a visit leaves (versions, the answer, the rating) lies in the run's folder, under `service/`.
"""

import socket
from pathlib import Path
from typing import Any, cast

from rlhf_ray.client import Client
from rlhf_ray.config import Config
from rlhf_ray.errors import InfrastructureError, Interrupted
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.serving.settings import Part, ServiceConfig
from rlhf_ray.serving.start import Say, prepare, serving
from rlhf_ray.training.recipe import make_recipe
from rlhf_ray.training.run_folder import existing_run

VISITOR = "demo-visitor"
PARTS: frozenset[Part] = frozenset({"policy", "feedback"})
"""What the visit is about; the reward model would start a torch of its own beside the engine's."""
ANSWER_WITHIN_S = 60.0


def visit(run: Path, *, say: Say) -> None:
    """Serves a finished run, asks it a held-out question and sends one rating back; says what came, and where to look.

    Raises `InfrastructureError` where the service does not start or does not answer in time, `Interrupted` on a signal.
    """
    _, run_config = existing_run(run)
    home = (run / "service").absolute()
    files = {"registry": home / "registry", "store": str(home / "feedback.db"), "keys": str(home / "keys.db")}
    config = ServiceConfig(**files, port=_free_port(), parts=PARTS)
    prepare(run, config, say=say)
    with serving(config, address=None, say=say) as stopping:
        if not stopping.asked:
            ask_and_rate(f"http://{config.host}:{config.port}", run_config, make_recipe(run_config), say=say)
    if stopping.asked:
        raise Interrupted(f"stopped on {stopping.asked.name}; the run is done", 128 + stopping.asked)
    say(where_to_look(run))


def ask_and_rate(address: str, config: Config, recipe: Recipe, *, say: Say) -> None:
    """One held-out question to the service at `address`, and a rating of 1 to 5 for what it answers."""
    import openai

    prompt = recipe.held_out_prompts[0]
    # one try: nothing else is asking, so what fails now fails again
    ask = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=ANSWER_WITHIN_S)
    try:
        answer = ask.chat.completions.create(
            model="policy",
            messages=cast(Any, [{"role": message.role, "content": message.content} for message in prompt.messages]),
            max_tokens=config.rollout.max_tokens,
            seed=config.seed,
        )
    except openai.OpenAIError as error:
        raise InfrastructureError(f"the service did not answer: {error}") from error
    text = answer.choices[0].message.content or ""
    say(f"asked:    {prompt.messages[-1].content}")
    say(f"answered: {text} (policy version {cast(Any, answer).policy_version})")
    gold = recipe.gold(prompt, text)
    with Client(address) as client:
        rating = 3 if gold is None else round(1 + 4 * gold)
        kept = client.rate(answer.id, rating, annotator=VISITOR)
    say(f"rated:    {rating} of 5, kept as {kept.id}")


def where_to_look(run: Path) -> str:
    """What a person may open or type next."""
    return "\n".join(
        [
            "Where to look:",
            f"  report     {run / 'report.html'}",
            f"  curves     tensorboard --logdir {run / 'tensorboard'}",
            f"  feedback   rlhf feedback stats --store {run / 'feedback.db'}   (and {run / 'service' / 'feedback.db'})",
            f"  serve it   rlhf serve {run}   (then http://127.0.0.1:8000/docs has every route)",
            "  docs       README.md, docs/",
        ]
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
