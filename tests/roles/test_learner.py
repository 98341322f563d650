"""The learner on a tiny random policy: what it prepares is what the formulas say, and an update does what it should."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import Config, load_config
from rlhf_ray.errors import Diverged, InfrastructureError
from rlhf_ray.models.checkpoint import newest_valid
from rlhf_ray.models.policy import load_policy, new_policy, save_policy, train_tokenizer
from rlhf_ray.roles.batch import Tokens, collate
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.networks import Networks
from rlhf_ray.types import Rollout, Sampling, Scored
from tests.roles.fakes import sent_by

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
    logprobs = learner.logprobs_of(rows, learner.networks.sampling)
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
    alone = load_policy(base)
    for (prompt, response), found in zip(rows, batched, strict=True):
        with torch.no_grad():
            logits = alone(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected = [logits[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
        assert found == pytest.approx(expected, abs=1e-5)


def test_before_the_first_update_the_policy_is_its_reference(base: Path) -> None:
    learner = Learner.from_folder(base, small())
    batch = learner.prepare(Scored(make_rollouts(learner), [0.1 * i for i in range(8)]))
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
    assert learner.prepare(Scored(rollouts, [0.0] * len(rollouts))).metrics["mismatch/max_abs"] < 1e-5


def test_a_wrong_behaviour_logprob_shows_in_the_mismatch(base: Path) -> None:
    learner = Learner.from_folder(base, small())
    rollouts = make_rollouts(learner)
    rollouts[3] = replace(rollouts[3], logprobs=(rollouts[3].logprobs[0] + 0.25, *rollouts[3].logprobs[1:]))
    assert learner.prepare(Scored(rollouts, [0.0] * 8)).metrics["mismatch/max_abs"] == pytest.approx(0.25, abs=1e-5)


def test_responses_with_higher_rewards_become_likelier(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.learning_rate=1e-3", "ppo.epochs=4"))
    rollouts = make_rollouts(learner)
    rewards = [1.0 if i < 4 else -1.0 for i in range(8)]
    sequences = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    before = [sum(row) for row in learner.logprobs_of(sequences, Sampling())]
    for _ in range(5):
        learner.update(learner.prepare(Scored(rollouts, rewards)))
    after = [sum(row) for row in learner.logprobs_of(sequences, Sampling())]
    gains = [late - early for early, late in zip(before, after, strict=True)]
    assert min(gains[:4]) > max(gains[4:])


def test_the_reference_never_moves(base: Path) -> None:
    learner = Learner.from_folder(base, small())
    before = {name: tensor.clone() for name, tensor in learner.networks.reference.state_dict().items()}
    learner.update(learner.prepare(Scored(make_rollouts(learner), [float(i) for i in range(8)])))
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.networks.reference.state_dict().items())
    assert not torch.equal(before["model.norm.weight"], learner.networks.policy.state_dict()["model.norm.weight"])


def test_a_cut_response_is_rewarded_less(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.reward_norm=none", "ppo.whiten=none"))
    whole = learner.prepare(Scored(make_rollouts(learner), [1.0] * 8)).metrics["objective/rlhf_reward"]
    cut = learner.prepare(Scored(make_rollouts(learner, finish_reason="length"), [1.0] * 8)).metrics[
        "objective/rlhf_reward"
    ]
    assert whole - cut == pytest.approx(learner.ppo.missing_end_penalty, abs=1e-5)


@pytest.mark.parametrize(("settings", "largest"), [([], 0.02), (["reward_model.path=theirs"], 1.0)])
def test_small_rewards_stay_small_unless_they_come_from_a_reward_model_of_unknown_scale(
    base: Path, settings: list[str], largest: float
) -> None:
    learner = Learner.from_folder(base, small("ppo.whiten=none", *settings))
    batch = learner.prepare(Scored(make_rollouts(learner), [0.01, -0.01] * 4))
    assert batch.advantages.abs().max().item() == pytest.approx(largest, rel=1e-3)


def test_kl_above_its_limit_stops_the_run_with_both_figures(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.kl.limit=0.001"))
    drifted = load_policy(base)
    with torch.no_grad():
        for policy in (drifted, learner.networks.policy):
            policy.get_parameter("model.norm.weight").mul_(3)
    rollouts = make_rollouts(learner)
    best = drifted.generate(torch.tensor([[10, 11]]), max_new_tokens=6, do_sample=False, pad_token_id=learner.pad_id)[
        0, 2:
    ].tolist()
    rollouts = [
        replace(r, prompt_ids=(10, 11), response_ids=tuple(best), logprobs=(0.0,) * len(best)) for r in rollouts
    ]
    with pytest.raises(Diverged, match=r"ppo\.kl\.limit=0\.001"):
        learner.prepare(Scored(rollouts, [0.0] * 8))


def test_a_gradient_that_is_not_finite_changes_nothing_and_the_third_in_a_row_stops(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.epochs=1", "rollout.prompts=8", "ppo.minibatch=8"))
    batch = learner.prepare(Scored(make_rollouts(learner), [float(i) for i in range(8)]))
    bad = replace(batch, advantages=batch.advantages * math.nan)
    before = {name: tensor.clone() for name, tensor in learner.networks.policy.state_dict().items()}
    assert learner.update(bad)["learn/skipped_updates"] == 1.0
    assert learner.update(bad)["learn/skipped_updates"] == 1.0
    with pytest.raises(Diverged, match="3 updates in a row"):
        learner.update(bad)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.networks.policy.state_dict().items())


SETTINGS = {
    "gae": ["ppo.kl.target=2"],
    "value norm": ["ppo.value_norm=true", "ppo.critic_warmup=1"],
    "moving reference": ["ppo.kl.refresh_every=1"],
    "grpo": ["ppo.advantage=grpo", "rollout.prompts=4", "rollout.samples=2"],
    "ptx": ["ppo.ptx_coef=0.5"],
    "lora": ["lora.rank=2"],
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_learner_loaded_from_a_checkpoint_goes_on_in_the_same_bits(
    base: Path, tmp_path: Path, settings: list[str]
) -> None:
    def make() -> Learner:
        return Learner.from_folder(base, small(*settings), demonstrations=[([10, 11, 12, 13], 2)])

    def learn(learner: Learner) -> None:
        rollouts = [replace(r, prompt_id=f"p{i // 2}") for i, r in enumerate(make_rollouts(learner))]
        learner.update(learner.prepare(Scored(rollouts, [float(i) for i in range(8)])))

    straight = make()
    learn(straight)
    straight.save(tmp_path, 1)
    straight.finish_saving()
    resumed = make()
    checkpoint = newest_valid(tmp_path)
    assert checkpoint is not None
    resumed.load(checkpoint)
    for learner in (straight, resumed):
        learn(learner)
    assert (straight.kl, straight.estimator.state(), straight.weights_step) == (
        resumed.kl,
        resumed.estimator.state(),
        2,
    )
    for name in ("policy", "critic", "reference"):
        model = getattr(straight.networks, name)
        if model is not None:
            ours, theirs = model.state_dict(), getattr(resumed.networks, name).state_dict()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


ADVANTAGES = ["gae", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "rloo", "grpo", "dr_grpo", "remax"]
LOSSES = ["dual_clip", "gspo", "cispo", "reinforce"]


@pytest.mark.parametrize(
    "choice",
    [f"ppo.advantage={name}" for name in ADVANTAGES] + [f"ppo.loss={name}" for name in LOSSES] + ["lora.rank=4"],
)
def test_with_every_algorithm_better_responses_become_likelier(base: Path, choice: str) -> None:
    learner = Learner.from_folder(
        base, small(choice, "rollout.prompts=4", "rollout.samples=2", "ppo.learning_rate=1e-3", "ppo.epochs=4")
    )
    # two responses to each prompt; the second is the better one
    rollouts = [
        replace(r, prompt_id=f"p{i // 2}", prompt_ids=(11, 12 + i // 2)) for i, r in enumerate(make_rollouts(learner))
    ]
    sequences = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    greedy = Scored(rollouts, [0.0] * 8) if choice == "ppo.advantage=remax" else None
    before = [sum(row) for row in learner.logprobs_of(sequences, Sampling())]
    for _ in range(5):
        learner.update(learner.prepare(Scored(rollouts, [-1.0, 1.0] * 4), greedy))
    after = [sum(row) for row in learner.logprobs_of(sequences, Sampling())]
    gains = [late - early for early, late in zip(before, after, strict=True)]
    assert sum(gains[1::2]) > sum(gains[::2]) + 0.1


def test_with_lora_the_reference_is_the_policy_without_it_and_the_generators_get_plain_weights(base: Path) -> None:
    learner = Learner.from_folder(base, small("lora.rank=4", "ppo.learning_rate=1e-2"))
    rollouts = make_rollouts(learner)
    for _ in range(3):
        batch = learner.prepare(Scored(rollouts, [float(i) for i in range(8)]))
        learner.update(batch)
    assert learner.networks.reference is None
    plain = Learner.from_folder(base, small())
    torch.testing.assert_close(
        batch.reference_logprobs, plain.prepare(Scored(rollouts, [0.0] * 8)).reference_logprobs, atol=1e-5, rtol=1e-5
    )
    sequences = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    weights = sent_by(learner, base)
    assert weights.keys() == sent_by(plain).keys()
    plain.networks.policy.load_state_dict(weights)
    for ours, theirs in zip(
        learner.logprobs_of(sequences, Sampling()), plain.logprobs_of(sequences, Sampling()), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_only_gae_has_a_critic(base: Path) -> None:
    assert Learner.from_folder(base, small("ppo.advantage=rloo", "rollout.samples=2")).networks.critic is None
    assert Learner.from_folder(base, small()).networks.critic is not None


def test_while_the_critic_warms_up_the_policy_stays(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.critic_warmup=1"))
    rollouts = make_rollouts(learner)
    before = {
        name: {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for name, model in learner.learning.items()
    }

    def moved(name: str) -> bool:
        now = learner.learning[name].state_dict()
        return any(not torch.equal(before[name][key], now[key]) for key in now)

    learner.update(learner.prepare(Scored(rollouts, [float(i) for i in range(8)])))
    assert (moved("policy"), moved("critic")) == (False, True)
    learner.update(learner.prepare(Scored(rollouts, [float(i) for i in range(8)])))
    assert moved("policy")


def test_an_update_ends_early_where_the_policy_has_moved_too_far(base: Path) -> None:
    settings = ["ppo.learning_rate=1e-2", "ppo.epochs=4"]
    bound = Learner.from_folder(base, small(*settings, "ppo.kl.update_limit=1e-4"))
    free = Learner.from_folder(base, small(*settings))
    left_out = [
        learner.update(learner.prepare(Scored(make_rollouts(learner), [float(i) for i in range(8)])))["learn/left_out"]
        for learner in (bound, free)
    ]
    assert left_out == [0.75, 0.0]  # the second of eight minibatches shows what the first did


def test_the_reference_follows_where_it_is_told_to(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.kl.refresh_every=2"))
    kls = []
    for _ in range(3):
        batch = learner.prepare(Scored(make_rollouts(learner), [float(i) for i in range(8)]))
        kls.append(batch.metrics["objective/kl"])
        learner.update(batch)
    assert abs(kls[1]) > 1e-3
    assert kls[2] == pytest.approx(0.0, abs=1e-5)


def test_kl_in_the_loss_pulls_the_policy_back(base: Path) -> None:
    settings = ["ppo.advantage=dr_grpo", "rollout.prompts=4", "rollout.samples=2", "ppo.learning_rate=3e-3"]

    def drift(coef: float) -> float:
        learner = Learner.from_folder(base, small(*settings, f"ppo.kl.coef={coef}", "ppo.kl.limit=1e9"))
        for _ in range(6):
            rollouts = [replace(r, prompt_id=f"p{i // 2}") for i, r in enumerate(make_rollouts(learner))]
            batch = learner.prepare(Scored(rollouts, [-1.0, 1.0] * 4))
            learner.update(batch)
        return batch.metrics["objective/kl"]

    assert drift(50.0) < 0.5 * drift(0.0)


def test_demonstrations_become_likelier_where_they_are_mixed_in(base: Path) -> None:
    demonstration = [20, 21, 22, 23, 24, 25]

    def gain(coef: float) -> float:
        learner = Learner.from_folder(
            base, small(f"ppo.ptx_coef={coef}", "ppo.learning_rate=3e-3"), demonstrations=[(demonstration, 2)]
        )
        sequence = [(demonstration[:2], demonstration[2:])]
        before = sum(learner.logprobs_of(sequence, Sampling())[0])
        learner.update(learner.prepare(Scored(make_rollouts(learner), [0.0] * 8)))
        return sum(learner.logprobs_of(sequence, Sampling())[0]) - before

    assert gain(1.0) > gain(0.0) + 1.0


def test_rollouts_of_another_policy_are_weighed_and_counted(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.correction=band"))
    rollouts = make_rollouts(learner)
    first = rollouts[0]
    rollouts[0] = replace(first, logprobs=(first.logprobs[0] - 2.0, first.logprobs[1] - 0.5, *first.logprobs[2:]))
    batch = learner.prepare(Scored(rollouts, [0.0] * 8))
    # e^2 is beyond the band, e^0.5 is inside
    assert batch.weights[0, :3].tolist() == pytest.approx([0.0, math.exp(0.5), 1.0], abs=1e-4)
    assert batch.metrics["correction/left_out"] == pytest.approx(1 / sum(len(r.response_ids) for r in rollouts))


def test_groups_whose_rewards_are_equal_are_counted(base: Path) -> None:
    learner = Learner.from_folder(base, small("rollout.prompts=4", "rollout.samples=2"))
    rollouts = [replace(r, prompt_id=f"p{i // 2}") for i, r in enumerate(make_rollouts(learner))]
    metrics = learner.prepare(Scored(rollouts, [1.0, 1.0, 2.0, 3.0, 4.0, 4.0, 0.0, 0.5])).metrics
    assert metrics["objective/equal_groups"] == 0.5


def test_a_minibatch_cuts_the_columns_that_none_of_its_rows_uses() -> None:
    tokens = collate([([1, 2], [3]), ([1], [4, 5, 6]), ([1, 2, 3], [7])], pad_id=0)
    picked = tokens.rows(torch.tensor([0]))
    assert picked.ids.tolist() == [[1, 2, 3]]
    assert picked.response_ids.tolist() == [[3]]
    assert picked.mask.tolist() == [[True]]


ALGORITHMS = {
    "gae": [],
    "sequence": ["ppo.average=sequence"],
    "gspo": ["ppo.advantage=grpo", "ppo.loss=gspo", "rollout.samples=2", "rollout.prompts=4"],
    "constant": ["ppo.advantage=dr_grpo", "rollout.samples=2", "rollout.prompts=4"],
    "kl in the loss": ["ppo.kl.where=loss", "ppo.kl.estimator=k3", "ppo.entropy_coef=0.01"],
    "ptx": ["ppo.ptx_coef=0.5"],
}
DEMONSTRATIONS = [([10, 11, 12, 13, 14, 15][: 4 + i % 3], 2) for i in range(6)]


def updated(base: Path, settings: list[str], tokens: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """An update's statistics, and the weights after it; by plain descent, for Adam makes much of a gradient's noise."""
    config = small(f"resources.learner_tokens={tokens}", *settings)
    learner = Learner.from_folder(base, config, demonstrations=DEMONSTRATIONS)
    learner.optimizers = {
        name: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for name, model in learner.learning.items()
    }
    learner.rates = dict.fromkeys(learner.learning, 0.1)
    rollouts = [replace(rollout, prompt_id=f"p{i // 2}") for i, rollout in enumerate(make_rollouts(learner))]
    batch = learner.prepare(Scored(rollouts, [0.1 * i * i for i in range(8)]))
    return learner.update(batch), learner.networks.policy.state_dict()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_update_in_parts_is_the_whole_one(base: Path, algorithm: str) -> None:
    whole, weights = updated(base, ALGORITHMS[algorithm], 4096)
    parts, same = updated(base, ALGORITHMS[algorithm], 9)  # a sequence or two at once
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert all(torch.allclose(weights[name], same[name], atol=1e-5) for name in weights)


def test_an_update_that_does_not_fit_is_halved_and_is_the_same(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, weights = updated(base, [], 24)
    say, passes = Networks.say, []

    def with_little_memory(self: Networks, model: Any, tokens: Tokens, **options: Any) -> Any:
        said = say(self, model, tokens, **options)
        if torch.is_grad_enabled():
            passes.append(1)
            if len(passes) in (2, 5):  # after others of the same minibatch, whose gradients are there already
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return said

    monkeypatch.setattr(Networks, "say", with_little_memory)
    told, same = updated(base, [], 24)
    assert told.pop("learn/out_of_memory") == 2.0
    wanted.pop("learn/out_of_memory")
    assert told == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert all(torch.allclose(weights[name], same[name], atol=1e-5) for name in weights)


def test_an_update_that_never_fits_stops_with_the_setting_to_change(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Networks, "values", never)
    with pytest.raises(InfrastructureError, match=r"set resources\.learner_tokens"):
        updated(base, [], 64)


def test_the_rates_follow_the_schedule(base: Path) -> None:
    learner = Learner.from_folder(base, small("ppo.steps=4", "ppo.schedule=linear", "ppo.warmup=2"))
    rollouts = make_rollouts(learner)
    seen = [learner.update(learner.prepare(Scored(rollouts, [float(i) for i in range(8)])))["lr"] for _ in range(4)]
    assert seen == pytest.approx([1.5e-4, 3e-4, 3e-4, 1.5e-4])
    assert [optimizer.param_groups[0]["lr"] for optimizer in learner.optimizers.values()] == pytest.approx(
        [1.5e-4, 5e-4]
    )


def test_the_averaged_policy_is_the_moving_average_of_its_steps_and_survives_a_checkpoint(
    base: Path, tmp_path: Path
) -> None:
    learner = Learner.from_folder(base, small("ppo.ema=0.75", "ppo.learning_rate=1e-2"))
    name = "model.norm.weight"
    wanted = learner.networks.policy.get_parameter(name).detach().clone()
    rollouts = make_rollouts(learner)
    for step in range(3):
        learner.update(learner.prepare(Scored(rollouts, [float(i) for i in range(8)])))
        wanted = 0.75 * wanted + 0.25 * learner.networks.policy.get_parameter(name).detach()
        if step == 1:
            learner.save(tmp_path, 2)
            learner.finish_saving()
            other = Learner.from_folder(base, small("ppo.ema=0.75", "ppo.learning_rate=1e-2"))
            checkpoint = newest_valid(tmp_path)
            assert checkpoint is not None
            other.load(checkpoint)
            learner, kept = other, checkpoint.tensors["averaged"][name].clone()
    assert not torch.allclose(wanted, learner.networks.policy.get_parameter(name), atol=1e-4)
    assert torch.equal(checkpoint.tensors["averaged"][name], kept)
    learner.take_average()
    assert learner.weights_step == 4
    assert torch.allclose(learner.networks.policy.get_parameter(name), wanted, atol=1e-6)


@pytest.mark.parametrize("lora", [[], ["lora.rank=4"]])
def test_recomputed_activations_give_the_same_update_and_nothing_is_dropped(base: Path, lora: list[str]) -> None:
    kept, weights = updated(base, lora, 64)
    told, same = updated(base, ["resources.recompute=true", *lora], 64)
    assert told == pytest.approx(kept, rel=1e-4, abs=1e-6)
    assert all(torch.allclose(weights[name], same[name], atol=1e-5) for name in weights)
