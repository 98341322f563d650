"""A replica's side of the swap: the gate closes, the engine drains, loads, sings the canary, and the gate opens.

Where anything fails the old weights are loaded back before the gate opens; where even that fails it stays shut and the
replica is replaced. So no answer is ever made by two versions, and none by weights in doubt.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from rlhf_ray.errors import InfrastructureError, InputError, ModelError
from rlhf_ray.models.files import read_folder
from rlhf_ray.models.folder import explained
from rlhf_ray.models.registry import Version, verify
from rlhf_ray.models.stored import shapes_of
from rlhf_ray.serving.canary import Canary, ServingEngine
from rlhf_ray.serving.gate import Gate
from rlhf_ray.serving.worker import digest_of

IRRELEVANT = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
"""Keys of config.json in which versions of one architecture may differ."""
TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja")


class Swapper:
    """Owns which version the engine holds."""

    def __init__(
        self,
        engine: ServingEngine,
        version: Version,
        *,
        vocabulary: int,
        context: int,
        drain_s: float,
        load_s: float,
    ) -> None:
        """The engine holds `version` already. `load_s` bounds each of preparing, loading with proof, and going back."""
        self.engine = engine
        self.version = version
        self.gate = Gate()
        self.vocabulary = vocabulary
        self.context = context
        self.drain_s = drain_s
        self.load_s = load_s
        self.stalled_s = 0.0
        """How long the gate was closed for the last swap, without the draining."""

    async def prove(self) -> None:
        """The canary of what the engine holds; nobody is served before it has sung."""
        async with asyncio.timeout(self.load_s):
            canary, _ = await asyncio.to_thread(self._prepare, self.version)
            await canary.sing(self.engine, self.version.number)

    async def swap(self, wanted: Version) -> str | None:
        """Takes another version; None, or why not, in which case the one that was held is held still."""
        try:
            async with asyncio.timeout(self.load_s):
                ready = await asyncio.to_thread(self._prepare, wanted)  # answers go on meanwhile
            async with self.gate.closed(self.drain_s):
                return await self._take(wanted, ready)
        except InputError as error:
            return str(error)
        except TimeoutError:
            return f"preparing it took more than {self.load_s:g} s, or answers under way more than {self.drain_s:g} s"

    async def _take(self, wanted: Version, ready: tuple[Canary, str]) -> str | None:
        start = time.monotonic()
        try:
            await self._load(wanted, ready)
        except (InfrastructureError, TimeoutError) as error:
            await self._go_back(error)
            return str(error) or f"loading it took more than {self.load_s:g} s"
        self.version = wanted
        self.stalled_s = time.monotonic() - start
        return None

    async def _go_back(self, cause: Exception) -> None:
        try:
            await self._load(self.version, await asyncio.to_thread(self._prepare, self.version))
        except (InfrastructureError, InputError, TimeoutError) as error:
            self.gate.shut(f"neither the new weights ({cause}) nor the old ones ({error}) could be loaded")

    async def _load(self, version: Version, ready: tuple[Canary, str]) -> None:
        canary, expected = ready
        async with asyncio.timeout(self.load_s):
            loaded = await self.engine.load(version.folder)
            if loaded != expected:
                raise InfrastructureError(f"the engine read other weights than policy {version.number} has")
            await canary.sing(self.engine, version.number)

    def _prepare(self, version: Version) -> tuple[Canary, str]:
        """All that can be found out about a version while the old one answers."""
        folder, exact = version.folder, self.engine.exact
        with explained(folder, "policy"):
            verify(version)
            check_fits(self.version.folder, folder, version.number)
            canary = Canary.of(folder, version.number, vocabulary=self.vocabulary, context=self.context, exact=exact)
            return canary, digest_of(folder)


def check_fits(held: Path, wanted: Path, number: int) -> None:
    """`ModelError` where a running engine cannot take these weights: another architecture, size or tokenizer."""
    restart = f"policy {number} cannot be swapped in: start a new service with it"
    ours, theirs = read_folder(held, "policy"), read_folder(wanted, "policy")
    for key in sorted((ours.keys() | theirs.keys()) - IRRELEVANT):
        if ours.get(key) != theirs.get(key):
            raise ModelError(f"{key} of config.json is {ours.get(key)!r} and would be {theirs.get(key)!r}; {restart}")
    for name in TOKENIZER_FILES:
        if _meaning(held / name) != _meaning(wanted / name):
            raise ModelError(f"{name} differs from the one in use; {restart}")
    if shapes_of(held) != shapes_of(wanted):
        raise ModelError(f"its weights have other names or shapes; {restart}")


def _meaning(path: Path) -> Any:
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else text
