import random

import pytest

from rlhf_ray.data.weak_labels import CommentModel

SAID = {"Just what I needed.": 1.5, "That was rude.": -0.5, "This is about something else.": -1.5}


def drawn(n: int, *, noise: float = 0.0, seed: int = 0) -> tuple[list[str], list[float]]:
    rng = random.Random(seed)
    texts = rng.choices(list(SAID), k=n)
    return texts, [SAID[text] + rng.gauss(0, noise) for text in texts]


def test_words_are_worth_what_was_given_with_them() -> None:
    model = CommentModel(*drawn(60))
    worth, sure = model.read([*SAID, "That was not rude, it is what I needed."])
    assert worth[:3] == pytest.approx(list(SAID.values()), abs=0.05)
    assert min(sure[:3]) > 0.95
    assert -0.5 < worth[3] < 1.5


def test_it_is_as_sure_as_the_words_tell() -> None:
    """With noise of variance v on ratings of variance s, words account for 1 - v / (s + v)."""
    texts, targets = drawn(400, noise=1.0)
    model = CommentModel(texts, targets)
    _, sure = model.read(list(SAID))
    spread = sum((SAID[text] - sum(SAID[t] for t in texts) / 400) ** 2 for text in texts) / 400
    assert sum(sure) / 3 == pytest.approx(spread / (spread + 1), abs=0.08)


def test_of_words_that_have_nothing_to_do_with_ratings_it_is_not_sure() -> None:
    rng = random.Random(1)
    texts, _ = drawn(200)
    model = CommentModel(texts, [rng.gauss(0, 1) for _ in texts])
    assert max(model.read(list(SAID))[1]) < 0.1


def test_of_words_that_it_has_never_seen_it_says_the_mean() -> None:
    texts, targets = drawn(100)
    worth, sure = CommentModel(texts, targets).read(["Zyzzyva"])
    [known] = CommentModel(texts, targets).read(["That was rude."])[1]
    assert abs(worth[0]) < max(map(abs, targets))
    assert sure[0] < known


def test_remarks_add_up() -> None:
    rng = random.Random(0)
    marks = [rng.choices(["Minor fluency", "Major accuracy"], k=rng.randint(1, 4)) for _ in range(200)]
    model = CommentModel(
        ["\n".join(some) for some in marks], [-sum(5 if "Major" in m else 1 for m in some) for some in marks]
    )
    one, three = model.read(["Major accuracy", "Major accuracy\nMajor accuracy\nMinor fluency"])[0]
    assert (one, three) == (pytest.approx(-5, abs=0.1), pytest.approx(-11, abs=0.1))


def test_what_moves_it_most_is_shown() -> None:
    texts, targets = drawn(200)
    terms = [term for term, _ in CommentModel(texts, targets).loudest(30)]
    assert {"needed", "else", "about something"} <= set(terms)
