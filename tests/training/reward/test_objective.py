"""The one likelihood of all that was said, against its parts by themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.algo.feedback_losses import pair_losses, ranking_losses, thumb_losses
from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import Judgement, Ordered, Rated, Thumbed
from rlhf_ray.models.reward import RewardModel, new_reward_model
from rlhf_ray.training.reward.objective import (
    HASTE,
    RATING_NOISE,
    FeedbackLoss,
    Judged,
    RewardNetwork,
    judged,
    judgements_of,
    learnable,
    nats,
)
from rlhf_ray.types import Exchange
from tests.models.tiny import make_policy_folder, make_prompt

ONE, TWO = make_prompt("one"), make_prompt("two")
NO = torch.tensor([False])


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder: Path = tmp_path_factory.mktemp("base")
    made = new_reward_model(make_policy_folder(folder / "base"), "decoder")
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(0))
    return made


def config(feedback: str = "joint", **more: Any) -> RewardModelConfig:
    return RewardModelConfig(feedback=feedback, **more)


def loss_of(reward_model: RewardModel, items: list[Judgement], config: RewardModelConfig, **links: float) -> Tensor:
    network = RewardNetwork(reward_model.model, config)
    with torch.no_grad():
        for name, value in links.items():
            network.links[name].fill_(value / HASTE)
    loss = FeedbackLoss(reward_model)
    reward_model.model.eval()
    with torch.no_grad():
        return loss.loss(network, loss.collate(judged(reward_model, items, config)))


def test_a_prompts_answers_are_read_once_for_all_that_was_said_of_them(reward_model: RewardModel) -> None:
    items: list[Judgement] = [
        Ordered(ONE, ("a", "b"), (1, 2)),
        Ordered(ONE, ("c", "a"), (1, 2), weight=0.5),
        Rated(ONE, "b", -1.0),
        Thumbed(ONE, "c", up=True),
        Thumbed(TWO, "a", up=False),
    ]
    first, second = judged(reward_model, items, config())
    assert (len(first.texts), len(second.texts)) == (3, 1)
    assert first.pairs == [(0, 1, False, 0.0, 1.0), (2, 0, False, 0.0, 0.5)]
    assert (first.ratings, first.thumbs) == ([(1, 0, -1.0, 1.0)], [(2, 1.0, 1.0)])
    assert second.thumbs == [(0, 0.0, 1.0)]


def test_rankings_are_pairs_or_wholes_as_they_are_asked_for(reward_model: RewardModel) -> None:
    items: list[Judgement] = [Ordered(ONE, ("a", "b", "c"), (1, 2, 2))]
    [pairs] = judged(reward_model, items, config("pairs"))
    assert (len(pairs.pairs), pairs.rankings) == (2, [])
    [tied] = judged(reward_model, items, config("pairs", ties="davidson"))
    assert [pair[:3] for pair in tied.pairs] == [(0, 1, False), (0, 2, False), (1, 2, True)]
    for feedback in ("rankings", "joint"):
        [whole] = judged(reward_model, items, config(feedback))
        assert (whole.pairs, whole.rankings) == ([], [((0, 1, 2), (1, 2, 2), 1.0)])


def test_the_loss_is_the_sum_of_its_parts_by_weight(reward_model: RewardModel) -> None:
    items: list[Judgement] = [
        Ordered(ONE, ("a", "b"), (1, 2), margin=0.5, weight=2.0),
        Ordered(TWO, ("lamp", "chair", "a"), (2, 1, 3)),
        Rated(TWO, "a", -1.0, weight=0.5),
        Thumbed(ONE, "b", up=True),
    ]
    a, b, lamp, chair, other = (
        torch.tensor([score], dtype=torch.float32)
        for score in reward_model.score(
            [Exchange(ONE, "a"), Exchange(ONE, "b"), *(Exchange(TWO, t) for t in ("lamp", "chair", "a"))]
        )
    )
    wanted = (
        2 * pair_losses(a, b, tied=NO, margin=0.5)
        + 3 * ranking_losses(torch.stack([lamp, chair, other], dim=1), torch.tensor([[2, 1, 3]]))
        + 0.5 * (0.7 + 2.0 * other + 1) ** 2 / (2 * RATING_NOISE)
        + thumb_losses(b - 0.3, torch.ones(1))
    )
    links = {
        "offset": 0.7,
        "log_slope": torch.tensor(2.0).log().item(),
        "threshold": 0.3,
    }
    found = loss_of(reward_model, items, config(weights={"rankings": 3.0}), **links)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_terms_are_what_the_judgements_weigh(reward_model: RewardModel) -> None:
    items: list[Judgement] = [Ordered(ONE, ("a", "b", "c"), (1, 2, 3), weight=0.5), Thumbed(TWO, "a", up=True)]
    loss = FeedbackLoss(reward_model)
    assert loss.terms(loss.collate(judged(reward_model, items, config("pairs")))) == 1.5
    assert loss.terms(loss.collate(judged(reward_model, items, config("joint", weights={"thumbs": 3})))) == 0.5 + 3


def test_ratings_alone_are_plain_mse_of_the_score_itself(reward_model: RewardModel) -> None:
    network = RewardNetwork(reward_model.model, config("ratings"))
    assert {name for name, link in network.links.items() if not link.requires_grad} == {"log_slope"}
    items: list[Judgement] = [Rated(ONE, "a", 1.0), Rated(TWO, "b", -1.0)]
    a, b = reward_model.score([Exchange(ONE, "a"), Exchange(TWO, "b")])
    assert loss_of(reward_model, items, config("ratings")).item() == pytest.approx(
        ((a - 1) ** 2 + (b + 1) ** 2) / (2 * RATING_NOISE), rel=1e-4
    )


def test_centring_pulls_the_mean_of_a_prompts_answers(reward_model: RewardModel) -> None:
    items: list[Judgement] = [Ordered(ONE, ("a", "b"), (1, 2)), Ordered(TWO, ("a", "b"), (1, 2))]
    scores = torch.tensor(reward_model.score([Exchange(p, t) for p in (ONE, TWO) for t in ("a", "b")])).view(2, 2)
    plain, pulled = (loss_of(reward_model, items, config("pairs", centring=c)).item() for c in (0.0, 0.1))
    assert pulled - plain == pytest.approx(0.1 * float(scores.mean(1).square().sum()), rel=1e-3)


def test_what_counts_for_nothing_and_other_aspects_are_not_read(reward_model: RewardModel) -> None:
    items: list[Judgement] = [
        Rated(ONE, "a", 1.0, aspect="tone"),
        Rated(ONE, "b", 1.0, weight=0.0),
        Thumbed(ONE, "c", up=True),
    ]
    [only] = judged(reward_model, items, config(aspects={"overall": 1.0}))
    assert (len(only.texts), only.ratings) == (1, [])
    words: list[Judgement] = [Rated(ONE, "a", 1.0, kind="comments")]
    assert judged(reward_model, words, config(aspects={"tone": 1.0}))[0].ratings == [(0, 0, 1.0, 1.0)]


def test_gradients_of_the_whole_equal_finite_differences() -> None:
    item = Judged(
        texts=((1,), (2,), (3,), (4,)),
        pairs=[(0, 1, False, 0.2, 1.0), (2, 1, True, 0.0, 0.5)],
        rankings=[((3, 0, 2), (1, 2, 2), 1.0), ((0, 1), (2, 1), 0.3)],
        ratings=[(2, 1, -0.4, 1.0), (3, 0, 0.8, 2.0)],
        thumbs=[(1, 1.0, 1.0), (3, 0.0, 0.7)],
    )
    batch = judgements_of([item, item], dtype=torch.float64)
    told = config(aspects={"overall": 1.0, "tone": 0.5}, ties="davidson", smoothing=0.1, centring=0.3)
    draw = torch.Generator().manual_seed(0)
    heads = torch.randn(8, 2, dtype=torch.float64, generator=draw, requires_grad=True)
    links = [torch.randn(n, dtype=torch.float64, generator=draw, requires_grad=True) for n in (1, 1, 2, 2)]

    def loss(heads: Tensor, tie: Tensor, threshold: Tensor, *rest: Tensor) -> Tensor:
        names = ("offset", "log_slope")
        return nats(
            heads, batch, {"tie": tie[0], "threshold": threshold[0], **dict(zip(names, rest, strict=True))}, told
        )

    assert torch.autograd.gradcheck(loss, (heads, *links))


def test_what_teaches_nothing_is_left_out_before_anything_is_split_or_counted() -> None:
    tie, order, ranking = (
        Ordered(ONE, ("a", "b"), (1, 1)),
        Ordered(ONE, ("a", "b"), (1, 2)),
        Ordered(ONE, ("a", "b", "c"), (1, 1, 1)),
    )
    kind, words = Rated(ONE, "a", 1.0, aspect="kind"), Rated(ONE, "a", 1.0, kind="comments")
    thumb, nobody = Thumbed(ONE, "a", up=True), Thumbed(ONE, "a", up=True, weight=0.0)
    items: list[Judgement] = [tie, order, ranking, kind, words, thumb, nobody]
    assert learnable(items, config("pairs")) == [order]
    assert learnable(items, config("pairs", ties="davidson")) == [tie, order, ranking]
    assert learnable(items, config("rankings")) == [tie, order, ranking]
    assert learnable(items, config("ratings")) == []
    assert learnable(items, config("ratings", aspects={"kind": 1.0})) == [kind]
    assert learnable(items, config()) == [order, ranking, words, thumb]
    assert learnable(items, config(weights={"rankings": 0, "thumbs": 0})) == [order, words]


def test_of_no_answers_nothing_is_said(reward_model: RewardModel) -> None:
    batch = judgements_of([])
    told = config(centring=0.01)
    links = {name: link.detach() for name, link in RewardNetwork(reward_model.model, told).links.items()}
    assert float(nats(torch.zeros(0, 1), batch, links, told)) == 0
