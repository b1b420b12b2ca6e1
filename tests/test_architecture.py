"""Who may import whom, as DESIGN.md has it: read from the source, with what functions and TYPE_CHECKING import."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lit_tune

PACKAGE = Path(lit_tune.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Anyone may import them; not all of them need exist yet.
LEAVES = {"errors", "cache", "continuation", "generate", "flops", "memory", "signals", "techniques"}

# A layer, by the first part of its modules' names, and what it may import besides itself.
LAYERS = {
    **{leaf: {"errors"} for leaf in LEAVES},
    "data": LEAVES,
    "modules": LEAVES,
    "callbacks": LEAVES | {"checkpoint"},
}


def module_name(path: Path, package: Path) -> str:
    """Return a module's full name: `lit_tune.data.packing`; a package's is that of its folder."""
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, package: Path) -> Iterator[str]:
    """Yield the full names that a module imports, anywhere in it: `a.b` for `import a.b` and `from a import b`."""
    parent = [package.name, *path.parent.relative_to(package).parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parent[: len(parent) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def own_imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Return the modules of the package that a module imports, without the package's name: `data.packing`, `errors`."""
    known = {module_name(other, package) for other in package.rglob("*.py")}
    found = set()
    for name in imported_names(path, package):
        # What is imported may be a module or something in it.
        module = name if name in known else name.rpartition(".")[0]
        if module in known:
            found.add(module.removeprefix(package.name).removeprefix("."))
    return found


def layer(module: str) -> str:
    return module.partition(".")[0]


def own_name(path: Path) -> str:
    return module_name(path, PACKAGE).removeprefix("lit_tune").removeprefix(".")


@pytest.mark.parametrize("path", MODULES, ids=own_name)
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    own = own_name(path)
    imports = own_imports(path)
    if layer(own) in LAYERS:
        assert {layer(module) for module in imports} <= LAYERS[layer(own)] | {layer(own)}
    if own != "__main__":
        assert "cli" not in imports


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {own_name(path): own_imports(path) for path in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_the_layers_exist() -> None:
    layers = {layer(own_name(path)) for path in MODULES}
    assert {"errors", "generate", "data", "modules", "callbacks", "checkpoint", "cli"} <= layers


def test_files_are_named_for_what_they_hold() -> None:
    says_nothing = re.compile(r"(^|_)(utils?|helpers?|common|misc|managers?)(_|$)")
    assert [path.name for path in MODULES if says_nothing.search(path.stem)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import fake.data.packing",
        "import os, fake.data.packing as p",
        "from fake.data import packing",
        "from fake.data.packing import Cut",
        "from ..data import packing",
        "from ..data.packing import Cut as C",
        "def f():\n    from fake.data.packing import Cut",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fake.data.packing import Cut",
        "try:\n    import fake.data.packing\nexcept ImportError:\n    pass",
    ],
)
def test_every_way_to_import_is_seen(tmp_path: Path, source: str) -> None:
    package = tmp_path / "fake"
    for folder in ("data", "modules"):
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").write_text("")
    (package / "data" / "packing.py").write_text("")
    (package / "modules" / "llama.py").write_text(source)
    assert own_imports(package / "modules" / "llama.py", package) == {"data.packing"}
