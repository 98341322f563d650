"""The door over parts in this process, whoever asks being one caller, and requests to it."""

import json
from typing import Any

import httpx
from fastapi import FastAPI

from rlhf_ray.serving.auth import Caller
from rlhf_ray.serving.backends import RecordsBackend, RewardBackend
from rlhf_ray.serving.door import create_door
from rlhf_ray.serving.settings import LimitSettings, RewardSettings, ServiceConfig

ANNOTATOR = Caller("key-1", "ann-1", "annotator")
ADMIN = Caller("key-0", "boss", "admin")


class OneCaller:
    """Takes any key for the same person's."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def any(self) -> bool:
        return True

    def caller(self, key: str) -> Caller:
        return self._caller


def make_app(
    caller: Caller = ADMIN,
    *,
    records: RecordsBackend | None = None,
    reward: RewardBackend | None = None,
    settings: RewardSettings | None = None,
) -> FastAPI:
    limits = LimitSettings(requests_per_minute=1_000_000, concurrent=1_000)
    config = ServiceConfig(limits=limits, reward=settings or RewardSettings())
    return create_door(config, policy=None, reward=reward, records=records, versions=None, keys=OneCaller(caller))


class Requests:
    """Requests to an app, each answered as a whole."""

    def __init__(self, app: FastAPI, *, key: str = "key") -> None:
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {key}"}
        )

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self._http.post(path, content=content, headers={"content-type": "application/json"} | names)

    async def put(self, path: str, body: Any) -> httpx.Response:
        return await self._http.put(path, json=body)

    async def get(self, path: str, **params: Any) -> httpx.Response:
        return await self._http.get(path, params=params)

    async def delete(self, path: str, **params: Any) -> httpx.Response:
        return await self._http.delete(path, params=params)
