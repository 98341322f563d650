"""The learner on a GPU. Needs torch, transformers and this package: neither Ray nor vLLM.

python -m pytest -m gpu tests/on_gpu
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from rlhf_ray.config import load_config
from rlhf_ray.models.checkpoint import newest_valid
from rlhf_ray.models.policy import load_policy, save_policy
from rlhf_ray.roles.learner import Learner
from rlhf_ray.types import Rollout, Sampling, Scored
from tests.models.tiny import make_policy, make_tokenizer
from tests.roles.fakes import sent_by

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.timeout(300),
]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
BFLOAT16 = ["resources.learner_dtype=bfloat16", "rollout.tolerance=0.1"]
OFFLOAD = [*BFLOAT16, "resources.learner_offload=[optimizer,reference]"]
ALONE = ["ppo.advantage=rloo", "rollout.samples=2", "rollout.prompts=16"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer(context=256)
    folder = tmp_path_factory.mktemp("base") / "policy"
    save_policy(folder, make_policy(tokenizer, hidden=256, heads=4, layers=4, intermediate=512, context=256), tokenizer)
    return folder


def make_learner(base: Path, *settings: str, critic: Path | None = None) -> Learner:
    plain = ["run.id=t", "rollout.prompts=32", "ppo.minibatch=16", "rollout.max_tokens=128", "model.context=256",
             "ppo.kl.limit=1e6", "ppo.learning_rate=1e-4", "ppo.critic_learning_rate=1e-4"]  # fmt: skip
    return Learner.from_folder(base, load_config(None, [*plain, *settings]), reward_model=critic)


def make_pairs() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """32 prompts of 4 to 60 tokens with responses of 1 to 100."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 250, (32, 160), generator=draw).tolist()
    lengths = torch.randint(1, 100, (32,), generator=draw).tolist()
    return [
        (tuple(row[: 4 + i % 57]), tuple(row[60 : 60 + n])) for i, (row, n) in enumerate(zip(ids, lengths, strict=True))
    ]


def make_scored(logprobs: list[list[float]] | None = None) -> Scored:
    """Odd ones are the better."""
    rollouts = [
        Rollout(
            f"r{i}",
            f"p{i // 2}",
            prompt,
            response,
            tuple(logprobs[i]) if logprobs else (-5.0,) * len(response),
            0,
            "stop",
        )
        for i, (prompt, response) in enumerate(make_pairs())
    ]
    return Scored(rollouts, [float(i % 2) for i in range(32)])


def said(learner: Learner) -> torch.Tensor:
    """All response tokens' log-probs, one behind another."""
    return torch.tensor([x for row in learner.logprobs_of(make_pairs(), Sampling()) for x in row])


def gains(learner: Learner, steps: int = 4) -> float:
    """By how many nats a token the better responses have become likelier than the worse."""
    before = learner.logprobs_of(make_pairs(), Sampling())
    for _ in range(steps):
        learner.update(learner.prepare(make_scored(learner.logprobs_of(make_pairs(), Sampling()))))
    after = learner.logprobs_of(make_pairs(), Sampling())
    each = [(sum(new) - sum(old)) / len(new) for new, old in zip(after, before, strict=True)]
    return sum(each[1::2]) / 16 - sum(each[::2]) / 16


def whole(learner: Learner) -> dict[str, torch.Tensor]:
    return {
        name: tensor.float().cpu() for name, tensor in learner._copied(learner.networks.policy.state_dict()).items()
    }


