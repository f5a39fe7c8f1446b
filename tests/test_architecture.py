"""Architecture: length of the recipes, and the direction of imports between packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = ("train_vae.py", "train_ldm.py")
# What each subpackage, or module at the top level, may import of the package beside itself.
SMALL = {"errors", "files", "output_lock", "environment", "precision", "figures"}
ROOMS = {
    "models": SMALL,
    "pipeline": {"models"},
    "stable_diffusion": SMALL | {"models", "pipeline"},
    "loading": SMALL | {"models", "pipeline", "stable_diffusion"},
    "generation": SMALL | {"pipeline"},
    "data": SMALL,
    "counterfactual": SMALL | {"data", "generation", "pipeline"},
    "preprocessing": SMALL | {"data"},
    "config": SMALL,
    "training": SMALL | {"config", "data", "generation", "models", "pipeline"},
    "evaluation": SMALL | {"data", "generation", "models", "pipeline"},
    "hub": SMALL | {"config", "data", "evaluation", "generation", "loading", "models", "pipeline"},
    "web": SMALL | {"counterfactual", "data", "evaluation", "generation", "hub", "loading", "pipeline"},
}


def own_imports(path: Path) -> list[tuple[str, list[str]]]:
    """[(module of ours, names imported from it)], those within functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "adni_ldm":
            found.append((node.module, [alias.name for alias in node.names]))
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names if alias.name.split(".")[0] == "adni_ldm"]
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_read_on_two_screens(recipe):
    source = (ROOT / recipe).read_text()
    lines = source.count("\n")
    main = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "main")
    loop = next(
        node
        for node in ast.walk(main)
        if isinstance(node, ast.For) and "run.batches" in ast.unparse(node.iter)
    )
    assert lines <= 200 and main.end_lineno - main.lineno + 1 <= 110 and loop.lineno <= lines / 2
    imports = own_imports(ROOT / recipe)
    assert len({module for module, _ in imports}) <= 14
    assert len({name for _, names in imports for name in names}) <= 30
    assert not {module for module, _ in imports} & {Path(other).stem for other in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_and_hub_are_loaded_only_where_they_are_used(recipe):
    listed = "print(*[name for name in sys.modules if name.startswith('adni_ldm.')])"
    code = f"import sys, {Path(recipe).stem}; {listed}"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert not [
        name for name in loaded.split() if name.split(".")[1] in ("evaluation", "hub", "web", "preprocessing")
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room):
    place = ROOT / "adni_ldm" / room
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        for module, names in own_imports(path):
            used = {module.split(".")[1]} if "." in module else set(names)
            assert used <= ROOMS[room] | {room}, f"{path.relative_to(ROOT)} imports {module}"


def test_only_recipes_and_training_import_accelerate():
    allowed = {"training"}
    for path in sorted((ROOT / "adni_ldm").rglob("*.py")):
        tree = ast.parse(path.read_text())
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        names |= {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        if "accelerate" in {name.split(".")[0] for name in names}:
            assert path.parent.name in allowed, path
