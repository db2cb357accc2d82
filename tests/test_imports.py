"""The rooms of the house: imports point down, from a room to one of a lower level, and never in a circle."""

import ast
from pathlib import Path

import alter

LEVELS = {
    "common": 1,  # errors, files, processes, the keys of a configuration
    "method": 2,  # the paper's equations: torch and NumPy alone
    "backbones": 3,  # what is known of diffusers' models
    "data": 4,  # data sets of every kind
    "experts": 4,  # the artefact, and what it does to a pipeline
    "evaluation": 5,  # metrics of images
    "evaluation.report": 6,  # pictures of experts and runs
    "training.setup": 6,  # what a configuration means
    "training": 7,  # Algorithm 1 and the run around it
    "commands": 8,  # the command line
    "__main__": 9,
}
ROOT = Path(alter.__file__).parent


def _modules():
    """Dotted name below `alter` and file of every module but alter/__init__.py."""
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, file


def _room(module):
    """The innermost room that holds a module."""
    return max((room for room in LEVELS if module == room or module.startswith(f"{room}.")), key=len)


def _imported(name, file, modules):
    """Modules of alter that a file imports, wherever in it."""
    package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.partition(".")[0] == "alter" for alias in node.names), f"{name} imports alter"
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield inner if inner in modules else ".".join(base)
        elif isinstance(node, ast.ImportFrom):
            assert node.module.partition(".")[0] != "alter", f"{name} names alter: import relatively"


def test_imports_point_down():
    modules = dict(_modules())
    graph = {name: set(_imported(name, file, modules)) for name, file in modules.items()}
    for name, others in graph.items():
        for other in others:
            assert other, f"{name} imports alter/__init__.py"
            here, there = _room(name), _room(other)
            assert LEVELS[there] < LEVELS[here] or there == here, f"{name} ({here}) imports {other} ({there})"


def test_no_circle():
    modules = dict(_modules())
    graph = {name: set(_imported(name, file, modules)) - {name} for name, file in modules.items()}
    while leaves := {name for name, others in graph.items() if not others}:
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}
    assert not graph


def test_the_method_needs_torch_and_numpy_alone():
    allowed = {"torch", "numpy", "dataclasses", "typing", "collections", "itertools", "math"}
    for name, file in _modules():
        if _room(name) == "method":
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, name
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    assert node.module.partition(".")[0] in allowed, name


def test_the_house_is_small():
    entries = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert len(entries) <= 10, sorted(entries)
