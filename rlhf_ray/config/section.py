"""What every part of the tree is: closed, frozen, documented; and how a mapping becomes one."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_ray.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the tree: closed, frozen, documented by the strings under its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)


AnySection = TypeVar("AnySection", bound=Section)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets each `dotted.key=value` in the tree, the later winning; `ConfigError` for what is none."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override '{override}' is not of the form dotted.key=value")
        _set(tree, key.split("."), _parse_value(override, value))


def parse_section(section: type[AnySection], tree: Mapping[str, Any], *, source: str) -> AnySection:
    """A section from a mapping; `ConfigError` names its source and the key at fault."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, section, source)) from None


def known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key, sections included: `ppo`, `ppo.kl`, `ppo.kl.coef`."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{key}.")


def _parse_value(override: str, value: str) -> Any:
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value of override '{override}' is not YAML") from None
    if isinstance(parsed, str):  # YAML reads 1e-4 as text
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"'{'.'.join(keys[: depth + 1])}' is a value, not a section")
        tree = child
    tree[keys[-1]] = value


def _explain(error: ValidationError, section: type[Section], source: str) -> str:
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, list(known_keys(section)), n=1, cutoff=0.0)
            problems.append(f"unknown key '{key}'; nearest known key: '{near[0]}'")
        elif key:
            problems.append(f"{key}: {item['msg'].lower()}, got {item['input']!r}")
        else:
            problems.append(item["msg"].removeprefix("Value error, "))
    return f"config {source}: " + "; ".join(problems)
