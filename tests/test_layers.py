"""Who may import whom. Imports inside functions count: a layer is not escaped by being lazy."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "craftune").rglob("*.py"))
}

# library -> the only modules that import it (a name stands for itself and all below it)
ONLY_IN = {
    "diffusers": ["craftune.models", "craftune.shapes.train*", "craftune.shapes.measure"],
    "transformers": [
        "craftune.models",
        "craftune.rewards",
        "craftune.refiners",
        "craftune.shapes",
        "craftune.optimizers",
    ],
    "bitsandbytes": ["craftune.optimizers"],
    "openai": ["craftune.refiners"],
    "accelerate": [],
    "torch.distributed": ["craftune.processes"],
    "peft": ["craftune.adapters", "craftune.models", "craftune.training*"],
    # nothing in the pipeline knows the world: it enters by the three tables
    "craftune.shapes": [
        "craftune.shapes",
        "craftune.rewards=",
        "craftune.refiners=",
        "craftune.pictures",
        "craftune.studies",
    ],
    "craftune.studies": ["craftune.studies"],
    "rdkit": ["craftune.studies.smiles"],
}

# module -> what it never imports
BELOW = ["craftune.stages", "craftune.models", "craftune.cli"]
NEVER = {
    "craftune.methods": [*BELOW, "craftune.runs", "pathlib", "os", "accelerate"],
    "craftune.rewards": ["craftune.methods", "craftune.stages", "craftune.cli"],
    "craftune.shapes": ["craftune.methods", "craftune.stages", "craftune.cli"],
    "craftune.selection": BELOW,
    "craftune.diffusion": BELOW,
    "craftune.sampling": BELOW,
    "craftune.types": BELOW,
    "craftune.statistics": BELOW,
    "craftune.noise": BELOW,
    "craftune.noise.corrector": ["pathlib"],
    "craftune.noise.inversion": ["pathlib"],
    "craftune.noise.flops": ["pathlib"],
    "craftune.rows": BELOW,
}


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Every name imported anywhere in the source, absolute and with all its parents."""
    package = module if is_package else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def covers(pattern: str, name: str) -> bool:
    """`a.b` is itself and all below; `a.b=` itself alone; `a.b*` every name that begins so."""
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    return name == pattern.rstrip("=") or (
        not pattern.endswith("=") and name.startswith(f"{pattern}.")
    )


def broken_rules(module: str, names: set[str]) -> list[str]:
    found = [
        f"{module} imports {library}; only {', '.join(allowed)} may"
        for library, allowed in ONLY_IN.items()
        if any(covers(library, name) for name in names)
        and not any(covers(pattern, module) for pattern in allowed)
    ]
    return found + [
        f"{module} imports {name}; {layer} never does"
        for layer, forbidden in NEVER.items()
        if covers(layer, module)
        for name in sorted(names)
        if any(covers(pattern, name) for pattern in forbidden)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    path = MODULES[module]
    names = imports(path.read_text(), module, path.name == "__init__.py")
    assert broken_rules(module, names) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("craftune.stages.generate", "def f():\n    from diffusers import UNet2DConditionModel"),
        ("craftune.methods.craft", "import transformers.models"),
        ("craftune.sampling", "from .models import FAMILIES"),
        ("craftune.methods.dpo", "from .. import stages"),
        ("craftune.methods.dpo", "from pathlib import Path"),
        ("craftune.rewards.clip", "from craftune.methods.craft import Craft"),
        ("craftune.rewards.clip", "from craftune import shapes"),
        ("craftune.shapes.world", "import craftune.stages.generate"),
        ("craftune.types", "import peft"),
        ("craftune.stages.score", "import torch.distributed as dist"),
    ],
)
def test_a_planted_import_is_found(module: str, source: str) -> None:
    assert broken_rules(module, imports(source, module, is_package=False))