def moved(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(sum((one[name] - other[name]).square().sum() for name in one).sqrt())


def update_once(base: Path, *settings: str) -> tuple[dict[str, float], dict[str, torch.Tensor], Learner]:
    learner = make_learner(base, *settings)
    batch = learner.prepare(make_scored())
    return {**batch.metrics, **learner.update(batch)}, whole(learner), learner


def test_in_float32_a_gpu_says_what_a_cpu_says(base: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    learner, policy = make_learner(base), load_policy(base)
    expected = []
    for prompt, response in make_pairs():
        with torch.no_grad():
            logprobs = policy(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        expected += [logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
    assert (said(learner) - torch.tensor(expected)).abs().max() < 1e-4


def test_bfloat16_packed_agrees_with_padded_and_with_float32(base: Path) -> None:
    exact, rounded = said(make_learner(base)), make_learner(base, *BFLOAT16)
    packed = said(rounded)
    rounded.networks.policy.set_attn_implementation("sdpa")
    rounded.networks.packed = False
    padded = said(rounded)
    rounding, apart, most = (packed - padded).abs().mean(), (packed - exact).abs().mean(), (packed - exact).abs().max()
    print(f"in bfloat16: packed to padded {rounding:.1e}, to float32 {apart:.1e} in the mean, {most:.1e} at most")
    assert rounding < 2e-3
    assert apart < 2e-2


def test_in_bfloat16_the_weights_that_learn_stay_in_float32_and_the_better_become_likelier(base: Path) -> None:
    learner = make_learner(base, *BFLOAT16)
    assert gains(learner) > 0.02
    for model in (learner.networks.policy, learner.networks.critic):
        assert {tensor.dtype for tensor in learner._copied(model.state_dict()).values()} == {torch.float32}
    reference = learner._copied(learner.networks.reference.state_dict())
    assert {tensor.dtype for tensor in reference.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in sent_by(learner).values()} == {torch.float32}


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """The cosine between two ways from the start: Adam's first steps have the sign of noise where a gradient is 0."""
    along = sum(((one[name] - start[name]) * (other[name] - start[name])).sum() for name in start)
    return float(along) / (moved(one, start) * moved(other, start))


def start_of(base: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_policy(base).state_dict().items()}


def test_offloaded_it_learns_the_same(base: Path) -> None:
    (told, there, _), (offloaded, here, learner) = update_once(base, *BFLOAT16), update_once(base, *OFFLOAD)
    for model in (learner.networks.policy, learner.networks.reference):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    for name in ("loss/value_avg", "learn/grad_norm", "objective/entropy"):
        assert offloaded[name] == pytest.approx(told[name], rel=0.02)
    assert alike(there, here, start_of(base)) > 0.95


@pytest.mark.parametrize("settings", [[], BFLOAT16, OFFLOAD], ids=["float32", "bfloat16", "offloaded"])
def test_a_checkpoint_is_gone_on_from(base: Path, tmp_path: Path, settings: list[str]) -> None:
    _, _, learner = update_once(base, *settings)
    learner.save(tmp_path, 1)
    learner.finish_saving()
    again = make_learner(base, *settings)
    checkpoint = newest_valid(tmp_path)
    assert checkpoint is not None
    again.load(checkpoint)
    assert moved(whole(again), whole(learner)) == 0
    for one in (learner, again):
        one.update(one.prepare(make_scored()))
    difference = moved(whole(again), whole(learner))
    print(f"after one more update {'the same bits' if difference == 0 else f'{difference:.1e} apart'}")
    assert alike(whole(again), whole(learner), start_of(base)) > 0.99


def test_computed_again_activations_give_the_same_update_in_less_memory(base: Path) -> None:
    peaks, ends = [], []
    for recompute in ("false", "true"):
        torch.cuda.reset_peak_memory_stats()
        ends.append(update_once(base, f"resources.recompute={recompute}")[1])
        peaks.append(torch.cuda.max_memory_allocated())
        torch.cuda.empty_cache()
    assert alike(*ends, start_of(base)) > 0.99
    assert peaks[1] < peaks[0]


def test_where_memory_runs_out_the_part_is_halved_and_the_update_is_the_same(base: Path) -> None:
    roomy, tight = make_learner(base), make_learner(base)
    for learner in (roomy, tight):
        learner.update(learner.prepare(make_scored()))  # from here on the optimizer has its moments
    batch = tight.prepare(make_scored())
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    wanted = roomy.update(roomy.prepare(make_scored()))
    torch.cuda.empty_cache()
    room = held + 0.7 * (torch.cuda.max_memory_allocated() - held)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        told = tight.update(batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert told["learn/out_of_memory"] >= 1
    assert told["learn/grad_norm"] == pytest.approx(wanted["learn/grad_norm"], rel=1e-3)
    assert alike(whole(tight), whole(roomy), start_of(base)) > 0.99


@needs_bitsandbytes
@pytest.mark.parametrize("settings", [[], BFLOAT16], ids=["float32", "bfloat16"])
def test_moments_in_8_bits_learn_too_and_survive_a_checkpoint(base: Path, tmp_path: Path, settings: list[str]) -> None:
    learner = make_learner(base, "resources.optimizer_bits=8", *settings)
    assert gains(learner) > 0.02
    learner.save(tmp_path, 1)
    learner.finish_saving()
    checkpoint = newest_valid(tmp_path)
    assert checkpoint is not None
    assert torch.uint8 in {tensor.dtype for tensor in checkpoint.tensors["optimizer_policy"].values()}
    again = make_learner(base, "resources.optimizer_bits=8", *settings)
    again.load(checkpoint)
    for one in (learner, again):
        one.update(one.prepare(make_scored()))
    assert alike(whole(again), whole(learner), start_of(base)) > 0.99


@pytest.mark.parametrize("quantised", [False, pytest.param(True, marks=needs_bitsandbytes)], ids=["LoRA", "QLoRA"])
def test_with_an_adapter_it_learns_and_the_generators_get_the_weights_that_it_computes_with(
    base: Path, tmp_path: Path, quantised: bool
) -> None:
    adapter = ["lora.rank=8", f"lora.quantised={quantised}".lower(), "ppo.learning_rate=1e-3"]
    learner = make_learner(base, *BFLOAT16, *adapter)
    assert gains(learner) > 0.02
    learner.save_policy(tmp_path / "policy")
    plain = said(make_learner(tmp_path / "policy"))
    distance, learnt = (plain - said(learner)).abs().mean(), (said(make_learner(base)) - said(learner)).abs().mean()
    print(
        f"plain weights against adapter: {distance:.1e} nats a token in the mean; the adapter moved it by {learnt:.1e}"
    )
    assert distance < 0.2 * learnt
