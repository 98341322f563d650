"""What the config says of an engine reaches vLLM; the engine itself is tested in tests/on_ray/test_vllm.py."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.errors import ConfigError
from rlhf_ray.roles.placement import engine_for
from rlhf_ray.roles.weights import CACHE_BLOCK
from tests.models.tiny import make_policy_folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that `vllm.LLM` was given last."""
    given: dict[str, Any] = {}

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            given.update(options, model=model, slept=[])
            self.llm_engine = SimpleNamespace()

        def sleep(self, level: int) -> None:
            given["slept"].append(level)

        def wake_up(self) -> None:
            given["slept"].append("awake")

    platform = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: False))
    for name, module in {"vllm": SimpleNamespace(LLM=LLM), "vllm.platforms": platform}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return given


def engine(tmp_path: Path, *overrides: str) -> Any:
    return engine_for(load_config(None, ["run.id=e", *overrides]), make_policy_folder(tmp_path / "policy"))()


def test_by_default_it_is_one_process_in_float32_that_holds_nothing_back(made: dict[str, Any], tmp_path: Path) -> None:
    engine(tmp_path)
    assert (made["dtype"], made["quantization"], made["enable_sleep_mode"]) == ("float32", None, False)
    assert (made["tensor_parallel_size"], made["pipeline_parallel_size"]) == (1, 1)
    assert made["distributed_executor_backend"] == "uni"
    assert made["enable_prefix_caching"]
    assert made["block_size"] == CACHE_BLOCK  # what probes are longer than
    assert made["logprobs_mode"] == "processed_logprobs"


def test_an_engine_on_several_gpus_has_workers_of_its_own(made: dict[str, Any], tmp_path: Path) -> None:
    engine(
        tmp_path,
        "resources.engine_tensor_parallel=2",
        "resources.engine_pipeline_parallel=2",
        "resources.generator_gpus=4",
    )
    assert (made["tensor_parallel_size"], made["pipeline_parallel_size"]) == (2, 2)
    assert made["distributed_executor_backend"] == "mp"


def test_rollouts_in_fewer_bits(made: dict[str, Any], tmp_path: Path) -> None:
    settings = ["resources.engine_dtype=bfloat16", "resources.engine_quantisation=fp8", "resources.generator_gpus=1"]
    engine(tmp_path, *settings, "rollout.tolerance=0.2", "ppo.correction=token")
    assert (made["dtype"], made["quantization"]) == ("bfloat16", "fp8")
    with pytest.raises(ConfigError, match=r"set ppo\.correction"):
        load_config(None, ["run.id=e", *settings, "rollout.tolerance=0.2"])


def test_weights_come_from_gpu_to_gpu_only_where_both_have_one() -> None:
    gpus = ["resources.generator_gpus=1", "resources.learner_gpus=1"]
    for transport in ("nccl", "cuda_ipc"):
        setting = f"resources.weights_transport={transport}"
        assert load_config(None, ["run.id=e", setting, *gpus]).resources.weights_transport == transport
        with pytest.raises(ConfigError, match="carries weights between GPUs: set resources"):
            load_config(None, ["run.id=e", setting, *gpus[:1]])


def test_a_handle_on_gpu_memory_is_for_one_gpu() -> None:
    shared = ["run.id=e", "resources.weights_transport=cuda_ipc", "resources.learner_gpus=0.5"]
    for several in (["resources.learner_ranks=2"], ["resources.engine_tensor_parallel=2"]):
        with pytest.raises(ConfigError, match="is for one learner and engines on the same GPU"):
            load_config(None, [*shared, "resources.generator_gpus=2", *several])


def test_an_engine_beside_the_learner_gives_its_memory_up_and_takes_it_again(
    made: dict[str, Any], tmp_path: Path
) -> None:
    sleeper = engine(tmp_path, "resources.engine_sleep=true", "resources.generator_gpus=0.5")
    assert made["enable_sleep_mode"]
    sleeper.sleep()
    sleeper.wake()
    assert made["slept"] == [2, "awake"]
