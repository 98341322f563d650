"""Every key of a tree of settings as Markdown: what docs/configuration.md is made of."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_ray.config import Section

WORDS = {bool: "true, false", int: "integer", float: "number", str: "text", Path: "path", types.NoneType: "null"}

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
"""How pydantic calls its bounds."""


def reference(root: type[Section]) -> str:
    """One table a section: key, what it takes, its default, what it does."""
    return "\n".join(_tables(root, ""))


def _tables(section: type[BaseModel], prefix: str) -> Iterator[str]:
    if prefix:
        yield from (f"## {prefix[:-1]}", "", " ".join((section.__doc__ or "").split()), "")
    inner: dict[str, type[BaseModel]] = {}
    rows = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner[name] = field.annotation
        else:
            rows.append(_row(f"{prefix}{field.alias or name}", field, _description(section, name)))
    if rows:
        yield from ("| key | takes | default | |", "|---|---|---|---|", *rows, "")
    for name, part in inner.items():
        yield from _tables(part, f"{prefix}{name}.")


def _description(section: type[BaseModel], name: str) -> str:
    """A field's own, or that of the section whose default it only changes."""
    parents = (parent for parent in section.__mro__ if issubclass(parent, BaseModel))
    described = (parent.model_fields[name].description for parent in parents if name in parent.model_fields)
    found = next(filter(None, described), None)
    assert found, f"{section.__name__}.{name} has no description: write a string under it"
    return " ".join(found.split())


def _row(key: str, field: FieldInfo, description: str) -> str:
    bounds = [bound for bound in map(_bound, field.metadata) if bound]
    takes = " ".join([_takes(field.annotation), *bounds])
    value = _plain(field.get_default(call_default_factory=True))
    default = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    cells = (f"`{key}`", takes, f"`{default}`", description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _takes(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([_takes(inner[0]), *filter(None, map(_bound, _flat(inner[1:])))])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_takes(one) for one in inner)
    if origin in (tuple, frozenset, list):
        return f"list of {_takes(inner[0])}"
    return "mapping" if origin is dict else WORDS[annotation]


def _flat(metadata: tuple[Any, ...]) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _bound(constraint: Any) -> str:
    return " ".join(
        f"{sign} {getattr(constraint, name):g}" for name, sign in SIGNS.items() if hasattr(constraint, name)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset | tuple):
        return sorted(value)
    return str(value) if isinstance(value, Path) else value
