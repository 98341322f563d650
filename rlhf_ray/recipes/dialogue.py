"""`dialogue`: a small shop answers its customers.

The world is invented and generated: a customer writes about one thing (a colour and an item) and one problem. A
good answer thanks, repeats the right thing and trouble, promises the remedy that this problem has, says the next
step and closes kindly. Demonstrations were written by people of mixed skill: each piece of each is right or flawed
by a coin of its own, so that imitation alone ends at about half of what is possible.

Held-out prompts are about combinations of thing and problem that no training text contains, each about another one.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.config import DataConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.recipes import dialogue_phrases as phrases
from rlhf_ray.recipes.dialogue_gold import gold_score, remark
from rlhf_ray.recipes.dialogue_phrases import COLOURS, ITEMS, PROBLEMS, Problem
from rlhf_ray.types import Exchange, Message, Prompt

PROMPTS_A_CASE = 4
DEMONSTRATIONS_A_PROMPT = 3


@dataclass(frozen=True, slots=True)
class Case:
    """What one customer writes about."""

    thing: str
    problem: Problem


@dataclass(frozen=True, slots=True)
class Skill:
    """How often a demonstrator gets each piece wrong; chances are independent of each other."""

    wrong_thing: float = 0.04
    wrong_remedy: float = 0.03
    no_remedy: float = 0.35
    no_step: float = 0.4
    wrong_step: float = 0.03
    no_sorry: float = 0.4
    rude_opener: float = 0.45
    rude_closer: float = 0.4
    repeats: float = 0.12
    rambles: float = 0.15


class DialogueRecipe:
    """The generated shop. Two recipes of one seed are equal."""

    def __init__(self, data: DataConfig, *, seed: int) -> None:
        self._rng = random.Random(f"dialogue/{seed}")
        cases = [Case(f"{colour} {item}", problem) for colour in COLOURS for item in ITEMS for problem in PROBLEMS]
        self._rng.shuffle(cases)
        self._cases: dict[str, Case] = {}
        self.held_out_prompts: Sequence[Prompt] = self._ask(cases, data.held_out, a_case=1)
        self.train_prompts: Sequence[Prompt] = self._ask(cases, data.prompts - data.held_out, a_case=PROMPTS_A_CASE)
        self._demonstrations = [
            Exchange(prompt, demonstrate(self._cases[prompt.id], Skill(), self._rng))
            for prompt in self.train_prompts
            for _ in range(DEMONSTRATIONS_A_PROMPT)
        ]
        self._corpus = [text for prompt in self.train_prompts for text in papers(self._cases[prompt.id], self._rng)]

    def corpus(self) -> list[str]:
        """The shop's handbook and ledger, about training cases only."""
        return list(self._corpus)

    def demonstrations(self) -> list[Exchange]:
        """Several answers of mixed quality to each training prompt."""
        return list(self._demonstrations)

    def gold(self, prompt: Prompt, response: str) -> float | None:
        """`quality` of answers to this world's prompts; None of what else people may have asked a served policy."""
        return self.quality(prompt, response) if prompt.id in self._cases else None

    def quality(self, prompt: Prompt, response: str) -> float:
        """See `dialogue_gold.gold_score`."""
        case = self._cases[prompt.id]
        return gold_score(case.thing, case.problem.name, response)

    def case(self, prompt: Prompt) -> Case:
        """What a prompt is about."""
        return self._cases[prompt.id]

    def remark(self, prompt: Prompt, response: str) -> str:
        """What a simulated annotator would write about an answer."""
        case = self._cases[prompt.id]
        return remark(case.thing, case.problem.name, response)

    def _ask(self, cases: list[Case], n: int, *, a_case: int) -> list[Prompt]:
        """`n` distinct prompts, `a_case` to each case; takes the cases away: no other prompt will be about them."""
        prompts: list[Prompt] = []
        while len(prompts) < n:
            if not cases:
                raise ConfigError(f"data.prompts: this world has only {len(self._cases)} prompts; ask for fewer")
            case = cases.pop()
            group = f"case-{len(cases)}"
            for place, text in enumerate(self._rng.sample(questions(case), a_case)[: n - len(prompts)]):
                prompts.append(Prompt(f"{group}-{place}", (Message("user", text),), group=group))
                self._cases[prompts[-1].id] = case
        return prompts


def questions(case: Case) -> list[str]:
    """Every way in which a customer may put a case."""
    complaints = [complaint.format(thing=case.thing) for complaint in case.problem.complaints]
    ways = itertools.product(phrases.GREETINGS, complaints, phrases.ENDINGS)
    return [" ".join(sentence for sentence in way if sentence) for way in ways]


def demonstrate(case: Case, skill: Skill, rng: random.Random) -> str:
    """An answer by a demonstrator of that skill."""

    def slips(chance: float) -> bool:
        return rng.random() < chance

    thing = _other_thing(case.thing, rng) if slips(skill.wrong_thing) else case.thing
    remedy = _other_problem(case.problem, rng) if slips(skill.wrong_remedy) else case.problem
    step = _other_problem(case.problem, rng) if slips(skill.wrong_step) else case.problem
    pieces = [rng.choice(phrases.RUDE_OPENERS if slips(skill.rude_opener) else phrases.POLITE_OPENERS)]
    if not slips(skill.no_sorry):
        pieces.append(rng.choice(phrases.SORRY).format(thing=thing, fact=rng.choice(case.problem.facts)))
    if not slips(skill.no_remedy):
        pieces.append(rng.choice(remedy.remedies))
    if not slips(skill.no_step):
        pieces.append(rng.choice(step.steps))
    if slips(skill.repeats):
        at = rng.randrange(len(pieces))
        pieces[at:at] = [pieces[at]] * rng.choice((1, 2))
    if slips(skill.rambles):
        pieces.extend(rng.sample(phrases.FILLERS, rng.choice((2, 3))))
    pieces.append(rng.choice(phrases.RUDE_CLOSERS if slips(skill.rude_closer) else phrases.POLITE_CLOSERS))
    return " ".join(pieces)


def papers(case: Case, rng: random.Random) -> list[str]:
    """Texts that speak of a case without being an answer: a note of the shop's handbook, and a page of its ledger."""
    problem = case.problem
    fact, remedy, step = (rng.choice(ways) for ways in (problem.facts, problem.remedies, problem.steps))
    note = f"When a {case.thing} {fact}: {remedy} {step}"
    things = [case.thing, _other_thing(case.thing, rng)]
    rng.shuffle(things)
    order = " and ".join(f"a {thing}" for thing in things)
    ledger = f"Order: {order}. Packed: {order}. Returned: {rng.choice(things)}. Kept: {rng.choice(things)}."
    return [note, ledger]


def _other_thing(thing: str, rng: random.Random) -> str:
    while True:
        other = f"{rng.choice(COLOURS)} {rng.choice(ITEMS)}"
        if other != thing:
            return other


def _other_problem(problem: Problem, rng: random.Random) -> Problem:
    return rng.choice([other for other in PROBLEMS if other is not problem])
