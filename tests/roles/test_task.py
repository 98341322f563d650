"""What a function prints comes out line by line, then what it returns, or its own error."""

import pytest

from rlhf_ray.roles.calls import Done, Line
from rlhf_ray.roles.task import with_lines


def speak(name: str, *, end: str) -> int:
    print("hello", name)
    print("one ", end="")
    print(f"line\n{end}", end="")
    return 7


def fail() -> None:
    print("before")
    raise ValueError("no such lamp")


def test_lines_come_whole_and_the_return_value_last() -> None:
    items = list(with_lines(speak, ("Ann",), {"end": "unfinished"}))
    assert items == [Line("hello Ann"), Line("one line"), Line("unfinished"), Done(7)]


def test_an_error_comes_after_what_was_printed_before_it() -> None:
    items = with_lines(fail, (), {})
    assert next(items) == Line("before")
    with pytest.raises(ValueError, match="no such lamp"):
        next(items)
