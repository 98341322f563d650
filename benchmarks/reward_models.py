"""What is feedback worth to a reward model? Asked where the truth is known: of the `dialogue` recipe.

    python benchmarks/reward_models.py kinds runs/demo         # each kind, and all together, in the same time
    python benchmarks/reward_models.py comments runs/demo      # four judgements of five are words: with and without
    python benchmarks/reward_models.py noise runs/demo         # 10, 20, 30% of choices wrong: plain and otherwise
    python benchmarks/reward_models.py adversaries runs/demo   # 5 and 20% of people choose the worse: filtered or not

Answers are those of RUN's base policy that were judged there; people are simulated, anew with each seed, as are the
split (30% of the prompts are held out) and the model. Accuracy is the share of held-out pairs of answers, told apart by
the gold score, that the model puts in the right order. Differences are paired by seed, with Student's 95% interval.

A fit takes one to four minutes on one core. What is done lies in --keep, and is not done again by the same command.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.algo.clusters import mean_of
from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import Comparison
from rlhf_ray.data.reading import Reader
from rlhf_ray.feedback.schema import Answer, Comment, Feedback, Ranking, Rating, competition_ranks
from rlhf_ray.models.folder import quiet_transformers
from rlhf_ray.recipes.annotators import TIE
from rlhf_ray.recipes.dialogue import DialogueRecipe
from rlhf_ray.training.frozen import read_frozen
from rlhf_ray.training.recipe import make_recipe
from rlhf_ray.training.reward.learn import learn, learnable_of
from rlhf_ray.training.reward.measure import margins_of
from rlhf_ray.training.run_folder import existing_run
from rlhf_ray.types import Prompt

READ_PROMPT, READ_ANSWER = 4.0, 6.0
SAY = {"pairs": 4.0, "rankings": 20.0, "ratings": 4.0, "thumbs": 1.5, "comments": 15.0}
"""Seconds: to read, and then to choose between two answers, to order six, to give one stars or a thumb, to write a
sentence about one. Whoever has read six answers may say several things of them."""
ANSWERS = 6
MOST_FOES = 4
"""Of twenty people."""
HELD_OUT = 0.3
FIT = {"learning_rate": 7e-4, "batch_size": 12, "max_epochs": 8, "eval_every": 40, "patience": 4}
UP_FROM = 0.6
"""Gold that is worth a thumb up."""


@dataclass(frozen=True)
class Person:
    """Somebody who judges: the share of choices that they get wrong, and how they rate."""

    name: str
    flip: float = 0.1
    bias: float = 0.0
    noise: float = 0.5
    """Standard deviation of stars."""
    foe: bool = False
    """Says the opposite of what they see."""


class World:
    """Prompts with the base policy's answers, split by a seed."""

    def __init__(self, run: Path, seed: int) -> None:
        folder, config = existing_run(run)
        recipe = make_recipe(config)
        assert isinstance(recipe, DialogueRecipe), "the truth is known of the dialogue recipe alone"
        self.recipe, self.base, self.rng, self.seed = recipe, folder.base_policy, random.Random(seed), seed
        answers: dict[str, dict[str, None]] = {}
        prompts: dict[str, Prompt] = {}
        snapshot = folder.read_json("feedback.json")["snapshot"]
        for item in read_frozen(folder.store(config), snapshot, config=config, say=print):
            prompts[item.prompt_id] = item.prompt
            answers.setdefault(item.prompt_id, {}).update(dict.fromkeys(answer.text for answer in item.answers))
        several = {prompt: list(texts) for prompt, texts in answers.items() if len(texts) >= 4}
        groups = sorted({prompts[prompt].group for prompt in several})
        out = set(self.rng.sample(groups, round(HELD_OUT * len(groups))))
        sides: tuple[list[Prompt], list[Prompt]] = ([], [])
        for name in several:
            sides[prompts[name].group in out].append(prompts[name])
        self.train, self.held_out, self.answers = sides[0], sides[1], several
        self.rng.shuffle(self.train)

    def truth(self) -> list[Comparison]:
        """Every two held-out answers that gold tells apart."""
        return [
            Comparison(prompt, better, worse)
            for prompt in self.held_out
            for better in self.answers[prompt.id]
            for worse in self.answers[prompt.id]
            if self.recipe.quality(prompt, better) - self.recipe.quality(prompt, worse) >= TIE
        ]

    def draw(self, answers: int) -> Iterator[tuple[Prompt, list[str]]]:
        """Training prompts with so many of their answers, for ever."""
        while True:
            for prompt in self.rng.sample(self.train, len(self.train)):
                texts = self.answers[prompt.id]
                yield prompt, self.rng.sample(texts, min(answers, len(texts)))

    def order(self, person: Person, prompt: Prompt, texts: Sequence[str]) -> Feedback:
        """Answers in order of quality; each comparison with a neighbour comes out wrong now and then."""
        seen = {text: self.recipe.quality(prompt, text) * (-1 if person.foe else 1) for text in texts}
        line: list[str] = []
        for text in texts:
            place = 0
            while place < len(line) and (seen[text] < seen[line[place]]) != (self.rng.random() < person.flip):
                place += 1
            line.insert(place, text)
        scores = [float(-line.index(text)) for text in texts]
        if len(texts) == 2 and abs(seen[texts[0]] - seen[texts[1]]) < TIE:
            scores = [0.0, 0.0]
        return said(person, prompt, texts, ranking=Ranking(ranks=competition_ranks(scores)))

    def rate(self, person: Person, prompt: Prompt, text: str) -> Feedback:
        """One to five stars."""
        gold = self.recipe.quality(prompt, text)
        stars = 1 + 4 * (1 - gold if person.foe else gold) + person.bias + self.rng.gauss(0, person.noise)
        return said(person, prompt, [text], rating=Rating(value=float(min(5, max(1, round(stars))))))

    def thumb(self, person: Person, prompt: Prompt, text: str) -> Feedback:
        """Up or down."""
        up = (self.recipe.quality(prompt, text) >= UP_FROM) != (self.rng.random() < person.flip)
        return said(person, prompt, [text], rating=Rating(value=float(up), scale="thumb"))

    def comment(self, person: Person, prompt: Prompt, text: str) -> Feedback:
        """A sentence, which now and then belongs to another answer."""
        about = self.rng.choice(self.answers[prompt.id]) if self.rng.random() < person.flip else text
        return said(person, prompt, [text], comment=Comment(text=self.recipe.remark(prompt, about)))

    def accuracy(self, given: Sequence[Feedback], **config: object) -> float:
        """Of a reward model that learns from it as the config says."""
        told = RewardModelConfig.model_validate({"fit": FIT, **config})
        reader = Reader(given, weigh=told.reliability, margin=told.margin)
        train = reader.read(given, all_comments=told.feedback == "comments")
        with tempfile.TemporaryDirectory() as scratch:
            model, *_ = learn(
                self.base,
                learnable_of(train, told, seed=self.seed),
                config=told,
                seed=self.seed,
                stage="fit",
                progress=lambda line: None,
                folder=Path(scratch),
            )
        margins = margins_of(model, self.truth())
        return sum(margin > 0 for margin in margins) / len(margins)


