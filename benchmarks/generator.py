"""What does a generator cost beside the bare engine, and handing weights over beside the bare reload?

    python benchmarks/generator.py                     # 64 rollouts of 64 tokens, 1.1M and 12M parameters
    python benchmarks/generator.py --handover          # weights of 1M, 12M and 105M parameters; the stall of sampling

Generator: one actor, asked by the driver as a run asks it, against `LLM.generate` of the very same engine with the same
prompts, seeds and log-probs, called in its process; whole batches, and streaming in turns of 0.1 s. Rounds alternate.
Hand-over: push, load, verify and release, against the engine's own reload of weights that lie in its process, plus the
time to hash as many bytes. Stall: the longest time between two tokens of rollouts under way while weights arrive.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import ray
import torch

from rlhf_ray.config import load_config
from rlhf_ray.models.policy import new_policy, save_policy, train_tokenizer
from rlhf_ray.roles.actors import GeneratorActor
from rlhf_ray.roles.generator import Sampled
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.placement import Placement, start_ray
from rlhf_ray.roles.vllm_engine import VllmEngine, sampling_params
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.transport.intake import Intake
from rlhf_ray.transport.parcels import Parcel, Receiver, raw
from rlhf_ray.types import GenerationRequest, Sampling, Scored

SIZES = {"1M": (128, 4, 384, 4), "10M": (384, 6, 1152, 6), "100M": (768, 12, 2688, 12)}
"""Width, depth, feed-forward width and heads of a policy; the vocabulary is 1,024, of the largest 8,192."""
WANTED = {"whole": {"1M": 0.95, "10M": 0.95}, "streaming": {"1M": 0.85, "10M": 0.95}}
WANTED_HANDOVER = 2.0
WANTED_STALL = {"1M": 0.3, "10M": 0.3, "100M": 1.5}
PROMPT, RESPONSE, ROLLOUTS = 16, 64, 64
TURN_S = 0.1


class TimedEngine(VllmEngine):
    """Notes when each of its steps ended, and can be asked without any of our code around it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stepped: list[float] = []

    def step(self) -> list[tuple[str, Sampled]]:
        ended = super().step()
        self.stepped.append(time.monotonic())
        return ended


class TimedActor(GeneratorActor):
    """A generator's actor that also measures its own engine."""

    def bare(self, requests: Sequence[GenerationRequest], sampling: Sampling, seeded: bool = True) -> float:
        """Seconds of `LLM.generate`."""
        inputs = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        parameters = [sampling_params(sampling, self.engine.end_id, request.seed) for request in requests]
        for one in parameters:
            one.seed = one.seed if seeded else None
        start = time.perf_counter()
        self.engine.llm.generate(inputs, parameters, use_tqdm=False)
        return time.perf_counter() - start

    def bare_reload(self, *parcels: Parcel) -> float:
        """Seconds of the engine's reload of weights in this process, and of a hash of them."""
        intake = Intake(Receiver("bare"))
        weights = {name: tensor.clone() for parcel in parcels for name, tensor in intake.take(parcel)}
        whole = torch.cat([raw(tensor) for tensor in weights.values()]).numpy()
        start = time.perf_counter()
        self.engine.llm.collective_rpc(lambda worker: worker.reload_weights(weights_iterator=iter(weights.items())))
        hashlib.sha256(whole)
        return time.perf_counter() - start

    def longest_gap(self) -> float:
        """Seconds between two steps since this was last asked."""
        stepped, self.engine.stepped = self.engine.stepped, []
        return max(late - early for early, late in pairwise(stepped))


class MovedLearner(Learner):
    """A learner whose every update moves all weights a little."""

    def update(self, _: object) -> dict[str, float]:
        with torch.no_grad():
            for parameter in self.networks.policy.parameters():
                parameter.add_(1e-3)
        self.weights_step += 1
        return {"weights_step": float(self.weights_step)}

    def prepare(self, *_: object) -> Any:
        return type("Nothing", (), {"metrics": {}})


