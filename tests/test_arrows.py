"""The plan of the house: who may import whom, where components live, what runs without Flower.

The checks are functions of source text and paths, so that the last section can try them on planted violations.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tasks.spec import PACKAGES

ROOT = Path(__file__).parents[1]
HOUSE = ("hawthorn", "server", "client", "strategies", "certify", "tasks")
# What a package, or a part of it, may import of ours beyond itself; the longest prefix of a module's name decides.
ARROWS: dict[str, tuple[str, ...]] = {
    "hawthorn": HOUSE,
    "server": (
        "client.attack",
        "client.attacks",
        "client.collusion",
        "client.trainer",
        "client.training",
        "strategies",
        "certify",
        "tasks",
    ),
    "client": ("tasks",),
    # What a client attacks its own inputs with, and what an attacker's bounds are, is the certifiers' own code.
    "client.training": ("certify.pgd", "tasks"),
    "client.attacks": ("certify.network", "certify.pgd", "certify.zonotope", "tasks"),
    "client.flip": ("certify", "tasks"),
    "strategies": ("tasks",),
    "certify": ("tasks",),
    "tasks": (),
}
# The host's side of the house; everything else works where Flower is not installed.
WITH_FLOWER = (
    "hawthorn",
    "server.app",
    "client.app",
    "strategies.robust",
    "strategies.checks",
    "strategies.population",
    "strategies.sampling",
)
WITHOUT_FLOWER = ("tasks", "certify", "strategies")
NAMELESS = {"utils", "util", "helper", "helpers", "common", "misc"}


def within(name: str, packages: Iterable[str]) -> bool:
    """True where the dotted `name` is one of `packages` or lies inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> list[Path]:
    return sorted(path for package in HOUSE for path in (ROOT / package).rglob("*.py"))


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Yield the dotted name of everything `source` imports; ``from a import b`` is a.b, whatever b is.

    Includes relative imports, imports inside functions and type-checking blocks, and import_module("literal").
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = len(parents) - node.level + (1 if is_package else 0)
                base = ".".join([*parents[:kept], *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def wrong_arrows(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return what `source` imports against the arrows."""
    rule = max((prefix for prefix in ARROWS if within(module, [prefix])), key=len)
    allowed = (rule.split(".")[0], *ARROWS[rule])
    wrong = []
    for target in imports(source, module, is_package):
        if within(target, HOUSE) and not within(target, allowed):
            wrong.append(f"{module} imports {target}; {rule} may import of ours: {', '.join(allowed)}")
    return wrong


def nameless(path: Path) -> str | None:
    """Return a complaint where a file or a folder of `path` is named after nothing, such as utils.py or common/."""
    parts = [*path.parts[:-1], path.stem]
    found = [part for part in parts if part.lower().strip("_") in NAMELESS]
    return f"{path}: {found[0]} says nothing; give it a room with a definition" if found else None


def holds_its_name(source: str, name: str) -> bool:
    """True where `source` defines a public function `name` at top level."""
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.parse(source).body)


def components() -> list[Path]:
    folders = [ROOT.joinpath(*package.split(".")) for package in PACKAGES.values()]
    return sorted(path for folder in folders for path in folder.glob("*.py") if not path.name.startswith("_"))


# ---- the house as it stands


def test_there_is_a_house_to_look_at() -> None:
    assert {module_name(path).split(".")[0] for path in modules()} == set(HOUSE)
    assert set(PACKAGES.values()) <= {module_name(path) for path in modules()}


def test_arrows_point_one_way() -> None:
    wrong = []
    for path in modules():
        wrong += wrong_arrows(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
    assert not wrong, "\n".join(wrong)


def test_every_file_and_folder_has_a_name_that_says_something() -> None:
    folders = (*HOUSE, "tests", "benchmarks", "docker", "scripts")
    complaints = [nameless(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*.py")]
    assert not any(complaints), "\n".join(filter(None, complaints))


def test_every_component_file_holds_a_function_of_its_name() -> None:
    wrong = [module_name(path) for path in components() if not holds_its_name(path.read_text("utf-8"), path.stem)]
    assert not wrong, f"these component files define no function of their own name: {', '.join(wrong)}"


BLOCKED = """
import importlib, json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "flwr" or name.startswith("flwr."):
            raise ModuleNotFoundError("Flower is blocked in this test", name="flwr")

sys.meta_path.insert(0, Block())
failed = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing == "flwr" or missing in json.loads(sys.argv[2]):  # another missing package is an optional install
            failed[name] = repr(error)
    except Exception as error:
        failed[name] = repr(error)
print(json.dumps(failed))
"""


def import_without_flower(names: list[str], root: Path = ROOT) -> dict[str, str]:
    """Import modules in a fresh interpreter in which `flwr` cannot be found; return the failures."""
    command = [sys.executable, "-c", BLOCKED, json.dumps(names), json.dumps(HOUSE)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_all_but_the_hosts_side_works_without_flower() -> None:
    names = [module_name(path) for path in modules() if path.stem != "__main__"]  # importing a __main__ would run it
    chosen = [name for name in names if within(name, WITHOUT_FLOWER) and not within(name, WITH_FLOWER)]
    assert {name.split(".")[0] for name in chosen} == set(WITHOUT_FLOWER)
    assert import_without_flower(chosen) == {}


# ---- the checks themselves, on planted violations


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tasks.spec", "import hawthorn"),
        ("tasks.spec", "from strategies.rules.krum import krum"),
        ("tasks.spec", "def f():\n    import certify.bounds as b\n    return b"),
        ("tasks.spec", "from importlib import import_module\nimport_module('client.attacks')"),
        ("tasks.spec", "import importlib\nimportlib.import_module('server.app')"),
        ("certify.crfl", "from strategies import robust"),
        ("strategies.rules.krum", "import os, certify.bounds"),
        ("strategies.population", "if True:\n    from client.attacks import patch"),
        ("client.training.sgd", "from certify.bounds import two_stage"),
        ("client.app", "import server.app"),
        ("client.flip.invert", "from strategies.rules import krum"),
        ("client.flip.invert", "from server import evaluate"),
        ("server.evaluate", "from client.flip.invert import invert"),
        ("server.evaluate", "from client import app"),
        ("server.evaluate", "from client import *"),
        ("server.evaluate", "import client"),
        ("server.evaluate", "import hawthorn.cli"),
        ("client.attacks.patch", "from ...server import app"),
    ],
)
def test_a_planted_import_is_caught(module: str, source: str) -> None:
    assert len(wrong_arrows(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hawthorn.cli", "import server, client.app, flwr\nfrom strategies import robust"),
        ("server.evaluate", "from client.attacks import patch\nfrom client import attacks\nimport flwr, server.app"),
        ("client.flip.distances", "from certify.bounds import two_stage\nfrom client.training import sgd"),
        ("client.app", "import flwr\nfrom tasks import errors"),
        ("strategies.robust", "from flwr.serverapp.strategy import FedAvg\nfrom .rules import krum"),
        ("certify.crfl", "import numpy, clients, tasksmith\nfrom tasks.errors import DataError\nimport certify"),
        ("tasks.spec", "PLACE = 'client.attacks'\nprint('server')"),
    ],
)
def test_an_allowed_import_is_left_alone(module: str, source: str) -> None:
    assert wrong_arrows(source, module) == []


def test_relative_imports_are_resolved_from_modules_and_packages() -> None:
    assert list(imports("from . import a\nfrom ..b import c", "x.y.z")) == ["x.y.a", "x.b.c"]
    assert list(imports("from . import a\nfrom ..b import c", "x.y.z", is_package=True)) == ["x.y.z.a", "x.y.b.c"]


@pytest.mark.parametrize("path", ["tasks/utils.py", "client/helper.py", "certify/common/crfl.py", "server/_helpers.py"])
def test_a_planted_name_is_caught(path: str) -> None:
    assert nameless(Path(path))


def test_names_that_say_something_are_left_alone() -> None:
    assert nameless(Path("strategies/rules/common_subspace.py")) is None
    assert nameless(Path("tasks/datasets/_idx.py")) is None


def test_a_component_without_its_function_is_caught() -> None:
    assert holds_its_name("def krum(updates): return updates", "krum")
    for source in ("def Krum(updates): return updates", "class A:\n    def krum(self): ...", "krum = 3", ""):
        assert not holds_its_name(source, "krum")


def test_a_planted_need_of_flower_is_caught(tmp_path: Path) -> None:
    package = tmp_path / "tasks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "direct.py").write_text("import flwr.app")
    (package / "through.py").write_text("from tasks import direct")
    (package / "broken.py").write_text("1 / 0")
    (package / "astray.py").write_text("import tasks.nowhere")
    (package / "free.py").write_text("import json\ntry:\n    import flwr\nexcept ImportError:\n    flwr = None")
    (package / "optional.py").write_text("import a_package_that_is_not_installed")
    names = [f"tasks.{path.stem}" for path in sorted(package.glob("[a-z]*.py"))]
    wrong = {"tasks.direct", "tasks.through", "tasks.broken", "tasks.astray"}
    assert set(import_without_flower(names, tmp_path)) == wrong
