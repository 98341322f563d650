"""The user's own Python, named in a config as `package.module:name`."""

from typing import Any

from pydantic import ImportString, TypeAdapter, ValidationError

from rlhf_ray.errors import ConfigError


def load_plugin(named: str, *, key: str) -> Any:
    """What is named; `ConfigError` with the config's `key` where it cannot be imported or cannot be called."""
    try:
        found = TypeAdapter(ImportString[Any]).validate_python(named)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(
            f"{key}: cannot import {named}: {reason}; it must be on PYTHONPATH wherever the run's processes are"
        ) from None
    if not callable(found):
        raise ConfigError(f"{key}: {named} cannot be called; name a function or a class")
    return found
