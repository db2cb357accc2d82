"""Imports point down only: a module imports modules of lower levels."""

import ast
from pathlib import Path

import alter

LEVELS = [
    {"errors", "files", "history", "interruption", "memory", "processes"},
    {"schema", "relaxation", "losses", "diffusion", "sites", "images", "shapes", "text", "lora", "dit_weights"},
    {"config", "hypernetwork", "simulator", "cost", "trimming", "sharing"},
    {"compiling", "latency"},
    {"serving"},
    {"sources", "budget", "experts", "sampling"},
    {"data"},
    {"plan"},
    {"build", "checkpoint", "pipelines"},
    {"probe"},
    {"sensitivity"},
    {"report", "greedy"},
    {"card", "validation", "demo", "dry_run", "encode", "page"},
    {"journal", "trainer_state", "metrics"},
    {"trainer"},
    {"trial", "ablation"},
    {"run"},
]


def test_imports_point_down():
    level = {name: depth for depth, names in enumerate(LEVELS) for name in names}
    folder = Path(alter.__file__).parent
    files = [(file.parent.name if file.parent != folder else file.stem, file) for file in folder.rglob("*.py")
             if file != folder / "__init__.py"]
    assert {name for name, _ in files} == level.keys()
    for name, file in files:
        up = 1 if file.parent == folder else 2  # within a package, files import each other as they like
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == up:
                imported = [node.module] if node.module else [alias.name for alias in node.names]
                for other in imported:
                    assert level[other.partition(".")[0]] < level[name], f"{name} imports {other}"
