"""A small client for people's programs: send feedback, label, read it back, ask for rewards.

    with Client("http://127.0.0.1:8000", key="rlhf_...") as client:
        client.rate("chatcmpl-8c1f", 4)
        while task := client.next_task():
            client.answer_task(task.id, ranking=[1, 2])

    async with AsyncClient("http://127.0.0.1:8000", key="rlhf_...") as client:
        await client.rate("chatcmpl-8c1f", 4)

What can be asked for is in `calls.py`; both clients have all of it. What the service refuses for the moment, and what
gets lost on the way, is sent again until a deadline; each piece of feedback has a key of its own, so that it is kept
once however often it is sent. For answers of the policy use any OpenAI client.
"""

from rlhf_ray.client.calls import Added, LabelTask, Past, Progress, Rewards, Snapshot, TasksAdded
from rlhf_ray.client.sending import (
    AsyncClient,
    Client,
    KeyReused,
    NotAllowed,
    NotFound,
    Refused,
    TaskTaken,
    Unavailable,
)

__all__ = [
    "Added",
    "AsyncClient",
    "Client",
    "KeyReused",
    "LabelTask",
    "NotAllowed",
    "NotFound",
    "Past",
    "Progress",
    "Refused",
    "Rewards",
    "Snapshot",
    "TaskTaken",
    "TasksAdded",
    "Unavailable",
]
