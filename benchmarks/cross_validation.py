"""How well do reward models predict what people said, each judgement held out once? On real feedback.

    python benchmarks/cross_validation.py harmless-base-test.jsonl.gz --format hh
    python benchmarks/cross_validation.py mqm_ted_ende.tsv.gz --format mqm
    python benchmarks/cross_validation.py harmless-base-test.jsonl.gz --format hh --ways frozen,tuned --body FOLDER

Five folds by group: by first turn in dialogues, by document in translations. All language that is used but for --body
is the file's own. `decoder`: a language model of a million parameters, learnt from scratch on every turn, liked or not,
and then taught what people prefer. `imitator`: the same, which has imitated the answers that people liked, those that
are held out among them, before it is taught: what that is worth is no merit. `encoder`: a BERT of that size that knows
nothing beforehand. `line`: one through the decoder's features. With --body, a pretrained model's folder: `frozen`, a
line through its features, and `tuned`, all of it taught. Intervals are over groups.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config import load_config
from rlhf_ray.models.folder import quiet_transformers
from rlhf_ray.training.base_policy import make_base_policy
from rlhf_ray.training.recipe import make_preferences
from rlhf_ray.training.reward.validate import cross_validate

SHARED = [
    "recipe=preferences",
    "data.on_bad_row=skip",
    "data.held_out=1",
    "model.vocabulary=2048",
    "model.context=256",
    "pretrain={learning_rate: 2e-3, max_epochs: 3, eval_every: 200, patience: 3, min_improvement: 0.01}",
    "sft={learning_rate: 1e-3, max_epochs: 4, patience: 3}",
]
FIT = "reward_model.fit={learning_rate: 3e-4, batch_size: %d, max_epochs: %d, eval_every: 50, weight_decay: 0.1}"
FORMATS = {
    "hh": ["reward_model.feedback=pairs", FIT % (16, 2)],
    "mqm": ["reward_model.feedback=ratings", FIT % (28, 4)],
}
WAYS: dict[str, list[str]] = {
    "decoder": [],
    "imitator": [],
    "encoder": ["reward_model.backbone=encoder"],
    "line": ["reward_model.backbone=linear", "reward_model.linear.penalty=100"],
    "frozen": ["reward_model.backbone=linear", "reward_model.linear.penalty=100"],
    "tuned": ["reward_model.backbone=encoder", "reward_model.fit.learning_rate=5e-5", "reward_model.fit.max_epochs=1"],
}
BY_THE_BODY = ("frozen", "tuned")


def main() -> None:
    """Prints a row a way, and what length alone would have said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--ways", help=f"with commas between them, of {', '.join(WAYS)}")
    parser.add_argument("--body", type=Path, help="a pretrained model's folder")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], help="more settings, as for rlhf run")
    options = parser.parse_args()
    ways = options.ways.split(",") if options.ways else [way for way in WAYS if way not in BY_THE_BODY]
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    if options.body is None and set(ways) & set(BY_THE_BODY):
        parser.error(f"{' and '.join(BY_THE_BODY)} are about a pretrained model: say where it lies, --body FOLDER")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        for number, way in enumerate(ways):
            began = time.monotonic()
            told = validated(way, Path(scratch), options)
            if number == 0:
                print_baselines(told)
            print_row(way, told, seconds=time.monotonic() - began)


def validated(way: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What `cross_validate` finds."""
    base = scratch / ("imitator" if way == "imitator" else "decoder")
    settings = [*SHARED, f"data.path={options.file}", f"data.format={options.format}", *FORMATS[options.format]]
    settings += [*WAYS[way], *([f"reward_model.body={options.body}"] if way in BY_THE_BODY else []), *options.set]
    if way != "imitator":
        settings.append("sft.max_epochs=0")
    if way in BY_THE_BODY:  # whose language nobody reads
        settings.append("pretrain.max_epochs=0")
        base = scratch / "unread"
    config = load_config(None, settings)
    recipe = make_preferences(config)
    if not base.exists():
        make_base_policy(config, base, say=lambda line: print(f"  {line}", flush=True))
    return cross_validate(
        base,
        [*recipe.train, *recipe.held_out],
        config=config.reward_model,
        folds=options.folds,
        seed=config.seed,
        progress=lambda line: None,
    )


def print_baselines(told: dict[str, Any]) -> None:
    """Longer and shorter answers win; and of ratings, what the lengths of prompt and answer say."""
    print(f"{told['pairs']} pairs in {told['groups']} groups, {told['folds']} folds")
    for name in ("longer", "shorter", "majority"):
        low, high = told[name]["accuracy_ci95"]
        print(f"{name:<12} accuracy {told[name]['accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    for name, ratings in told["ratings_by_length"].items():
        if ratings is not None:
            print(f"{name:<16} {order(ratings)}")


def print_row(way: str, told: dict[str, Any], *, seconds: float) -> None:
    """Accuracy, and the order of what was rated."""
    low, high = told["accuracy_ci95"]
    folds = " ".join(f"{accuracy:.3f}" for accuracy in told["by_fold"])
    line = f"{way:<12} accuracy {told['accuracy']:.3f} [{low:.3f}, {high:.3f}] (folds {folds})"
    if told["ratings"] is not None:
        line += f", {order(told['ratings'])}"
    print(f"{line}, {seconds:.0f} s", flush=True)


def order(ratings: dict[str, Any]) -> str:
    """Spearman's correlation over all, and within what one person said of one prompt's answers."""
    return ", ".join(
        f"{name} {found['spearman']:+.3f} [{found['ci95'][0]:+.3f}, {found['ci95'][1]:+.3f}]"
        for name, found in ratings.items()
        if found is not None
    )


if __name__ == "__main__":
    main()
