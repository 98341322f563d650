"""How much of a batch goes through a model at once, and less of it where memory has run out."""

from collections.abc import Callable
from typing import TypeVar

import torch

from rlhf_ray.errors import InfrastructureError

T = TypeVar("T")
HALVINGS_ALLOWED = 3


class TokenBudget:
    """Tokens, padding included, of one pass; halved for good whenever a pass did not fit."""

    def __init__(self, tokens: int, *, alone: bool = True) -> None:
        """`alone`: no other rank waits for this one in the middle of a pass, so it may be made again."""
        self.tokens, self.alone = tokens, alone
        self.halved = 0

    def spend(self, attempt: Callable[[int], T], *, all_of_it: int) -> T:
        """What `attempt(tokens)` returns; where memory runs out it is made again from its start with half of them, or
        half of `all_of_it`, the tokens that there are, where that is less.

        Raises `InfrastructureError` with the setting to change once that has not helped three times.
        """
        while True:
            try:
                return attempt(self.tokens)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # here and not above, for the error's traceback holds the tensors of the pass
            if self.halved == HALVINGS_ALLOWED or self.tokens < 2 or not self.alone:
                raise InfrastructureError(
                    f"the learner ran out of memory {self.halved + 1} times, last with {self.tokens} tokens at once "
                    f"({reason}); set resources.learner_tokens below that, or give it more memory"
                )
            self.tokens = min(self.tokens, all_of_it) // 2
            self.halved += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> bool:
    """Whether torch said so, on a GPU or of the machine's own memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
