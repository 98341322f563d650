"""What saves memory changes what is learnt by rounding only. On a CPU; `tests/on_gpu` has what a GPU adds."""

import importlib.util
from pathlib import Path

import pytest
import torch

from rlhf_ray.config import ResourcesConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.checkpoint import newest_valid
from rlhf_ray.models.policy import load_policy
from rlhf_ray.roles.budget import TokenBudget
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.loading import load_networks
from rlhf_ray.roles.optimizers import make_optimizer
from rlhf_ray.types import Sampling, Scored
from tests.models.tiny import make_policy_folder
from tests.roles.fakes import sent_by
from tests.roles.test_learner import make_rollouts, small

BFLOAT16 = ["resources.learner_dtype=bfloat16", "rollout.tolerance=0.1"]
QUANTISED = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not QUANTISED, reason="bitsandbytes is not installed")
REWARDS = [float(i % 2) for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_folder(tmp_path_factory.mktemp("base") / "policy", hidden=64, intermediate=128)


def learnt(base: Path, *settings: str, steps: int = 4) -> tuple[Learner, list[float]]:
    """A learner after some updates, and how much likelier each response has become; odd ones earn more."""
    learner = Learner.from_folder(base, small(*settings, "ppo.learning_rate=3e-3"))
    rollouts = make_rollouts(learner)
    pairs = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    before = learner.logprobs_of(pairs, Sampling())
    for _ in range(steps):
        learner.update(learner.prepare(Scored(rollouts, REWARDS)))
    after = learner.logprobs_of(pairs, Sampling())
    return learner, [sum(new) - sum(old) for new, old in zip(after, before, strict=True)]


def test_in_bfloat16_weights_and_moments_stay_in_float32_and_the_better_become_likelier(base: Path) -> None:
    learner, gains = learnt(base, *BFLOAT16)
    assert sum(gains[1::2]) > sum(gains[::2])
    assert learner.networks.critic is not None
    assert learner.networks.reference is not None
    held = [*learner.networks.policy.parameters(), *learner.networks.critic.parameters()]
    moments = [x for o in learner.optimizers.values() for state in o.state.values() for x in state.values()]
    assert {x.dtype for x in (*held, *moments)} == {torch.float32}
    assert {x.dtype for x in learner.networks.reference.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in sent_by(learner).values()} == {torch.float32}


def test_bfloat16_rounds_logprobs_by_less_than_the_config_asks_tolerance_for(base: Path) -> None:
    pairs = [((10, 11, 12), (20, 21, 22, 23)), ((13,), (30, 31))]
    said = []
    for settings in ([], BFLOAT16):
        rows = Learner.from_folder(base, small(*settings)).logprobs_of(pairs, Sampling())
        said.append(torch.tensor([x for row in rows for x in row]))
    exact, rounded = said
    assert 0 < (exact - rounded).abs().max() < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_where_there_is_no_gpu_nothing_is_taken_off_it(base: Path) -> None:
    with pytest.raises(ConfigError, match="there is none here: leave it out"):
        load_networks(
            base,
            sampling=Sampling(),
            budget=TokenBudget(4096),
            critic_body=None,
            resources=ResourcesConfig(learner_offload=("reference",)),
        )


@pytest.mark.skipif(QUANTISED, reason="bitsandbytes is installed")
@pytest.mark.parametrize("settings", [["resources.optimizer_bits=8"], ["lora.rank=4", "lora.quantised=true"]])
def test_without_the_extra_it_is_named(base: Path, settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-ray\[quantised\]'"):
        Learner.from_folder(base, small(*settings))


@needs_bitsandbytes
def test_moments_in_8_bits_follow_those_in_32() -> None:
    ends = []
    for bits in (32, 8):
        weight = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = make_optimizer([weight], 0.01, bits=bits)  # type: ignore[arg-type]
        wanted = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        for _ in range(50):
            optimizer.zero_grad()
            (weight - wanted).square().sum().backward()
            optimizer.step()
        ends.append(weight.detach())
    assert (ends[0] - ends[1]).norm() < 0.1 * ends[0].norm()


@needs_bitsandbytes
def test_moments_in_8_bits_survive_a_checkpoint(base: Path, tmp_path: Path) -> None:
    learner, gains = learnt(base, "resources.optimizer_bits=8")
    assert sum(gains[1::2]) > sum(gains[::2])
    learner.save(tmp_path, 4)
    learner.finish_saving()
    checkpoint = newest_valid(tmp_path)
    assert checkpoint is not None
    again = Learner.from_folder(base, small("resources.optimizer_bits=8", "ppo.learning_rate=3e-3"))
    again.load(checkpoint)
    for one in (learner, again):
        one.update(one.prepare(Scored(make_rollouts(one), REWARDS)))
    ours, theirs = learner.networks.policy.state_dict(), again.networks.policy.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@needs_bitsandbytes
def test_a_base_in_4_bits_learns_by_its_adapter_and_leaves_as_what_it_computes_with(base: Path, tmp_path: Path) -> None:
    learner, gains = learnt(base, "lora.rank=8", "lora.quantised=true")
    assert sum(gains[1::2]) > sum(gains[::2])
    learner.save_policy(tmp_path / "policy")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain = load_policy(tmp_path / "policy")(ids).logits.log_softmax(-1)[0, :-1]
    said = learner.logprobs_of([((5,), (6, 7, 8))], Sampling())[0]
    assert plain.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist() == pytest.approx(
        said, abs=0.02
    )  # on a CPU its kernel rounds to bfloat16
