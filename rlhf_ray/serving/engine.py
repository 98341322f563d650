"""vLLM's asynchronous engine: token ids in, pieces of answers out. Its core is a process of its own.

Only what is used here can be reached: no control route, no code from a model folder, no object that is unpickled.
"""

import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rlhf_ray.errors import ConfigError, InfrastructureError
from rlhf_ray.models.files import read_folder
from rlhf_ray.roles.weights import CACHE_BLOCK
from rlhf_ray.serving.backends import GenerateCall, TokenLogprob
from rlhf_ray.serving.canary import Piece, ServingEngine
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.types import FinishReason

MAX_SEQUENCES = 256
BATCHED_TOKENS = 8192
MAX_LOGPROBS = 20
"""Alternatives that a request may ask for, as OpenAI has it."""
FORBIDDEN = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION")
_ENVIRONMENT = {
    # on a CPU the core then does the work itself, as on a GPU: a worker process of its own would be tied to the core,
    # and the core to nobody
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class VllmServingEngine(ServingEngine):
    """One engine that many requests share. Set its threads by `OMP_NUM_THREADS` before Python starts."""

    def __init__(self, folder: Path, *, context: int, kv_cache_mib: int, on_gpu: bool = False) -> None:
        """Blocks for some 20 s. A policy folder of the registry, never a name that would be looked up elsewhere."""
        refuse_open_doors()
        read_folder(folder, "policy")
        os.environ.update(_ENVIRONMENT)  # read when vLLM is imported
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.exact = not on_gpu
        arguments = AsyncEngineArgs(
            model=str(folder.resolve()),
            trust_remote_code=False,
            dtype="auto" if on_gpu else "float32",
            enforce_eager=not on_gpu,
            distributed_executor_backend="uni",
            kv_cache_memory_bytes=kv_cache_mib << 20,
            max_model_len=context,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=max(BATCHED_TOKENS, context),
            block_size=CACHE_BLOCK,  # what the canary's prompts are longer than
            enable_prefix_caching=True,
            # see roles/vllm_engine.py: a seeded request whose prompt was read in part only cannot be wound back on CPU
            enable_chunked_prefill=on_gpu,
            logprobs_mode="processed_logprobs",
            max_logprobs=MAX_LOGPROBS,
            generation_config="vllm",
            load_format="safetensors",
            worker_extension_cls="rlhf_ray.serving.worker.FolderLoader",
            enable_log_requests=False,
            disable_log_stats=True,
        )
        self.llm = AsyncLLM.from_engine_args(arguments)

    async def begin(self) -> None:
        """Ties the engine's process to this one, which may be killed without a word."""
        await self.llm.collective_rpc("end_with_replica")

    async def generate(
        self, prompt_ids: Sequence[int], call: GenerateCall, *, max_tokens: int
    ) -> AsyncGenerator[Piece, None]:
        """The answers as they grow, or each at once at its end where the call does not stream."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        inputs, copies = {"prompt_token_ids": list(prompt_ids)}, 1
        if call.temperature == 0:  # vLLM draws the likeliest answer once only; the others would be the same
            call, copies = replace(call, n=1), call.n
        try:
            outputs = self.llm.generate(cast("Any", inputs), _parameters(call, max_tokens), call.id)
            async with aclosing(outputs) as running:  # vLLM aborts the request when its iterator is closed
                async for output in running:
                    for choice in output.outputs:
                        piece = _piece(choice, call.logprobs)
                        for copy in range(copies):
                            yield replace(piece, index=piece.index + copy)
        except (EngineDeadError, EngineGenerateError) as error:
            raise InfrastructureError(f"the engine failed: {type(error).__name__}") from error
        except VLLMClientError as error:  # its message may hold what was asked
            raise ApiError(400, "the engine cannot sample in this way: leave parameters out") from error

    async def load(self, folder: Path) -> str:
        """The worker reads the folder itself; what it returns is the hash of what it gave to the model."""
        try:
            hashes = set(await self.llm.collective_rpc("load_folder", args=(str(folder.resolve()),)))
            emptied = await self.llm.reset_prefix_cache()
        except Exception as error:  # vLLM carries what a worker raised across as a bare Exception
            raise InfrastructureError(f"the engine could not load {folder.name}: {type(error).__name__}") from error
        if not emptied:
            raise InfrastructureError("the engine kept its prefix cache over a change of weights")
        if len(hashes) != 1:
            raise InfrastructureError(f"the engine's workers read {len(hashes)} different sets of weights")
        return str(hashes.pop())

    async def check_health(self) -> None:
        """Raises where its process has died."""
        if self.llm.errored:
            raise InfrastructureError("the engine's process has died")

    def close(self) -> None:
        """Ends its process."""
        self.llm.shutdown()


def refuse_open_doors() -> None:
    """`ConfigError` where the environment would let a request run code in the engine."""
    for name in FORBIDDEN:
        if os.environ.get(name, "0") not in ("", "0"):
            raise ConfigError(f"{name} is set, which opens the engine to code from outside: unset it")


def _parameters(call: GenerateCall, max_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=call.n,
        temperature=call.temperature,
        top_p=call.top_p,
        seed=None if call.seed is None else call.seed % (1 << 62),  # further choices count on from it
        stop=list(call.stop),
        max_tokens=max_tokens,
        logprobs=call.logprobs,
        output_kind=RequestOutputKind.DELTA if call.stream else RequestOutputKind.FINAL_ONLY,
    )


def _piece(choice: Any, alternatives: int | None) -> Piece:
    reason = choice.finish_reason
    if reason not in (None, "stop", "length"):
        raise InfrastructureError(f"the engine gave an answer up: {reason}")
    ids = tuple(int(token) for token in choice.token_ids)
    logprobs = None
    if alternatives is not None:
        logprobs = tuple(
            _token(token, position, alternatives) for token, position in zip(ids, choice.logprobs or [], strict=True)
        )
    return Piece(choice.index, choice.text, ids, cast("FinishReason | None", reason), logprobs)


def _token(token: int, position: Any, alternatives: int) -> TokenLogprob:
    """A sampled token; among the alternatives are those only that could have been drawn."""
    likeliest = sorted(position.items(), key=lambda item: -item[1].logprob)
    top = tuple(
        TokenLogprob(found.decoded_token or "", int(other), found.logprob)
        for other, found in likeliest[:alternatives]
        if found.logprob != float("-inf")
    )
    chosen = position[token]
    return TokenLogprob(chosen.decoded_token or "", token, chosen.logprob, top)
