"""Tiny policies that know their answers by heart: who answered can be told from what was said."""

from pathlib import Path
from typing import Any

import torch

from rlhf_ray.models.policy import encode_exchange, save_policy
from tests.models.tiny import make_exchange, make_policy, make_tokenizer

CONTEXT = 256
TOKENS = 24
"""More than any answer has."""
QUESTIONS = ["my lamp arrived broken", "my chair never arrived", "hello", "where is my lamp, tell me today " * 6]
ANSWERS = ["we send a new one today", "sorry, we pay you back", "your chair comes on Monday", "which lamp do you mean?"]


def answer_of(number: int, question: str) -> str:
    """What version `number` was taught to say: each says something else to each question."""
    return ANSWERS[(number + QUESTIONS.index(question)) % len(ANSWERS)]


def loss_of(policy: Any, ids: list[int], start: int) -> torch.Tensor:
    """Of the answer, which begins at `start`."""
    loss: torch.Tensor = policy(torch.tensor([ids]), labels=torch.tensor([[-100] * start + ids[start:]])).loss
    return loss


def taught_policy(folder: Path, number: int) -> Path:
    """A tiny policy that knows its answers by heart."""
    tokenizer = make_tokenizer(context=CONTEXT)
    policy = make_policy(tokenizer, seed=number, hidden=64, heads=2, context=CONTEXT).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    taught = [encode_exchange(tokenizer, make_exchange(text, answer_of(number, text))) for text in QUESTIONS]
    for _ in range(300):
        losses = [
            policy(torch.tensor([ids]), labels=torch.tensor([[-100] * start + ids[start:]])).loss
            for ids, start in taught
        ]
        loss = torch.stack(losses).mean()
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    save_policy(folder, policy.eval(), tokenizer)
    return folder
