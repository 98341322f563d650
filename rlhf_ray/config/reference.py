"""Every key of a tree of settings as Markdown: what docs/configuration.md is made of."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

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
        kind = section.model_fields.get("kind")
        which = f" with `kind: {get_args(kind.annotation)[0]}`" if kind else ""
        yield from (f"## {prefix[:-1]}{which}", "", " ".join((section.__doc__ or "").split()), "")
    inner: list[tuple[str, type[BaseModel]]] = []
    rows = []
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            inner.append((f"{prefix}{name}.", field.annotation))
        else:
            rows.append(_row(f"{prefix}{field.alias or name}", field, _description(section, name)))
            inner += [(f"{prefix}{name}.NAME.", part) for part in _sections_in(field.annotation)]
    if rows:
        yield from ("| key | takes | default | |", "|---|---|---|---|", *rows, "")
    for place, part in inner:
        yield from _tables(part, place)


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Those that a mapping or a list may hold."""
    for inner in get_args(annotation):
        if _is_section(inner):
            yield inner
        else:
            yield from _sections_in(inner)


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
    value = None if field.is_required() else _plain(field.get_default(call_default_factory=True))
    default = (
        ""
        if field.is_required()
        else yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    )
    cells = (f"`{key}`", takes, f"`{default}`" if default else "", description)
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
    if origin is dict:
        return "mapping"
    return "section" if _is_section(annotation) else WORDS[annotation]


def _flat(metadata: tuple[Any, ...]) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _bound(constraint: Any) -> str:
    return " ".join(
        f"{sign} {getattr(constraint, name):g}" for name, sign in SIGNS.items() if hasattr(constraint, name)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, frozenset | tuple):
        return list(value) if isinstance(value, tuple) else sorted(value)
    return str(value) if isinstance(value, Path) else value