def said(person: Person, prompt: Prompt, texts: Sequence[str], **judgement: object) -> Feedback:
    """One judgement of theirs."""
    return Feedback(
        messages=prompt.messages,
        prompt_id=prompt.id,
        group=prompt.group,
        annotator=person.name,
        answers=tuple(Answer(text=text, sampler="base-policy") for text in texts),
        created_at=datetime(2026, 1, 5, tzinfo=UTC),
        **judgement,  # type: ignore[arg-type]
    )


def crowd(count: int, rng: random.Random, *, flips: Sequence[float] = (0.1,), foes: int = 0) -> list[Person]:
    """People whose flips go round; the first of them are foes, who are sure of what they do."""
    return [
        Person(f"person-{n}", 0.0 if n < foes else flips[n % len(flips)], rng.gauss(0, 0.3), foe=n < foes)
        for n in range(count)
    ]


Asked = Iterator[tuple[str, list[Feedback], dict[str, Any]]]
"""What a fit is called, what it learns from, and the settings of the reward model."""
Question = Callable[[Callable[[], World], argparse.Namespace], Asked]
"""Of worlds of one seed, which are begun anew at will."""


def kinds(begin: Callable[[], World], options: argparse.Namespace) -> Asked:
    """Each kind for all of the time, and all of them together: of six answers read their order, stars and a thumb for
    each, and a sentence about one; and of what was said then, the ratings alone.
    """
    world = begin()
    people = crowd(8, world.rng)
    budget = options.hours * 3600

    def sit(kinds: Sequence[str]) -> list[Feedback]:
        shown, found, spent, turn = world.draw(2 if kinds == ["pairs"] else ANSWERS), [], 0.0, 0
        while spent < budget:
            person, (prompt, texts) = people[turn % len(people)], next(shown)
            turn += 1
            spent += READ_PROMPT + READ_ANSWER * len(texts)
            for kind in kinds:
                if kind in ("pairs", "rankings"):
                    found.append(world.order(person, prompt, texts))
                    spent += SAY[kind]
                elif kind == "comments":
                    about = texts if kinds == ["comments"] else texts[:1]
                    found += [world.comment(person, prompt, text) for text in about]
                    spent += SAY[kind] * len(about)
                    if kinds == ["comments"]:  # one in six is rated too, or nobody would know what words are worth
                        found.append(world.rate(person, prompt, texts[0]))
                        spent += SAY["ratings"]
                else:
                    say = world.rate if kind == "ratings" else world.thumb
                    found += [say(person, prompt, text) for text in texts]
                    spent += SAY[kind] * len(texts)
        return found

    for kind in SAY:
        yield kind, sit([kind]), {"feedback": kind}
    everything = sit(["rankings", "ratings", "thumbs", "comments"])
    yield "joint", everything, {"feedback": "joint"}
    yield "of it the ratings", everything, {"feedback": "ratings"}


