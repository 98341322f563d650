"""`rlhf eval`: two policies answer the same held-out prompts, and who wins is counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_ray.errors import InputError
from rlhf_ray.feedback.sheets import write_sheet
from rlhf_ray.models.files import read_folder
from rlhf_ray.models.policy import load_tokenizer
from rlhf_ray.roles.placement import start_ray
from rlhf_ray.training.evaluate import compare, evaluate
from rlhf_ray.training.recipe import drop_long_prompts, make_recipe
from rlhf_ray.training.run_folder import RunFolder, existing_run

Say = Callable[[str], None]


def versus(
    run: Path, other: Path | None, *, judge: Path | None, samples: int, say: Say, sheet: Path | None = None
) -> dict[str, Any]:
    """What a run's policy is worth beside another: `evaluate.compare`, with the other one as what came before.

    `other`: a policy folder, or a run, whose policy it is then; None: the run's own base policy. `judge`: a reward
    model that scores both, by default the run's own. Both answer the run's held-out prompts, `samples` times each; the
    draws follow from the run's seed, so the same command gives the same figures. `sheet`: a new file in which people
    can judge the first answers of both.
    """
    if sheet is not None and sheet.exists():
        raise InputError(f"{sheet} is there already, and may hold people's judgements: give another name")
    folder, config = existing_run(run)
    ours, theirs = _policy_of(run, folder), _other(other, folder)
    if ours.resolve() == theirs.resolve():
        raise InputError(f"{theirs} is the run's own policy: give another one with --against, or --against-base")
    if judge is None and not folder.reward_model.is_dir():
        raise InputError(
            f"{run} has no reward model of its own: name one that scores both policies with --judge FOLDER"
        )
    judge = judge or folder.reward_model
    read_folder(judge, "reward model")
    recipe = make_recipe(config)
    tokenizers = {policy: load_tokenizer(policy, context=config.model.context) for policy in (theirs, ours)}
    for tokenizer in tokenizers.values():
        drop_long_prompts(recipe, tokenizer, config)  # for both, so that both answer the same
    with start_ray(config) as placement:
        scorers = placement.start_scorers(judge)
        evaluations = []
        for policy, tokenizer in tokenizers.items():
            say(f"{samples} answers to each of {len(recipe.held_out_prompts)} prompts from {policy}")
            generators = placement.start_generators(policy, weights_step=0, say=say)
            placement.wait_ready()
            evaluations.append(
                evaluate(
                    recipe, generators, scorers, tokenizer=tokenizer, config=config, samples=samples, name="versus"
                )
            )
            placement.stop(generators)
    if sheet is not None:
        pairs = [
            (mine[0], other[0]) for mine, other in zip(evaluations[1].answers, evaluations[0].answers, strict=True)
        ]
        rows = write_sheet(
            sheet, recipe.held_out_prompts, pairs, samplers=(_name(ours), _name(theirs)), seed=config.seed
        )
        say(
            f"{rows} rows to judge in {sheet}; once filled in: rlhf feedback import {sheet} --format sheet "
            "--annotator NAME --store FILE, then rlhf feedback wins --store FILE"
        )
    return {
        "policy": str(ours),
        "against": str(theirs),
        "judge": str(judge),
        "prompts": len(recipe.held_out_prompts),
        "samples": samples,
        **compare(*evaluations, seed=config.seed),
    }


def _name(policy: Path) -> str:
    """As which its answers are fed back: run and folder."""
    return "/".join(policy.resolve().parts[-2:])


def _policy_of(run: Path, folder: RunFolder) -> Path:
    if not folder.policy.is_dir():
        raise InputError(f"{run} has no policy yet: run its command again until it is done")
    return folder.policy


def _other(given: Path | None, folder: RunFolder) -> Path:
    if given is None:
        return folder.base_policy
    if (given / "config.yaml").is_file():
        return _policy_of(given, existing_run(given)[0])
    read_folder(given, "policy")
    return given
