import asyncio
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.errors import ModelError
from rlhf_ray.models.ensemble import Ensemble
from rlhf_ray.models.files import MEMBERS
from rlhf_ray.models.reward import load_reward_model, new_reward_model
from rlhf_ray.models.sureness import Considered
from rlhf_ray.rewards.combined import make_sources
from rlhf_ray.serving.auth import Caller
from rlhf_ray.serving.backends import ScoreItem, Scores
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.reward import RewardReplica
from rlhf_ray.serving.settings import RewardSettings
from rlhf_ray.types import Exchange, Message
from tests.models.tiny import make_exchange, make_policy_folder, make_prompt
from tests.serving.apps import ADMIN, Requests, make_app


class LengthModel:
    """Rewards a text with its length, `nan` with none; notes its batches."""

    tokenizer = SimpleNamespace(chat_template=None, all_special_tokens=[])

    def __init__(self, *, hold: threading.Event | None = None, sure: bool = False) -> None:
        self.batches: list[list[str]] = []
        self.prompts: list[tuple[Message, ...]] = []
        self._hold, self._sure = hold, sure

    def consider_texts(self, texts: list[str], prompts: list[tuple[Message, ...]]) -> Considered:
        self.batches.append(texts)
        self.prompts += prompts
        if self._hold:
            assert self._hold.wait(5)
        if "poison" in texts:
            raise ZeroDivisionError("poison")
        rewards = [float("nan") if text == "nan" else float(len(text)) for text in texts]
        if not self._sure:
            return Considered(rewards, [], [])
        return Considered(rewards, [0.5 * reward for reward in rewards], [reward > 3 for reward in rewards])


def make_replica(model: LengthModel | None = None, **changes: Any) -> RewardReplica:
    return RewardReplica(Ensemble([cast(Any, model or LengthModel())]), **({"version": 2} | changes))


def texts(*given: str) -> list[ScoreItem]:
    return [ScoreItem((), text) for text in given]


