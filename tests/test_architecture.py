"""Imports point one way: a part of the package may use what lies below it or beside it, and nothing above.

diffusion <- models <- tasks, editing <- callbacks, evaluation <- apps, commands;   data and metrics beside models
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

import icd_lightning

ARCHITECTURE = re.compile(r"^diffusers\..*(UNet\w*Model|Transformer2DModel|BasicTransformerBlock|ResnetBlock2D)$")
PACKAGE = Path(icd_lightning.__file__).parent
LAYERS = (
    {"diffusion", "files", "processes", "progress", "registry", "texts", "trust"},
    {"data", "metrics", "models"},
    {"editing", "tasks"},
    {"callbacks", "evaluation"},
    {"apps", "tiny"},
    {"commands"},
)

MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(path: Path) -> set[str]:
    """All that a file imports, anywhere in it, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import: write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(name: str) -> str | None:
    """The part of the package that a module belongs to, e.g. "models"; None for the package itself and for others."""
    words = name.split(".")
    return words[1] if words[0] == "icd_lightning" and len(words) > 1 and not words[1].startswith("_") else None


def parts_used() -> dict[str, set[str]]:
    used: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        part = name.split("/")[0]
        used.setdefault(part, set()).update(filter(None, map(part_of, imports(path))))
    return {part: others - {part} for part, others in used.items() if not part.endswith(".py")}


def test_every_part_has_its_layer():
    known = set().union(*LAYERS)
    assert {name.split("/")[0] for name in MODULES if "/" in name} <= known


@pytest.mark.parametrize("part", sorted(parts_used()))
def test_imports_point_one_way(part):
    level = next(index for index, layer in enumerate(LAYERS) if part in layer)
    allowed = set().union(*LAYERS[: level + 1])
    assert parts_used()[part] <= allowed


def test_parts_of_one_layer_do_not_use_each_other_in_a_circle():
    uses = parts_used()
    while leaves := {part for part, others in uses.items() if not others & uses.keys()}:
        uses = {part: others for part, others in uses.items() if part not in leaves}
    assert not uses


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("diffusion/")])
def test_the_mathematics_needs_torch_and_the_standard_library_only(module):
    allowed = {"torch", *sys.stdlib_module_names}
    assert all(name.split(".")[0] in allowed or part_of(name) == "diffusion" for name in imports(MODULES[module]))


def users_of(library: str) -> set[str]:
    return {name for name, path in MODULES.items() if library in {module.split(".")[0] for module in imports(path)}}


def test_lightning_stays_with_what_it_runs():
    parts = ("tasks/", "callbacks/", "commands/", "tiny/", "data/datamodule.py")
    assert not {name for name in users_of("lightning") if not name.startswith(parts)}


def test_the_tiny_world_is_a_guest():
    users = {name for name, path in MODULES.items() if "tiny" in map(part_of, imports(path))}
    # `icd data shapes` draws its pictures, and the editor shows some where that family is edited with
    own = ("tiny/", "commands/tiny.py", "commands/data.py", "apps/editor/engine.py")
    assert not {name for name in users if not name.startswith(own)}


def test_adapters_are_handled_in_one_place():
    assert users_of("peft") == {"models/students/lora.py"}


def test_architectures_are_known_in_one_place():
    """Who trains, samples or edits does not ask what kind of network it is."""
    users = {name for name, path in MODULES.items() if any(ARCHITECTURE.search(found) for found in imports(path))}
    signature = "editing/loading.py"  # of diffusers' `from_pipe`, which hands over parts of the types it names
    backbones = {f"models/backbones/{name}.py" for name in ("flux", "flux2", "sd3", "unet", "z_image")}
    assert {name for name in users if not name.startswith("tiny/")} == {*backbones, signature}


def modules_at_the_top(path: Path) -> set[str]:
    """The package's modules that a file imports as it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("icd_lightning"):
            for full in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                stem = full.removeprefix("icd_lightning").lstrip(".").replace(".", "/")
                found |= {name for name in (f"{stem}.py", f"{stem}/__init__.py".lstrip("/")) if name in MODULES}
    return found - {"__init__.py"}  # the package's own, which comes before all


def test_no_module_imports_itself_by_way_of_others():
    uses = {name: modules_at_the_top(path) for name, path in MODULES.items()}
    while leaves := {name for name, others in uses.items() if not others & uses.keys()}:
        uses = {name: others for name, others in uses.items() if name not in leaves}
    assert not uses


def test_an_edit_does_not_wait_for_what_only_evaluations_and_trainings_import():
    reached, new = set(), {"commands/session.py"}
    while new:
        reached |= new
        new = set().union(*(modules_at_the_top(MODULES[name]) for name in new)) - reached
    tops = [node for name in reached for node in ast.parse(MODULES[name].read_text()).body]
    names = {alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tops if isinstance(node, ast.ImportFrom)}
    slow = {"gradio", "lightning", "matplotlib", "pandas", "scipy", "torchmetrics", "torchvision"}
    assert not slow & {name.split(".")[0] for name in names}


def test_every_package_that_is_imported_is_declared_with_both_bounds():
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    declared = dict(re.findall(r'"([a-z0-9-]+)(?:\[\w+\])?([><=][^"]*)"', text))
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    used = {name.split(".")[0] for path in MODULES.values() for name in imports(path)}
    others = {name for name in used - {"icd_lightning"} if name not in sys.stdlib_module_names}
    assert {names.get(name, name.replace("_", "-")) for name in others} <= declared.keys()
    assert [name for name, bounds in declared.items() if not re.fullmatch(r">=[\d.]+(,<[\d.]+)?", bounds)] == []
    assert [name for name, bounds in declared.items() if "<" not in bounds] == ["setuptools"]
