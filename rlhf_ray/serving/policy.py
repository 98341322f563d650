"""The policy behind HTTP: a replica that answers prompts, each by one version, and takes new versions in its turn."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Protocol, TypeVar

from rlhf_ray.errors import ConfigError, InfrastructureError, ModelError
from rlhf_ray.models.files import read_folder
from rlhf_ray.models.policy import load_tokenizer
from rlhf_ray.models.registry import Version
from rlhf_ray.serving.backends import Delta, GenerateCall
from rlhf_ray.serving.canary import Piece, ServingEngine
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.rendering import Rendering
from rlhf_ray.serving.settings import PolicySettings
from rlhf_ray.serving.swap import Swapper

ASK_EVERY_S = 0.5
ASK_DEADLINE_S = 5.0
RETRY_AFTER_S = 2.0
T = TypeVar("T")

log = logging.getLogger(__name__)


class VersionsDesk(Protocol):
    """`Versions`, as a replica sees it; calls that do not get through raise `InfrastructureError` or `ApiError`."""

    async def first(self) -> Version:
        """What to load when starting."""

    async def turn(self, replica: str, holding: int, /) -> Version | None:
        """Which version to swap to now, if any."""

    async def report(self, replica: str, holding: int, /, *, tried: int, error: str | None) -> None:
        """How a turn ended."""


class PolicyReplica:
    """One engine with its tokenizer. `start` before use; `follow` runs until it is cancelled."""

    def __init__(
        self,
        version: Version,
        make_engine: Callable[[Path, int], ServingEngine],
        settings: PolicySettings,
        *,
        name: str = "policy",
    ) -> None:
        """`make_engine(folder, context)` blocks until the engine holds the version's weights."""
        context = context_of(version.folder, settings.context)
        self.name = name
        self.settings = settings
        self.rendering = Rendering(load_tokenizer(version.folder), context=context)
        self.engine = make_engine(version.folder, context)
        self.swapper = Swapper(
            self.engine,
            version,
            vocabulary=self.rendering.vocabulary,
            context=context,
            drain_s=settings.deadline_s + ASK_DEADLINE_S,  # no answer takes longer
            load_s=settings.swap_deadline_s,
        )
        self.counts: Counter[str] = Counter()
        """What happened so far: answers, aborted, engine_failures, swaps, swap_failures, unasked."""

    async def start(self) -> None:
        """Proves the weights that the engine has read; raises where they are not the version's."""
        async with asyncio.timeout(self.settings.swap_deadline_s):
            await self.engine.begin()
        await self.swapper.prove()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Delta, None]:
        """The answers as they grow, all by the version that is held when the first token is drawn."""
        ends_at = asyncio.get_running_loop().time() + self.settings.deadline_s
        prompt_ids = await self.rendering.ids(call)
        max_tokens = self.rendering.room(len(prompt_ids), call.max_tokens, self.settings.max_tokens)
        async with self.swapper.gate.passing(self.settings.deadline_s):
            version, whole = self.swapper.version.number, False
            try:
                async with aclosing(self._pieces(prompt_ids, call, max_tokens, ends_at)) as pieces:
                    async for piece in pieces:
                        yield Delta(
                            index=piece.index,
                            policy_version=version,
                            text=piece.text,
                            token_ids=piece.token_ids,
                            logprobs=piece.logprobs,
                            finish_reason=piece.finish_reason,
                            prompt_tokens=len(prompt_ids),
                        )
                whole = True
            except InfrastructureError:
                self.counts["engine_failures"] += 1
                raise ApiError(503, "the engine failed: try again", retry_after=RETRY_AFTER_S) from None
            finally:
                self.counts["answers" if whole else "aborted"] += 1

    async def follow(self, versions: VersionsDesk) -> None:
        """Asks twice a second whether to swap; what does not get through is counted and asked again."""
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            try:
                await self.ask(versions)
            except (InfrastructureError, ApiError, TimeoutError):
                self.counts["unasked"] += 1

    async def ask(self, versions: VersionsDesk) -> None:
        """One question, and the swap where it is this replica's turn."""
        wanted = await _within(versions.turn(self.name, self.holding))
        if wanted is None or wanted.number == self.holding:
            return
        error = await self.swapper.swap(wanted)
        self.counts["swap_failures" if error else "swaps"] += 1
        log.info("swap to policy %d: %s", wanted.number, error or f"stalled for {self.swapper.stalled_s:.2f} s")
        await _within(versions.report(self.name, self.holding, tried=wanted.number, error=error))

    @property
    def holding(self) -> int:
        """The number of the version that answers."""
        return self.swapper.version.number

    async def check_health(self) -> None:
        """Raises where the replica has to be replaced: its engine is dead, or its weights are in doubt."""
        if self.swapper.gate.shut_because is not None:
            raise InfrastructureError(self.swapper.gate.shut_because)
        await self.engine.check_health()

    def close(self) -> None:
        """Ends the engine's process."""
        self.engine.close()

    async def _pieces(
        self, prompt_ids: list[int], call: GenerateCall, max_tokens: int, ends_at: float
    ) -> AsyncGenerator[Piece, None]:
        async with aclosing(self.engine.generate(prompt_ids, call, max_tokens=max_tokens)) as pieces:
            while True:
                try:
                    async with asyncio.timeout_at(ends_at):  # wait_for of Python 3.11 may lose a cancellation
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    limit = f"{self.settings.deadline_s:g} s"
                    raise ApiError(504, f"the answer was not whole after {limit}: ask for fewer tokens") from None
                yield piece


async def first_version(versions: VersionsDesk, *, wait_s: float = 60) -> Version:
    """The version to start with; `ConfigError` where none is promoted for so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            while True:
                try:
                    return await _within(versions.first())
                except (InfrastructureError, ApiError, TimeoutError):
                    await asyncio.sleep(1)
    raise ConfigError("no policy is promoted: publish one and say rlhf policies promote NUMBER")


def context_of(folder: Path, wanted: int | None) -> int:
    """Tokens of prompt and answer together: what is wanted, if the model holds as many; by default all it holds."""
    most = read_folder(folder, "policy").get("max_position_embeddings")
    if not isinstance(most, int):
        raise ModelError(f"config.json of {folder} names no max_position_embeddings: set policy.context") from None
    if wanted is not None and wanted > most:
        raise ConfigError(f"policy.context={wanted} is more than the {most} tokens that the model holds")
    return wanted or most


async def _within(call: Awaitable[T]) -> T:
    async with asyncio.timeout(ASK_DEADLINE_S):
        return await call