async def gather(replica: RewardReplica, *requests: list[ScoreItem]) -> list[Any]:
    return await asyncio.gather(*map(replica.score, requests), return_exceptions=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = make_policy_folder(tmp_path_factory.mktemp("base") / "policy")
    target = tmp_path_factory.mktemp("reward") / "reward_model"
    new_reward_model(base, "decoder").save(target)
    return target


def test_each_request_is_told_how_sure_its_own_rewards_are() -> None:
    async def run() -> None:
        replica = make_replica(LengthModel(sure=True))
        first, other = await gather(replica, texts("a", "bbbb"), texts("cc"))
        assert (first.spreads, first.strange) == ((0.5, 2.0), (False, True))
        assert (other.spreads, other.strange) == ((1.0,), (False,))

    asyncio.run(run())


def test_requests_are_scored_together_and_answered_apart() -> None:
    async def run() -> None:
        hold = threading.Event()
        model = LengthModel(hold=hold)
        replica = make_replica(model)
        first = asyncio.create_task(replica.score(texts("a")))
        while not model.batches:
            await asyncio.sleep(0.001)
        rest = [asyncio.create_task(replica.score(texts(*some))) for some in (("bb", "ccc"), ("dddd",), ("eeeee",))]
        await asyncio.sleep(0)
        hold.set()
        scores = await asyncio.gather(first, *rest)
        assert [some.rewards for some in scores] == [(1.0,), (2.0, 3.0), (4.0,), (5.0,)]
        assert {(some.version, some.model) for some in scores} == {(2, "reward-model")}
        assert model.batches == [["a"], ["bb", "ccc", "dddd", "eeeee"]]

    asyncio.run(run())


def test_a_batch_holds_so_many_answers_and_a_larger_request_goes_alone() -> None:
    model = LengthModel()
    asyncio.run(
        gather(make_replica(model, batch=3), texts("a", "b"), texts("c"), texts("d", "e", "f", "g"), texts("h"))
    )
    assert model.batches == [["a", "b", "c"], ["d", "e", "f", "g"], ["h"]]


def test_a_score_that_is_no_number_is_an_error_for_its_request_alone() -> None:
    good, bad = asyncio.run(gather(make_replica(), texts("aa"), texts("a", "nan")))
    assert good.rewards == (2.0,)
    assert isinstance(bad, ApiError)
    assert (bad.status, bad.code) == (500, "not_finite")


def test_a_text_that_breaks_the_model_fails_alone() -> None:
    good, bad = asyncio.run(gather(make_replica(), texts("aa"), texts("poison")))
    assert good.rewards == (2.0,)
    assert isinstance(bad, ZeroDivisionError)


def test_several_requests_in_one_call_are_answered_apart_and_failures_stay_with_theirs() -> None:
    good, nan, poison = asyncio.run(make_replica().score_each([texts("aa"), texts("nan"), texts("poison")]))
    assert isinstance(good, Scores)
    assert good.rewards == (2.0,)
    assert isinstance(nan, ApiError)
    assert isinstance(poison, ApiError)  # not its own class, which another process may not know
    assert [(error.status, error.code) for error in (nan, poison)] == [(500, "not_finite"), (500, "not_scored")]


def test_nothing_is_scored_without_troubling_the_model() -> None:
    model = LengthModel()
    assert asyncio.run(make_replica(model).score([])).rewards == ()
    assert model.batches == []


def test_served_scores_equal_the_models_own(folder: Path) -> None:
    exchanges = [make_exchange(response=text) for text in ("we send a new one today", "sorry", "")]
    items = [ScoreItem(exchange.prompt.messages, exchange.response) for exchange in exchanges]
    own = load_reward_model(folder).score(exchanges)
    served = asyncio.run(gather(RewardReplica(folder, version=1, threads=1), *([item] for item in items)))
    assert [some.rewards[0] for some in served] == pytest.approx(own, abs=1e-5)


def test_an_ensemble_is_served_as_it_scores_a_run_with_all_its_members(tmp_path: Path) -> None:
    base = make_policy_folder(tmp_path / "base")
    for seed, place in enumerate((tmp_path / "model", tmp_path / "model" / MEMBERS / "1")):
        model = new_reward_model(base, "decoder", seed=seed)
        model.mean = 10.0 * seed  # a constant of its own, which is no doubt
        model.save(place)
    exchanges = [make_exchange(response=text) for text in ("we send a new one today", "sorry", "")]
    items = [ScoreItem(exchange.prompt.messages, exchange.response) for exchange in exchanges]
    in_a_run = make_sources(load_config(None, ["run.id=t"]).rewards, tmp_path / "model", {}).score(exchanges)
    (served,) = asyncio.run(gather(RewardReplica(tmp_path / "model", version=1, threads=1), items))
    assert served.rewards == pytest.approx(in_a_run.rewards, abs=1e-5)
    assert served.spreads == pytest.approx(in_a_run.spreads["reward_model"], abs=1e-5)
    alone = load_reward_model(tmp_path / "model").score(exchanges)
    assert served.rewards != pytest.approx(alone, abs=1e-3)
    assert min(served.spreads) > 1  # their means are 10 apart, and their scores are not


def test_the_model_is_told_which_answers_have_a_prompt_in_common() -> None:
    model = LengthModel()
    one, other = ([Message("user", text)] for text in ("broken", "late"))
    requests = [[ScoreItem(tuple(one), "a"), ScoreItem(tuple(one), "b")], [ScoreItem(tuple(other), "a")], texts("c")]
    asyncio.run(gather(make_replica(model), *requests))
    assert sorted(model.prompts, key=len) == [(), tuple(one), tuple(one), tuple(other)]


def test_a_text_written_as_the_models_template_does_scores_as_its_parts(folder: Path) -> None:
    prompt = make_prompt("my lamp arrived broken")
    model = load_reward_model(folder)
    whole = str(
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": "my lamp arrived broken"}, {"role": "assistant", "content": "sorry"}],
            tokenize=False,
        )
    )
    parts = ScoreItem(prompt.messages, "sorry")
    (scores,) = asyncio.run(gather(RewardReplica(Ensemble([model]), version=1), [parts, ScoreItem((), whole)]))
    assert scores.rewards[0] == pytest.approx(scores.rewards[1], abs=1e-5)
    assert model.score([Exchange(prompt, "sorry")]) == pytest.approx(scores.rewards[:1], abs=1e-5)


def test_another_version_answers_from_the_next_batch_on_and_a_broken_one_never(folder: Path, tmp_path: Path) -> None:
    async def run() -> None:
        replica = make_replica()
        assert (await replica.score(texts("aa"))).version == 2
        with pytest.raises(ModelError):
            await replica.load(tmp_path / "nothing", 3)
        assert (await replica.score(texts("aa"))).version == 2
        await replica.load(folder, 3)
        scores = await replica.score(texts("aa"))
        assert (scores.version, scores.rewards != (2.0,)) == (3, True)
        assert "version 3" in (await replica.ready()).detail

    asyncio.run(run())


