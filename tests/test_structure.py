"""The house keeps its shape: imports run down its floors and in no circle, functions fit a screen."""

import ast
import itertools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A module imports from lower floors, and from its own floor only within its folder.
FLOORS = [
    ["files"],
    ["clips", "cogvideox"],
    ["dataset"],
    ["run"],
    ["pages"],
    ["train_cogvideox_lora"],
    ["examples"],
    ["benchmarks"],
]
# tools beside the ladder, and all that they may import of ours
BESIDE = {"cli_demo": {"cogvideox", "files"}, "lora": {"cogvideox", "files"}}
NOT_KNOWN = {  # libraries that a room can do without
    "files": {"torch", "diffusers", "accelerate", "transformers", "peft"},
    "clips": {"diffusers", "accelerate", "transformers", "peft"},
    "cogvideox": {"accelerate"},
    "dataset": {"diffusers", "accelerate", "transformers", "peft"},
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (".", *sorted(itertools.chain(*FLOORS)))
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.name != "__init__.py"
}


def imports(module: str) -> set[str]:
    """What a module imports, anywhere in it; scripts of benchmarks/ and examples/ find each other by bare name."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys() or {node.module}
    beside = {name: f"{folder}.{name}" for folder in ("examples", "benchmarks") for name in found}
    return {beside[name] if beside[name] in MODULES else name for name in found}


def room(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def ours(module: str) -> set[str]:
    return imports(module) & MODULES.keys()


def test_every_module_has_a_floor():
    assert {room(module) for module in MODULES} == {*itertools.chain(*FLOORS), *BESIDE}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in BESIDE])
def test_imports_run_down(module):
    for other in ours(module):
        assert floor(other) < floor(module) or room(other) == room(module), other


@pytest.mark.parametrize("module", BESIDE)
def test_tools_beside_the_ladder_take_only_what_they_may(module):
    assert {room(other) for other in ours(module)} <= BESIDE[module]


def test_no_imports_run_in_a_circle():
    TopologicalSorter({module: ours(module) for module in MODULES}).prepare()  # raises CycleError


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in NOT_KNOWN])
def test_rooms_know_no_libraries_that_they_can_do_without(module):
    assert not {name.split(".")[0] for name in imports(module)} & NOT_KNOWN[room(module)]


@pytest.mark.parametrize("module", MODULES)
def test_functions_fit_a_screen(module):
    sizes = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: size for name, size in sizes.items() if size > (70 if name == "main" else 60)} == {}
