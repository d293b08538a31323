"""The house keeps its shape: imports run one way, functions fit a screen."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each may import those before it.
ORDER = [
    "dataset",
    "quantized",
    "swapping",
    "cogvideox",
    "preview",
    "trainable",
    "checkpoints",
    "report",
    "hub",
    "memory",
    "compute",
    "optimizers",
    "processes",
    "validation",
    "train_cogvideox_lora",
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way(module):
    later = ORDER[ORDER.index(module) :]
    assert not set(imports(ROOT / f"{module}.py")) & set(later)


def test_the_dataset_knows_no_model_library_and_the_demo_nothing_of_ours():
    assert not set(imports(ROOT / "dataset.py")) & {"diffusers", "accelerate", "transformers", "peft"}
    assert not set(imports(ROOT / "cli_demo.py")) & set(ORDER)
    assert "accelerate" not in set(imports(ROOT / "cogvideox.py"))


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_functions_fit_a_screen(path):
    sizes = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name != "parse_args"  # a line per option
    }
    assert {name: size for name, size in sizes.items() if size > (70 if name == "main" else 60)} == {}


def test_the_training_script_stays_readable():
    assert len((ROOT / "train_cogvideox_lora.py").read_text().splitlines()) <= 450
