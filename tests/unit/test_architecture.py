"""Who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from itertools import dropwhile
from pathlib import Path

import raytune_ft

PACKAGE = Path(raytune_ft.__file__).parent
# Later layers may import earlier ones.
LAYERS = [
    {"__init__", "errors", "layout", "records"},
    {"background", "child", "files", "format", "locks"},
    {"config"},
    {"bucket", "rundir", "data"},
    {"tensors"},
    {"model"},
    {"rewards"},
    {"strategy"},
    {"checkpoints"},
    {"train"},
    {"packed", "estimate"},
    {"evaluate"},
    {"search"},
    {"ray_backend", "merge", "report"},  # promote's model card has the tables of report
    {"promote"},
    {"preflight", "fetch"},
    {"app"},
    {"plan", "submit", "data_view"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
IMPORTS = ast.Import | ast.ImportFrom
LAYER = {name: number for number, layer in enumerate(LAYERS) for name in layer}


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Names that a module imports anywhere, also inside functions.

    Imports inside functions of config/ do not count: an entry of a dict such as `FORMATS` loads its
    implementation from a higher layer when it is used, and never when config is imported.
    """
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and _part(path) == "config"
        for inner in ast.walk(node)
    }
    for node in set(ast.walk(tree)) - lazy:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_downward() -> None:
    for path in _modules():
        for name in _imports(path):
            if name.startswith("raytune_ft.") and (part := name.split(".")[1]) in LAYER:
                assert LAYER[part] <= LAYER[_part(path)], f"{path.name} imports {name}"


def test_only_workers_load_torch() -> None:
    """Each trial of a sweep has a process that waits for it, and each group has a controller."""
    names = ("trial", "slot_queue", "run_handle", "worker_group", "worker", "packed_worker", "call")
    lines = (
        "import sys",
        "for name in 'torch', 'transformers', 'peft', 'datasets': sys.modules[name] = None",
        *(f"import raytune_ft.ray_backend.{name}" for name in names),
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_ray_is_imported_in_one_package() -> None:
    users = {
        _part(path)
        for path in _modules()
        if any(name == "ray" or name.startswith("ray.") for name in _imports(path))
    }
    assert users == {"ray_backend"}


def test_unit_tests_mirror_the_package() -> None:
    unit = Path(__file__).parent
    folders = [file.parent.relative_to(unit) for file in unit.rglob("test_*.py")]
    assert [str(each) for each in folders if not (PACKAGE / each).is_dir()] == []


def test_imports_stand_first() -> None:
    """`if TYPE_CHECKING` is the last of the imports; ruff accepts it in the middle too."""
    for path in _modules():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        late = dropwhile(lambda node: isinstance(node, ast.Expr | IMPORTS), body)
        assert not any(isinstance(node, IMPORTS) for node in late), path
