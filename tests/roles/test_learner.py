"""The learner on a tiny random policy: what it prepares is what the formulas say, and an update does what it should."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_ray.config import Config, load_config
from rlhf_ray.errors import Diverged
from rlhf_ray.models.checkpoint import newest_valid
from rlhf_ray.models.policy import new_policy, save_policy, train_tokenizer
from rlhf_ray.roles.batch import collate
from rlhf_ray.roles.learner import Learner
from rlhf_ray.types import Rollout, Sampling

SMALL = [
    "model.hidden=16", "model.layers=2", "model.heads=2", "model.intermediate=32", "model.vocabulary=300",
    "model.context=32", "rollout.max_tokens=8", "rollout.prompts=8", "ppo.minibatch=4", "run.id=test",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "policy"
    config = small()
    tokenizer = train_tokenizer(["a blue lamp", "a red chair"], vocabulary=300, context=32)
    save_policy(folder, new_policy(config.model, tokenizer, seed=1), tokenizer)
    return folder


def small(*overrides: str) -> Config:
    return load_config(None, [*SMALL, *overrides])


def make_rollouts(learner: Learner, n: int = 8, **overrides: object) -> list[Rollout]:
    """Responses of 3 to 6 tokens, with the behaviour log-probs that a faithful engine would give."""
    rng = torch.Generator().manual_seed(0)
    rows = []
    for i in range(n):
        draw = torch.randint(10, 60, (12,), generator=rng).tolist()
        rows.append((tuple(draw[: 2 + i % 3]), tuple(draw[5 : 8 + i % 4])))
    logprobs = learner.logprobs_of(rows, learner.sampling)
    return [
        replace(
            Rollout(f"r{i}", f"p{i}", prompt, response, tuple(logprobs[i]), learner.weights_step, "stop"), **overrides
        )
        for i, (prompt, response) in enumerate(rows)
    ]


def test_logprobs_are_those_of_each_sequence_alone(base: Path) -> None:
    learner = Learner.from_folder(base, small())
    rows = [([10, 11, 12], [20, 21]), ([13], [30, 31, 32, 33])]
    batched = learner.logprobs_of(rows, Sampling())
    for (prompt, response), found in zip(rows, batched, strict=True):
        with torch.no_grad():
            logits = learner.policy(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected = [logits[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
        assert found == pytest.approx(expected, abs=1e-5)


def test_before_the_first_update_the_policy_is_its_reference(base: Path) -> None:
    learner = Learner.from_folder(base, small())
    batch = learner.prepare(make_rollouts(learner), [0.1 * i for i in range(8)])
    assert batch.metrics["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert batch.metrics["mismatch/max_abs"] < 1e-5
    assert batch.values.abs().max() == 0


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.9)])
def test_the_mismatch_is_measured_in_the_engines_own_distribution(base: Path, temperature: float, top_p: float) -> None:
    learner = Learner.from_folder(base, small(f"rollout.temperature={temperature}", f"rollout.top_p={top_p}"))
    rollouts = [r for r in make_rollouts(learner) if all(map(math.isfinite, r.logprobs))] or make_rollouts(learner)
    if not all(math.isfinite(x) for r in rollouts for x in r.logprobs):
        rollouts = [
            replace(r, logprobs=tuple(x if math.isfinite(x) else -math.inf for x in r.logprobs)) for r in rollouts
        ]
        pytest.skip("no drawn response lies in the nucleus of this random policy")
    assert learner.prepare(rollouts, [0.0] * len(rollouts)).metrics["mismatch/max_abs"] < 1e-5


def test_a_wrong_behaviour_logprob_shows_in_the_mismatch(base: Path) -> None:
    learner = Learner.from_folder(base, small())
    rollouts = make_rollouts(learner)
    rollouts[3] = replace(rollouts[3], logprobs=(rollouts[3].logprobs[0] + 0.25, *rollouts[3].logprobs[1:]))
    assert learner.prepare(rollouts, [0.0] * 8).metrics["mismatch/max_abs"] == pytest.approx(0.25, abs=1e-5)


def test_responses_with_higher_rewards_become_likelier(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.learning_rate=1e-3", "ppo.epochs=4"))
    rollouts = make_rollouts(learner)
    rewards = [1.0 if i < 4 else -1.0 for i in range(8)]
    sequences = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    before = [sum(row) for row in learner.logprobs_of(sequences, Sampling())]
    for _ in range(5):
        learner.update(learner.prepare(rollouts, rewards))
    after = [sum(row) for row in learner.logprobs_of(sequences, Sampling())]
    gains = [late - early for early, late in zip(before, after, strict=True)]
    assert min(gains[:4]) > max(gains[4:])


def test_the_reference_never_moves(base: Path) -> None:
    learner = Learner.from_folder(base, small())
    before = {name: tensor.clone() for name, tensor in learner.reference.state_dict().items()}
    learner.update(learner.prepare(make_rollouts(learner), [float(i) for i in range(8)]))
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.reference.state_dict().items())
    assert not torch.equal(before["model.norm.weight"], learner.policy.state_dict()["model.norm.weight"])


def test_a_cut_response_is_rewarded_less(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.normalise_rewards=false", "ppo.whiten_advantages=false"))
    whole = learner.prepare(make_rollouts(learner), [1.0] * 8).metrics["objective/rlhf_reward"]
    cut = learner.prepare(make_rollouts(learner, finish_reason="length"), [1.0] * 8).metrics["objective/rlhf_reward"]
    assert whole - cut == pytest.approx(learner.ppo.missing_end_penalty, abs=1e-5)


@pytest.mark.parametrize(("settings", "largest"), [([], 0.02), (["reward_model.path=theirs"], 1.0)])
def test_small_rewards_stay_small_unless_they_come_from_a_reward_model_of_unknown_scale(
    base: Path, settings: list[str], largest: float
) -> None:
    learner = Learner.from_folder(base, small("ppo.whiten_advantages=false", *settings))
    batch = learner.prepare(make_rollouts(learner), [0.01, -0.01] * 4)
    assert batch.advantages.abs().max().item() == pytest.approx(largest, rel=1e-3)


def test_kl_above_its_limit_stops_the_run_with_both_figures(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.kl.limit=0.001"))
    with torch.no_grad():
        learner.policy.get_parameter("model.norm.weight").mul_(3)
    rollouts = make_rollouts(learner)
    sequences = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    best = learner.policy.generate(
        torch.tensor([[10, 11]]), max_new_tokens=6, do_sample=False, pad_token_id=learner.pad_id
    )[0, 2:].tolist()
    rollouts = [
        replace(r, prompt_ids=(10, 11), response_ids=tuple(best), logprobs=(0.0,) * len(best)) for r in rollouts
    ]
    assert sequences
    with pytest.raises(Diverged, match=r"ppo\.kl\.limit=0\.001"):
        learner.prepare(rollouts, [0.0] * 8)


def test_a_gradient_that_is_not_finite_changes_nothing_and_the_third_in_a_row_stops(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.epochs=1", "rollout.prompts=8", "ppo.minibatch=8"))
    batch = learner.prepare(make_rollouts(learner), [float(i) for i in range(8)])
    bad = replace(batch, advantages=batch.advantages * math.nan)
    before = {name: tensor.clone() for name, tensor in learner.policy.state_dict().items()}
    assert learner.update(bad)["learn/skipped_updates"] == 1.0
    assert learner.update(bad)["learn/skipped_updates"] == 1.0
    with pytest.raises(Diverged, match="3 updates in a row"):
        learner.update(bad)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.policy.state_dict().items())


def test_a_learner_loaded_from_a_checkpoint_goes_on_in_the_same_bits(base: Path, tmp_path: Path) -> None:
    straight = Learner.from_folder(base, small("ppo.kl.target=2"))
    rewards = [float(i) for i in range(8)]
    straight.update(straight.prepare(make_rollouts(straight), rewards))
    straight.save(tmp_path, 1)
    resumed = Learner.from_folder(base, small("ppo.kl.target=2"))
    checkpoint = newest_valid(tmp_path)
    assert checkpoint is not None
    resumed.load(checkpoint)
    for learner in (straight, resumed):
        learner.update(learner.prepare(make_rollouts(learner), rewards))
    assert (straight.kl, straight.reward_norm, straight.weights_step) == (resumed.kl, resumed.reward_norm, 2)
    for part in ("policy", "critic"):
        ours, theirs = getattr(straight, part).state_dict(), getattr(resumed, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_minibatch_cuts_the_columns_that_none_of_its_rows_uses() -> None:
    tokens = collate([([1, 2], [3]), ([1], [4, 5, 6]), ([1, 2, 3], [7])], pad_id=0)
    picked = tokens.rows(torch.tensor([0]))
    assert picked.ids.tolist() == [[1, 2, 3]]
    assert picked.response_ids.tolist() == [[3]]
    assert picked.mask.tolist() == [[True]]
