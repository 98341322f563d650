"""A vLLM engine inside this process, stepped by its generator: token ids in, token ids and behaviour log-probs out."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.models.policy import load_tokenizer
from rlhf_ray.roles.generator import Sampled
from rlhf_ray.roles.weights import CACHE_BLOCK
from rlhf_ray.transport.parcels import Parcel
from rlhf_ray.types import Sampling, Span

MAX_SEQUENCES = 256
"""Requests that run at the same time; more wait their turn."""
BATCHED_TOKENS = 8192
"""Prompt and response tokens of one engine step."""
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives here, not in a child process
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class VllmEngine:
    """One whole engine. Set the threads by `OMP_NUM_THREADS` before Python starts: later is too late."""

    def __init__(
        self,
        model_path: Path,
        *,
        context: int,
        kv_cache_mib: int = 256,
        compile: bool = False,
        seed: int = 0,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantisation: Literal["fp8"] | None = None,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        can_sleep: bool = False,
    ) -> None:
        """Takes some 20 s, most of it vLLM's imports. In float32 log-probs equal the learner's to about 1e-5.

        With more than one GPU the engine's workers are processes of their own beside this one.
        """
        os.environ.update(_ENVIRONMENT)  # read when vLLM is imported
        from vllm import LLM
        from vllm.platforms import current_platform

        self.end_id = int(load_tokenizer(model_path).eos_token_id)
        self.llm = LLM(
            str(model_path),
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=not compile,
            quantization=quantisation,
            tensor_parallel_size=tensor_parallel,
            pipeline_parallel_size=pipeline_parallel,
            distributed_executor_backend="uni" if tensor_parallel * pipeline_parallel == 1 else "mp",
            worker_extension_cls="rlhf_ray.roles.vllm_worker.WeightsWorker",
            enable_sleep_mode=can_sleep,
            kv_cache_memory_bytes=kv_cache_mib << 20,
            max_model_len=context,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=max(BATCHED_TOKENS, context),
            enable_prefix_caching=True,
            block_size=CACHE_BLOCK,
            # vLLM 0.32 winds back the generator of a seeded request whose prompt it has read in part only,
            # and CPU generators cannot be: there a prompt is read whole.
            enable_chunked_prefill=not current_platform.is_cpu(),
            logprobs_mode="processed_logprobs",
            seed=seed,
            # the folder's generation_config.json must not change how rollouts are sampled
            generation_config="vllm",
        )
        self.engine = self.llm.llm_engine

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> None:
        """Queues a prompt; its response ends at the end token, one of `stop_ids` or after `max_tokens`."""
        (rendered,) = self.engine.renderer.render_cmpl([{"prompt_token_ids": list(prompt)}])
        self.engine.add_request(id, rendered, sampling_params(sampling, self.end_id, seed))

    def step(self) -> list[tuple[str, Sampled]]:
        """One step of continuous batching: prompts that fit are read, every other response grows by a token."""
        return [(output.request_id, _sampled(output.outputs[0])) for output in self.engine.step()]

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self.engine.has_unfinished_requests())

    def load(self, parcel: Parcel, receiver: str) -> str | None:
        """Loads a parcel in place; after the last one the caches are emptied: what is in them is the old weights' work.

        A response under way is then read again by the new weights at the next step, and goes on where it was.
        """
        hashes = self.llm.collective_rpc("load_parcel", args=(parcel, receiver))
        if not parcel.last:
            return None
        if not self.engine.reset_prefix_cache(reset_running_requests=True):
            raise InfrastructureError("the engine kept its prefix cache over a change of weights")
        # each of the engine's processes takes in all parcels; where they differ, no hash is the right one
        return str(hashes[0]) if len(set(hashes)) == 1 else " ".join(hashes)

    def sleep(self) -> None:
        """Gives the GPU memory up, weights and caches with it."""
        self.llm.sleep(level=2)

    def wake(self) -> None:
        """Takes memory again; what the weights are is undefined until they are loaded."""
        self.llm.wake_up()

    def stamp(self, weights_step: int) -> None:
        """vLLM notes this number with each token that it samples from here on."""
        self.engine.set_weight_version(str(weights_step))


def sampling_params(sampling: Sampling, end_id: int, seed: int) -> Any:
    """How vLLM is told to sample: token ids and their log-probs alone, as little work as can be."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        seed=seed,
        stop_token_ids=[end_id, *sampling.stop_ids],
        logprobs=0,  # the sampled token's alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sampled(completion: Any) -> Sampled:
    ids = tuple(int(i) for i in completion.token_ids)
    assert len(completion.logprobs) == len(completion.logprobs.logprobs) == len(ids), "one log-prob a token"
    if completion.finish_reason not in ("stop", "length"):
        raise InfrastructureError(f"the engine gave a response up: {completion.finish_reason}")
    spans = tuple(Span(span.start, int(span.version)) for span in completion.weight_versions)
    return Sampled(ids, tuple(completion.logprobs.logprobs), completion.finish_reason, spans)
