"""What can go wrong, by who has to act. Every error says what happened and what to do about it.

| class                 | whose                 | exit code                                  |
|-----------------------|-----------------------|--------------------------------------------|
| `InputError` (a `ValueError`) and its children | the user's | 2                              |
| `NoValidCheckpoint`   | the disk's            | 3                                          |
| `Diverged`            | the optimisation's    | 4                                          |
| `InfrastructureError` | a machine's or actor's| 5 (resumable)                              |
| `Interrupted`         | the operator's        | 130 or 143 (resumable)                     |

Our own mistakes are `assert`s, not classes.
"""


class InputError(ValueError):
    """The user's input cannot be used; the message says what to change."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration key or value is wrong."""


class DataError(InputError):
    """A data file or a row of it is wrong."""


class ModelError(InputError):
    """A model folder is missing, incomplete or does not fit its tokenizer or its use."""


class FeedbackError(InputError):
    """A rating, ranking or comment that no annotator can have meant."""


class RunFailed(RuntimeError):
    """A run ended early; the class says why, `exit_code` says it to the shell."""

    exit_code = 1


class NoValidCheckpoint(RunFailed):
    """Checkpoints exist and none of them verifies. A run never starts over silently."""

    exit_code = 3


class Diverged(RunFailed):
    """A loss was not finite, or the KL to the reference passed its limit."""

    exit_code = 4


class InfrastructureError(RunFailed):
    """An actor died or a deadline passed. The same command resumes the run."""

    exit_code = 5


class DeadlineExceeded(InfrastructureError):
    """A remote call did not answer in time; the message names the actor, its node and what it was doing."""


class ActorFailed(InfrastructureError):
    """An actor raised or died; the message carries its own traceback, its name and its node."""


class ActorLost(ActorFailed):
    """An actor's process or node is gone, with whatever it was at; another may do that again."""


class TransferBroken(InfrastructureError):
    """Weights did not get through to all that they were meant for: one of them, or the network, is gone."""


class WeightsMismatch(InfrastructureError):
    """A generator does not hold the learner's weights: hash or log-prob probe disagree."""


class Interrupted(RunFailed):
    """The run was asked to stop (SIGINT: 130, SIGTERM: 143) and has saved itself."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