def serve(use: Callable[[Requests], Awaitable[Any]], *, caller: Caller = ADMIN, **settings: Any) -> Any:
    async def run() -> Any:
        return await use(Requests(make_app(caller, reward=make_replica(), settings=RewardSettings(**settings))))

    return asyncio.run(run())


def test_rewards_come_with_the_version_that_gave_them() -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "completions": ["Hello!", ""]}
    answer = serve(lambda http: http.post("/v1/rewards", body))
    assert answer.status_code == 200
    given = answer.json()
    assert (given["object"], given["model"], given["version"]) == ("rewards", "reward-model", 2)
    assert given["rewards"][0] - given["rewards"][1] == len("Hello!")


def test_a_plain_prompt_is_the_users_turn() -> None:
    async def use(http: Requests) -> list[Any]:
        turns = {"messages": [{"role": "user", "content": "Hi"}]}
        return [
            (await http.post("/v1/rewards", body | {"completions": ["a"]})).json() for body in (turns, {"prompt": "Hi"})
        ]

    dialogue, plain = serve(use)
    assert dialogue == plain


def test_openrlhf_gets_rewards_in_its_own_shape() -> None:
    body = {"query": ["a", "bbb"], "prompts": ["", ""], "labels": ["1", None]}
    answer = serve(lambda http: http.post("/get_reward", body))
    assert answer.json() == {
        "rewards": [1.0, 3.0],
        "scores": [1.0, 3.0],
        "extra_logs": {"reward_model_version": [2.0, 2.0]},
    }


def test_openrlhf_may_leave_prompts_and_labels_out() -> None:
    for extra in ({}, {"prompts": None, "labels": None}):
        answer = serve(lambda http, extra=extra: http.post("/get_reward", {"query": ["a"]} | extra))
        assert answer.json()["rewards"] == [1.0]


def test_a_score_that_is_no_number_is_never_answered() -> None:
    answer = serve(lambda http: http.post("/get_reward", {"query": ["a", "nan"]}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "not_finite")


HI = {"prompt": "Hi"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rewards", {}),
        ("/v1/rewards", HI),
        ("/v1/rewards", {"completions": ["a"]}),
        ("/v1/rewards", HI | {"completions": []}),
        ("/v1/rewards", HI | {"completions": [1]}),
        ("/v1/rewards", HI | {"completions": ["a"] * 4}),
        ("/v1/rewards", HI | {"completions": ["a"], "messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/rewards", {"messages": [{"role": "assistant", "content": "Hi"}], "completions": ["a"]}),
        ("/v1/rewards", HI | {"completions": ["a"], "model": "x"}),
        ("/v1/rewards", b'{"prompt": "\\ud800", "completions": ["a"]}'),
        ("/get_reward", {"query": []}),
        ("/get_reward", {"query": "a"}),
        ("/get_reward", {"query": ["a"], "prompts": ["", ""]}),
        ("/get_reward", {"query": ["a"], "labels": []}),
        ("/get_reward", {"queries": ["a"]}),
    ],
)
def test_a_bad_request_is_refused_with_a_reason(path: str, body: Any) -> None:
    answer = serve(lambda http: http.post(path, body), max_items=3)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(("role", "status"), [("annotator", 403), ("app", 200), ("trainer", 200), ("admin", 200)])
def test_who_may_ask_for_rewards(role: Any, status: int) -> None:
    for path, body in (("/v1/rewards", HI | {"completions": ["a"]}), ("/get_reward", {"query": ["a"]})):
        answer = serve(
            lambda http, path=path, body=body: http.post(path, body), caller=Caller("key-2", "someone", role)
        )
        assert answer.status_code == status


def test_the_routes_do_not_bring_torch() -> None:
    script = "import sys, rlhf_ray.serving.reward, rlhf_ray.serving.feedback; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


def test_a_turn_of_the_dialogue_is_what_the_model_reads() -> None:
    model = LengthModel()
    asyncio.run(gather(make_replica(model), [ScoreItem((Message("user", "Hi"),), "Hello!")]))
    assert "Hi" in model.batches[0][0]
    assert model.batches[0][0].endswith("Hello!\n") or model.batches[0][0].endswith("Hello!")