def main() -> int:
    """Prints ratios; exits 1 where one is not what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--handover", action="store_true")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=None)
    options = parser.parse_args()
    sizes = options.sizes or (list(SIZES) if options.handover else ["1M", "10M"])
    measure = handover if options.handover else generator
    passed = [with_roles(size, partial(measure, size, options.rounds)) for size in sizes]
    return 0 if all(passed) else 1


def with_roles(size: str, measure: Callable[..., bool]) -> bool:
    """A Ray, a generator and a learner for one size."""
    hidden, layers, intermediate, heads = SIZES[size]
    settings = [
        "run.id=bench", f"model.hidden={hidden}", f"model.layers={layers}", f"model.intermediate={intermediate}",
        f"model.heads={heads}", f"model.vocabulary={8192 if size == '100M' else 1024}", "resources.kv_cache_mib=512",
    ]  # fmt: skip
    config = load_config(None, settings)
    with tempfile.TemporaryDirectory() as folder, start_ray(config) as placement:
        draw = Random(0)
        texts = [" ".join("".join(draw.choices("aeioubdgklmnrst", k=6)) for _ in range(40)) for _ in range(400)]
        tokenizer = train_tokenizer(texts, vocabulary=config.model.vocabulary, context=config.model.context)
        base = Path(folder) / "policy"
        policy = new_policy(config.model, tokenizer, seed=0)
        save_policy(base, policy, tokenizer)
        print(f"{size} ({sum(p.numel() for p in policy.parameters()) / 1e6:.1f}M parameters)", flush=True)
        group = timed_group(placement, base, context=config.model.context)
        learner = placement.start_learner(partial(MovedLearner.from_folder, base, config))
        placement.wait_ready()
        handoff = WeightsHandoff(learner, group, vocabulary=len(tokenizer), context=config.model.context)
        handoff.publish(0)
        return measure(group, learner, handoff, requests(len(tokenizer)))


def timed_group(placement: Placement, base: Path, *, context: int) -> GeneratorGroup:
    """A group of one timed actor."""
    engine = partial(TimedEngine, base, context=context, kv_cache_mib=512)
    remote = ray.remote(TimedActor).options(**placement.options("generator"))
    return placement._add(
        GeneratorGroup(
            lambda name: remote.remote(engine, name=name, weights_step=0),
            wanted=1,
            deadline_s=300,
            start_deadline_s=300,
        )
    )


def requests(vocabulary: int, *, part: str = "r") -> list[GenerationRequest]:
    """64 prompts of 16 tokens."""
    draw = Random(0)
    return [
        GenerationRequest(f"{part}{i}", f"p{i}", tuple(draw.randrange(6, vocabulary) for _ in range(PROMPT)), seed=i)
        for i in range(ROLLOUTS)
    ]


def generator(
    size: str, rounds: int, group: GeneratorGroup, _: object, __: object, asked: list[GenerationRequest]
) -> bool:
    """Seconds of a batch, in three forms and bare."""
    sampling, actor = Sampling(max_tokens=RESPONSE), group.actors["generator-0"]
    took: dict[str, list[float]] = {"bare": [], "without seeds": [], "whole": [], "streaming": []}
    for turn in range(rounds + 1):
        once = {
            "bare": ray.get(actor.bare.remote(asked, sampling)),
            "whole": timed(lambda: group.generate(asked, sampling)),
            "streaming": timed(lambda: stream(group, asked, sampling)),
            "without seeds": ray.get(actor.bare.remote(asked, sampling, False)),
        }
        for name, seconds in once.items() if turn else ():
            took[name].append(seconds)
    median = {name: statistics.median(seconds) for name, seconds in took.items()}
    print(f"  bare LLM.generate {median['bare']:.3f} s, without seeds {median['without seeds']:.3f} s")
    passed = True
    for name in ("whole", "streaming"):
        ratio = median["bare"] / median[name]
        wanted = WANTED[name].get(size, 0.0)
        passed &= ratio >= wanted
        print(f"  {name}: {median[name]:.3f} s, {ratio:.3f} of the bare engine's speed (wanted: {wanted})", flush=True)
    return passed


def stream(group: GeneratorGroup, asked: list[GenerationRequest], sampling: Sampling) -> None:
    """The same batch in turns."""
    with group.session(turn_s=TURN_S) as session:
        session.ask(asked, sampling)
        while session.take():
            pass


def handover(
    size: str, rounds: int, group: GeneratorGroup, learner: Any, handoff: WeightsHandoff, asked: list[GenerationRequest]
) -> bool:
    """Seconds of a hand-over, and how long it keeps rollouts under way waiting."""
    actor, took, bare, stalls = group.actors["generator-0"], [], [], []
    for turn in range(rounds + 1):
        step = moved(learner)
        seconds = timed(lambda: handoff.publish(step))  # noqa: B023
        reload = ray.get(actor.bare_reload.remote(*learner.push_weights([])))
        if turn:
            took.append(seconds)
            bare.append(reload)
    for turn in range(rounds + 1):
        with group.session(turn_s=TURN_S, max_staleness=1) as session:
            session.ask(asked, Sampling(max_tokens=RESPONSE))
            for _ in range(3):
                session.turn()
            step = moved(learner)
            ray.get(actor.longest_gap.remote())
            handoff.publish(step)
            while session.take():
                pass
        if turn:
            stalls.append(ray.get(actor.longest_gap.remote()))
    ratio, stall = statistics.median(took) / statistics.median(bare), max(stalls)
    print(
        f"  hand-over {statistics.median(took):.3f} s, bare reload and hash {statistics.median(bare):.3f} s, "
        f"ratio {ratio:.2f} (wanted: {WANTED_HANDOVER}); longest stall {stall:.3f} s (wanted: {WANTED_STALL[size]})",
        flush=True,
    )
    return ratio <= WANTED_HANDOVER and stall <= WANTED_STALL[size]


def moved(learner: Any) -> int:
    """The learner's next step."""
    learner.prepare(Scored([], []))
    return int(learner.update()["weights_step"])


def timed(function: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
