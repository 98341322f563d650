"""The house stands: imports go down the floors only, and some things are done in one place or nowhere."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlhf_ray"

FLOORS = {
    "__init__": -1,
    "types": 0,
    "errors": 0,
    "config": 0,
    "plugins": 1,
    "algo": 1,
    "sqlite": 1,
    "models": 2,
    "feedback": 2,
    "data": 3,
    "recipes": 3,
    "client": 3,
    "rewards": 3,
    "transport": 3,
    "roles": 4,
    "training": 5,
    "serving": 6,
    "jobs": 6,
    "plan": 6,
    "clusters": 6,
    "doctor": 6,
    "cli": 7,
    "__main__": 8,
}
"""A room is a folder of the package or a file beside the folders."""

WEB = {"fastapi", "starlette", "uvicorn", "flask", "aiohttp"}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path for folder in ("rlhf_ray", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py") if path.is_file()
)


def name_of(path: Path) -> str:
    """`rlhf_ray.algo.kl` for rlhf_ray/algo/kl.py, `rlhf_ray.algo` for its `__init__.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree: ast.Module, module: str = "", is_package: bool = False) -> Iterator[str]:
    """Dotted names of everything imported, wherever in the file, lazily or for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                stem = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
                base = ".".join([*stem, base]).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def imports_of(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8")), name_of(path), path.name == "__init__.py"))


def imports_at_run_time(path: Path) -> set[str]:
    """Lazy ones too, but not those under `if TYPE_CHECKING:`, which only a type checker follows."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    return set(imports(tree, name_of(path), path.name == "__init__.py"))


def own(names: set[str]) -> set[str]:
    """Of these names, the modules of ours that they lead to."""
    ours = {name_of(path) for path in MODULES}
    found = set()
    for name in names:
        while name and name not in ours:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


def foreign(path: Path) -> set[str]:
    """Top-level names of the third-party packages that a file imports."""
    tops = {name.split(".")[0] for name in imports_of(path)}
    return tops - set(sys.stdlib_module_names) - {"rlhf_ray", "tests", "benchmarks", "install"}


def upward(path: Path) -> list[str]:
    """Imports of a file that do not lead to a lower floor or its own room."""
    here = room_of(name_of(path))
    return [
        f"{name_of(path)} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[room_of(target)]})"
        for target in sorted(own(imports_of(path)))
        if room_of(target) != here
        and FLOORS[room_of(target)] >= FLOORS[here]
        and not both_files_of_one_floor(here, target)
    ]


def both_files_of_one_floor(here: str, target: str) -> bool:
    """The files beside the folders are one room a floor, and serve the config too."""
    there = room_of(target)
    files = here == "config" or (PACKAGE / f"{here}.py").is_file()
    return files and (PACKAGE / f"{there}.py").is_file() and FLOORS[here] == FLOORS[there]


def in_rooms(*rooms: str) -> list[Path]:
    return [path for path in MODULES if room_of(name_of(path)) in rooms]


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_every_room_has_a_floor() -> None:
    assert {room_of(name_of(path)) for path in MODULES} <= set(FLOORS), "give the new room a floor in FLOORS"


def test_imports_lead_down_the_floors_only() -> None:
    assert not [line for path in MODULES for line in upward(path)]


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name_of(path): own(imports_at_run_time(path)) - {name_of(path)} for path in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_the_words_need_nothing_but_pydantic_and_yaml() -> None:
    assert set().union(*map(foreign, in_rooms("__init__", "types", "errors", "config"))) <= {
        "pydantic",
        "yaml",
    }


def test_arithmetic_needs_nothing_but_torch() -> None:
    assert set().union(*map(foreign, in_rooms("algo"))) <= {"torch"}


def test_ray_and_vllm_begin_at_the_roles_and_the_web_at_the_service() -> None:
    below_roles = [path for path in MODULES if FLOORS[room_of(name_of(path))] < FLOORS["roles"]]
    below_service = [path for path in MODULES if FLOORS[room_of(name_of(path))] < FLOORS["serving"]]
    assert not [name_of(path) for path in below_roles if foreign(path) & {"ray", "vllm"}]
    assert not [name_of(path) for path in below_service if foreign(path) & WEB]


def test_ray_is_applied_to_classes_in_placement_only() -> None:
    users = {
        name_of(path)
        for path in MODULES
        if "ray.remote" in imports_of(path)
        or any(
            isinstance(node, ast.Attribute) and ast.unparse(node) == "ray.remote"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    }
    assert users <= {"rlhf_ray.roles.placement"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not foreign_or_standard(tree) & PICKLES
    for call in calls(tree):
        name = ast.unparse(call.func)
        assert name not in ("torch.load", "torch.save"), f"line {call.lineno}: use safetensors"
        assert not any(word.arg == "allow_pickle" for word in call.keywords), f"line {call.lineno}: no pickled arrays"
    assert not {"torch.load", "torch.save"} & set(imports(tree))


def foreign_or_standard(tree: ast.Module) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)}


def test_every_room_is_named_for_what_it_holds() -> None:
    vague = {"util", "utils", "helpers", "common", "misc"}
    assert not [path for path in SOURCES if vague & {*path.relative_to(ROOT).parts[:-1], path.stem}]


def test_lazy_imports_are_seen() -> None:
    lazy = ast.parse("def f():\n    import rlhf_ray.cli\n    importlib.import_module('rlhf_ray.jobs')")
    assert set(imports(lazy)) == {"rlhf_ray.cli", "rlhf_ray.jobs"}


def test_relative_imports_are_seen() -> None:
    relative = ast.parse("from ..errors import InputError\nfrom . import kl")
    expected = {"rlhf_ray.errors.InputError", "rlhf_ray.algo.kl"}
    assert set(imports(relative, "rlhf_ray.algo.losses")) == expected
    assert set(imports(relative, "rlhf_ray.algo", is_package=True)) == expected
