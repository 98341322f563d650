"""Ray's calls without Ray: a call is answered when the test's script says, in a time that passes only by waiting."""

from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import ActorDiedError

from rlhf_ray.roles.generator import Generator
from tests.roles.fakes import EchoEngine

NEVER = 1e9


class FakeRay:
    """`ray.wait`, `get`, `cancel` and `kill`, and `time.monotonic`; put in their place where calls are waited for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.killed: list[Any] = []
        self.handles: dict[str, Handle] = {}
        self.starts: dict[str, float | Exception] = {}
        """Seconds that an actor needs to start, or what its making fails with; 0 where nothing is said."""

    def monotonic(self) -> float:
        return self.now

    def wait(self, refs: Sequence["Ref"], timeout: float | None = None) -> tuple[list["Ref"], list["Ref"]]:
        assert timeout is not None
        first = min(refs, key=lambda ref: ref.ends)
        if first.ends > self.now + timeout:
            self.now += timeout
            return [], list(refs)
        self.now = max(self.now, first.ends)
        return [first], [ref for ref in refs if ref is not first]

    def get(self, ref: "Ref") -> Any:
        return ref.result()

    def cancel(self, ref: "Ref") -> None:
        pass  # an actor finishes what it is at

    def kill(self, handle: "Handle") -> None:
        self.killed.append(handle.name)
        handle.alive = False

    def ask(self, name: str) -> "Handle":
        self.handles[name] = Handle(self, name)
        return self.handles[name]


class Ref:
    """A call under way; an actor does one after the other, each when its time has come, if it lives then."""

    def __init__(self, ray: FakeRay, handle: "Handle", method: str, do: Callable[[], Any]) -> None:
        self.ray, self.handle, self.method, self.do = ray, handle, method, do
        takes = NEVER if method in handle.hangs_at else handle.seconds if method == "generate" else 0.0
        if method == "whereabouts" and isinstance(start := ray.starts.get(handle.name, 0.0), float | int):
            takes = start
        self.ends = max(ray.now, handle.queue[-1].ends if handle.queue else 0.0) + takes
        handle.queue.append(self)
        self.outcome: Any = None

    def result(self) -> Any:
        while self in self.handle.queue:
            self.handle.queue.pop(0).run()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def run(self) -> None:
        if self.method in self.handle.dies_at:
            self.handle.alive = False
        try:
            self.outcome = self.do() if self.handle.alive else ActorDiedError()
        except Exception as error:
            self.outcome = error


class Handle:
    """An actor handle; its script says at which methods it dies or hangs."""

    def __init__(self, ray: FakeRay, name: str) -> None:
        self.ray, self.name, self.alive = ray, name, True
        self.role = Generator(EchoEngine(), name=name, weights_step=0)
        self.dies_at: list[str] = []
        self.hangs_at: set[str] = set()
        self.seconds = 1.0
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.queue: list[Ref] = []

    def __getattr__(self, method: str) -> Any:
        handle = self

        class Method:
            def remote(self, *args: Any, **kwargs: Any) -> Ref:
                handle.calls.append((method, args))
                return Ref(handle.ray, handle, method, lambda: handle.do(method, args, kwargs))

        return Method()

    def do(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method == "whereabouts":
            start = self.ray.starts.get(self.name)
            if isinstance(start, Exception):
                raise start
            return f"node-of-{self.name}"
        return getattr(self.role, method)(*args, **kwargs)

    def seeds(self) -> list[list[int]]:
        """Of each call of `generate`."""
        return [[request.seed for request in args[0]] for method, args in self.calls if method == "generate"]
