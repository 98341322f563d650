import random

import pytest

from rlhf_ray.data.weak_labels import AT_A_TIME, CommentModel, _terms

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


SPLIT = {
    "Chinese": (["这个回答", "它", "对方"], ["真的", "其实", "总体来说"], ["很好", "非常有帮助"], ["很差", "说错了"]),
    "Japanese": (["この答えは", "それは"], ["本当に", "全体として"], ["すばらしい", "役に立つ"], ["ひどい", "間違い"]),
    "Thai": (["คำตอบนี้", "มัน"], ["จริงๆ", "โดยรวม"], ["ดีมาก", "มีประโยชน์"], ["แย่มาก", "ไม่ถูกต้อง"]),
}
"""By language: whom a comment is about, a filler, praise and blame."""


@pytest.mark.parametrize("language", SPLIT)
def test_words_are_found_in_scripts_that_put_no_spaces_between_them(language: str) -> None:
    """Each comment is put together anew, and most are clauses that were not seen before."""
    rng, (whom, filler, praise, blame) = random.Random(0), SPLIT[language]
    good = [rng.random() < 0.5 for _ in range(200)]
    texts = [
        "".join(rng.choice(part) for part in (whom, filler, praise if fine else blame, filler, whom)) for fine in good
    ]
    model = CommentModel(texts[:100], [1.0 if fine else -1.0 for fine in good[:100]])
    worth, sure = model.read(texts[100:])
    assert [value > 0 for value in worth] == good[100:]
    assert min(sure) > 0.8


def test_terms_are_words_of_scripts_with_spaces_and_characters_of_the_others() -> None:
    assert [*_terms("It's 정말 좋은, naïve_Ответ")][:8] == ["it", "'", "s", "정말", "좋은", ",", "naïve", "ответ"]
    assert [*_terms("GPT很好!")] == ["gpt", "很", "好", "!", "gpt 很", "很 好", "好 !"]


def test_many_comments_are_never_all_in_memory_at_once() -> None:
    texts, targets = drawn(2 * AT_A_TIME + 1, noise=1.0)
    model = CommentModel(texts, targets)
    assert [len(part) for part in model._parts(texts)] == [AT_A_TIME, AT_A_TIME, 1]
    worth, sure = model.read(texts)
    assert (len(worth), len(sure)) == (len(texts), len(texts))
    assert dict(zip(texts, worth, strict=True)) == pytest.approx(SAID, abs=0.1)
    assert model.read([]) == ([], [])
