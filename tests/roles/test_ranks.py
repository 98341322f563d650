"""A learner on two and on four ranks does what one does alone."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import multiprocessing

from rlhf_ray.config import load_config
from rlhf_ray.models.checkpoint import newest_valid
from rlhf_ray.models.policy import load_policy
from rlhf_ray.roles import loading
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.ranks import Ranks, free_port, join_ranks
from rlhf_ray.types import Rollout, Scored
from tests.models.tiny import make_policy_folder
from tests.roles.fakes import sent_by

ALGORITHMS: dict[str, list[str]] = {
    "gae": [],
    "more ranks than rows": ["ppo.minibatch=2"],
    "gspo": ["ppo.advantage=grpo", "ppo.loss=gspo", "rollout.samples=2", "rollout.prompts=4"],
    "kl in the loss, ptx": ["ppo.kl.where=loss", "ppo.kl.estimator=k3", "ppo.entropy_coef=0.01", "ppo.ptx_coef=0.5"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_folder(tmp_path_factory.mktemp("base") / "policy")


def make_learner(base: Path, ranks: Ranks, *settings: str, tokens: int = 4096) -> Learner:
    plain = [
        "rollout.prompts=8", "rollout.max_tokens=8", "ppo.minibatch=4", "run.id=t", "model.context=64",
        "ppo.kl.limit=1000", f"resources.learner_tokens={tokens}",
    ]  # fmt: skip
    demonstrations = [([10, 11, 12, 13, 14, 15][: 4 + i % 3], 2) for i in range(6)]
    config = load_config(None, [*plain, *settings])
    return Learner.from_folder(base, config, demonstrations=demonstrations, ranks=ranks)


def make_rollouts() -> list[Rollout]:
    """Prompts of 2 to 4 and responses of 1 to 8 tokens."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (8, 12), generator=draw).tolist()
    rows = [(tuple(row[: 2 + i % 3]), tuple(row[4 : 5 + i])) for i, row in enumerate(ids)]
    return [
        Rollout(f"r{i}", f"p{i // 2}", prompt, response, (-1.0,) * len(response), 0, "stop")
        for i, (prompt, response) in enumerate(rows)
    ]


def scored() -> Scored:
    return Scored(make_rollouts(), [0.1 * i * i for i in range(8)])


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    """Policy's and critic's, whole; every rank has to ask."""
    return {
        f"{network}.{name}": tensor.clone()
        for network, model in learner.learning.items()
        for name, tensor in learner._copied(model.state_dict()).items()
    }


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


def keep(folder: Path, name: str, told: dict[str, float], tensors: dict[str, torch.Tensor]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(told))
    save_file(tensors, folder / f"{name}.safetensors")


def kept(folder: Path, name: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def learn_by_descent(learner: Learner) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Figures of an update by plain descent, whose step is the gradient, and the weights after it."""
    learner.optimizers = {
        name: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for name, model in learner.learning.items()
    }
    learner.rates = dict.fromkeys(learner.learning, 0.1)
    batch = learner.prepare(scored())
    return {**batch.metrics, **learner.update(batch)}, weights_of(learner)


def refuse_to_load_whole(*_: Any, **__: Any) -> Any:
    raise AssertionError("a rank holds the whole of a network")


def on_ranks(count: int, work: Callable[..., None], *args: Any) -> None:
    """Runs `work(ranks, *args)` in `count` processes."""
    multiprocessing.spawn(be_a_rank, (count, free_port(), work, *args), nprocs=count)


def be_a_rank(index: int, count: int, port: int, work: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    work(join_ranks(index, count, f"127.0.0.1:{port}", deadline_s=60), *args)
    dist.barrier()  # one that left earlier would tear the others down
    # At once, as Ray ends an actor: while Python takes itself apart, a thread of gloo's that lets go of its last tensor
    # asks for the interpreter and is ended inside C++, which aborts the process.
    os._exit(0)


def descent(ranks: Ranks, base: Path, settings: list[str], tokens: int, out: Path) -> None:
    loading.load_policy = loading.new_critic = refuse_to_load_whole
    found = learn_by_descent(make_learner(base, ranks, *settings, tokens=tokens))
    if ranks.first:
        keep(out, "found", *found)


@pytest.mark.parametrize(
    ("algorithm", "count", "tokens"),
    [("gae", 2, 4096), ("more ranks than rows", 4, 20), ("gspo", 2, 20), ("kl in the loss, ptx", 2, 20)],
)
def test_an_update_on_many_ranks_is_that_of_one(
    base: Path, tmp_path: Path, algorithm: str, count: int, tokens: int
) -> None:
    alone = make_learner(base, Ranks(), *ALGORITHMS[algorithm])
    before = weights_of(alone)
    told, wanted = learn_by_descent(alone)
    on_ranks(count, descent, base, ALGORITHMS[algorithm], tokens, tmp_path)
    figures, weights = kept(tmp_path, "found")
    assert figures == pytest.approx(told, rel=1e-6, abs=1e-6)
    assert distance(weights, wanted) < 1e-5 * distance(wanted, before)


def test_in_bfloat16_ranks_keep_their_weights_in_float32_and_learn_about_the_same(base: Path, tmp_path: Path) -> None:
    settings = ["resources.learner_dtype=bfloat16", "rollout.tolerance=0.1"]
    alone = make_learner(base, Ranks())
    before = weights_of(alone)
    told, wanted = learn_by_descent(alone)  # in float32
    on_ranks(2, descent, base, settings, 4096, tmp_path)
    figures, weights = kept(tmp_path, "found")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert figures["loss/value_avg"] == pytest.approx(told["loss/value_avg"], rel=0.02)
    assert distance(weights, wanted) < 0.1 * distance(wanted, before)


def learn_save_and_go_on(ranks: Ranks, base: Path, out: Path) -> None:
    learner = make_learner(base, ranks)
    if (found := newest_valid(out / "checkpoints")) is not None:
        learner.load(found)
    else:
        learner.update(learner.prepare(scored()))
        assert learner.save(out / "checkpoints", 1) is None
        assert learner.finish_saving() is None
        exported = sent_by(learner)
        learner.save_policy(out / "policy")
        if ranks.first:
            keep(out, "exported", {}, {name: tensor.clone() for name, tensor in exported.items()})
    dist.barrier()
    told = learner.update(learner.prepare(scored()))
    weights = weights_of(learner)
    if ranks.first:
        keep(out, f"after-{ranks.count}", told, weights)


def test_any_number_of_ranks_goes_on_from_anothers_checkpoint(base: Path, tmp_path: Path) -> None:
    for count in (2, 4):
        on_ranks(count, learn_save_and_go_on, base, tmp_path)
    alone = make_learner(base, Ranks())
    checkpoint = newest_valid(tmp_path / "checkpoints")
    assert checkpoint is not None
    alone.load(checkpoint)
    exported = kept(tmp_path, "exported")[1]
    assert all(torch.equal(tensor, exported[name]) for name, tensor in alone.networks.policy.state_dict().items())
    saved = load_policy(tmp_path / "policy").state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in saved.items())
    before = weights_of(alone)
    told = alone.update(alone.prepare(scored()))
    for count in (2, 4):
        figures, weights = kept(tmp_path, f"after-{count}")
        assert figures == pytest.approx(told, rel=1e-4, abs=1e-5)
        assert distance(weights, weights_of(alone)) < 1e-3 * distance(weights, before)


def test_a_rank_that_nobody_joins_gives_up(base: Path) -> None:
    with pytest.raises(torch.distributed.DistError):
        join_ranks(0, 2, f"127.0.0.1:{free_port()}", deadline_s=1)