def comments(begin: Callable[[], World], options: argparse.Namespace) -> Asked:
    """One judgement in five is a rating with words, four are words alone."""
    world = begin()
    people = crowd(8, world.rng)
    n, shown, found = options.judgements, world.draw(1), []
    for number in range(n):
        person, (prompt, [text]) = people[number % len(people)], next(shown)
        found.append(world.comment(person, prompt, text))
        if number % 5 == 0:
            found.append(world.rate(person, prompt, text))
    yield "ratings alone", [item for item in found if item.comment is None], {"feedback": "joint"}
    yield "and words", found, {"feedback": "joint"}


def noise(begin: Callable[[], World], options: argparse.Namespace) -> Asked:
    """Choices between two answers, each by two people, who differ: none of their choices wrong, to twice the mean."""
    for mean in (0.1, 0.2, 0.3):
        world = begin()
        people = crowd(8, world.rng, flips=[mean * 2 * n / 7 for n in range(8)])
        shown = world.draw(2)
        asked = [next(shown) for _ in range(options.judgements // 2)]
        found = [world.order(person, *one) for one in asked for person in world.rng.sample(people, 2)]
        yield f"{mean:.0%} wrong, plain", found, {"reliability": False}
        yield f"{mean:.0%} wrong, smoothed", found, {"reliability": False, "smoothing": mean}
        yield f"{mean:.0%} wrong, by reliability", found, {}


def adversaries(begin: Callable[[], World], options: argparse.Namespace) -> Asked:
    """Orders of four answers, each by two of twenty people, some of whom put the worst first, each for themselves."""
    for foes in (0, 1, MOST_FOES):
        world = begin()
        people = crowd(20, world.rng, foes=foes)
        shown = world.draw(4)
        asked = [next(shown) for _ in range(options.judgements // 2)]
        found = [world.order(person, *one) for one in asked for person in world.rng.sample(people, 2)]
        yield f"{foes / 20:.0%} foes, filtered", found, {}
        if foes == MOST_FOES:
            yield f"{foes / 20:.0%} foes, as they are", found, {"reliability": False}


QUESTIONS: dict[str, tuple[Question, int]] = {
    "kinds": (kinds, 0),
    "comments": (comments, 2000),
    "noise": (noise, 2000),
    "adversaries": (adversaries, 1600),
}


def main() -> None:
    """Prints accuracies by seed, their means, and every difference to the first, or best, with its interval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("run", type=Path, help="a run of the dialogue recipe with its feedback")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--hours", type=float, default=20, help="of people's time, for kinds")
    parser.add_argument("--judgements", type=int, help="for the others")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a file that what is done is added to, a line a fit")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ask, judgements = QUESTIONS[options.question]
    options.judgements = options.judgements or judgements
    print(f"{options.question}: {len(World(options.run, 0).truth())} held-out pairs with seed 0", flush=True)
    found: dict[str, list[float]] = {}
    with quiet_transformers():
        for seed in range(options.seeds):
            for name, accuracy in asked(ask, seed, options):
                found.setdefault(name, []).append(accuracy)
    names = list(found)
    print(f"{'':<28}{'mean':>8}{'least':>8}{'most':>8}   {'less the first, paired':<28}less the one before")
    for before, name in zip([None, *names], names, strict=False):
        values = found[name]
        gaps = [] if before is None else [difference(values, found[other]) for other in (names[0], before)]
        row = f"{name:<28}{statistics.fmean(values):>8.4f}{min(values):>8.4f}{max(values):>8.4f}   "
        print(row + "".join(f"{gap:<28}" for gap in gaps))
    if options.question == "kinds":
        best = max(SAY, key=lambda name: statistics.fmean(found[name]))
        print(f"joint less {best}, the best by itself: {difference(found['joint'], found[best])}")


def asked(ask: Question, seed: int, options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """What the fits of one seed are called, and how right they are."""
    kept: dict[str, float] = {}
    which = {"question": options.question, "seed": seed, "hours": options.hours, "judgements": options.judgements}
    if options.keep and options.keep.exists():
        for line in options.keep.read_text().splitlines():
            fit = json.loads(line)
            if {name: fit[name] for name in which} == which:
                kept[fit["fit"]] = fit["accuracy"]
    world = World(options.run, seed)  # whose split and answers all worlds of the seed have
    for name, given, config in ask(lambda: World(options.run, seed), options):
        if name not in kept:
            began = time.monotonic()
            kept[name] = world.accuracy(given, **config)
            print(f"seed {seed}: {name} {kept[name]:.4f} ({time.monotonic() - began:.0f} s)", flush=True)
            if options.keep:
                with options.keep.open("a") as file:
                    file.write(json.dumps({**which, "fit": name, "accuracy": kept[name]}) + "\n")
        yield name, kept[name]


def difference(one: Sequence[float], other: Sequence[float]) -> str:
    """Its mean over seeds, and Student's 95% interval."""
    gaps = mean_of([a - b for a, b in zip(one, other, strict=True)], range(len(one)))
    return f"{gaps.value:+.4f} [{gaps.low:+.4f}, {gaps.high:+.4f}]"


if __name__ == "__main__":
    main()
