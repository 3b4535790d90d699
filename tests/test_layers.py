"""A module imports only from its own room or a lower one, and what answers at once does not import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.small import study_in

HARNESS = PROJECT / "harness"

# Lowest first: a room imports from itself and from those before it.
ROOMS = (
    "base",
    "config",
    "data",
    "datasets",
    "models",
    "training",
    "garden",
    "store",
    "search",
    "final",
    "tracking",
    "workers",
    "serving",
    "report",
    "study",
    "new_study",
    "api",
    "cli",
    "__main__",
)
FREE_OF_TORCH = (
    *(f"base.{name}" for name in ("errors", "files", "keys", "packing", "processes", "seeds", "words")),
    *(
        f"config.{name}"
        for name in ("contracts", "events", "final_result", "find", "jobs", "options", "space", "study")
    ),
    *(f"store.{name}" for name in ("database", "leases", "ledger", "locks", "opening", "queue", "records", "store")),
    *(f"search.{name}" for name in ("extrapolation", "pruners", "rehearsal", "replay", "samplers", "suggest")),
    *(
        f"final.{name}"
        for name in ("model_files", "predictions", "pruning_cost", "sentences", "statistics", "suspects")
    ),
    *(f"report.{name}" for name in ("compare", "comparison", "display", "overview", "write")),
    *(f"cli.{name}" for name in ("arguments", "commands", "run")),
    "api",
    *(f"study.{name}" for name in ("command", "coordinator", "publish", "start")),
)


def module_of(file: Path) -> str:
    """harness/data/cache.py is harness.data.cache."""
    parts = file.relative_to(PROJECT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(module: str) -> int:
    return ROOMS.index(module.split(".")[1])


def imports(file: Path) -> set[str]:
    """The modules of the harness that a file imports anywhere, to run or for its types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            assert node.module is not None
            # `from harness.store import leases` names a module, `from harness.config.space import Float` lies in one.
            inner = {f"{node.module}.{each.name}" for each in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


MODULES = {module_of(file): file for file in sorted(HARNESS.rglob("*.py"))}
INSIDE = [name for name in MODULES if name != "harness"]


@pytest.mark.parametrize("module", INSIDE)
def test_a_module_imports_from_its_room_or_a_lower_one(module: str) -> None:
    wrong = [name for name in imports(MODULES[module]) - {"harness"} if room_of(name) > room_of(module)]
    assert wrong == []


def test_no_two_modules_import_each_other() -> None:
    graph = {module: imports(file) for module, file in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in graph[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_every_room_says_what_it_is_and_has_nine_modules_at_most() -> None:
    for room in (path for path in HARNESS.iterdir() if path.is_dir() and path.name in ROOMS):
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))), room
        assert len(list(room.glob("*.py"))) - 1 <= 9, room
    assert len(list(HARNESS.glob("*.py"))) <= 4


def test_no_module_has_more_than_350_lines() -> None:
    long = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in MODULES.items()}
    assert {name: lines for name, lines in long.items() if lines > 350} == {}


def test_functions_have_six_arguments_and_fifty_lines_at_most_or_say_why() -> None:
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(each.arg not in ("self", "cls") for each in given)
            if count > 6:
                assert "As many arguments as" in (ast.get_docstring(node) or ""), f"{name}.{node.name}"
            assert (node.end_lineno or 0) - node.lineno < 50, f"{name}.{node.name}"


def test_the_base_and_the_events_need_the_standard_library_only() -> None:
    for name in ("base.errors", "base.seeds", "base.keys", "base.words", "config.events"):
        tree = ast.parse(MODULES[f"harness.{name}"].read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [each.name for node in found if isinstance(node, ast.Import) for each in node.names]
        names += [node.module or "" for node in found if isinstance(node, ast.ImportFrom)]
        assert [each for each in names if each.split(".")[0] not in sys.stdlib_module_names] == [], name


# -- what answers at once ------------------------------------------------------------------------------------------


def imported_by(code: str, cwd: Path = PROJECT) -> set[str]:
    """The top-level packages in a process that ran `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{code}\nprint(*sys.modules)"],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_start_up_imports_neither_torch_nor_mlflow(workspace: Path) -> None:
    lines = [
        *(f"import harness.{name}" for name in FREE_OF_TORCH),
        "import harness.tracking.places",
        "import harness.config.find",
        "harness.cli.arguments.build_parser('run_study.py').format_help()",
        "harness.cli.arguments.build_parser('harness').format_help()",
        "[harness.config.find.find(name) for name in ('demo', 'flowers102', 'flowers102_grid', 'flowers102_head')]",
    ]
    assert not imported_by("\n".join(lines), workspace) & {"torch", "torchvision", "mlflow", "pandas", "plotly"}


def test_the_help_imports_next_to_nothing() -> None:
    code = "from harness.cli.commands import main\ntry:\n    main(['run', '--help'])\nexcept SystemExit:\n    pass"
    assert not imported_by(code) & {"torch", "mlflow", "pandas", "plotly", "optuna", "sqlalchemy", "numpy", "pydantic"}


def test_show_answers_without_torch_and_mlflow(workspace: Path) -> None:
    code = "\n".join(
        [
            "from harness.config import find",
            "from harness.cli.commands import main",
            "from harness.store.opening import open_store",
            "from tests.analytic import run_analytic",
            "found = find.find('demo')",
            "with open_store(found.study, found.storage_url) as store:",
            "    run_analytic(found.study, store, 2)",
            "before = set(sys.modules)",
            "assert main(['show', 'demo']) == 0",
            "assert main(['show', 'demo', '--json']) == 0",
        ]
    )
    assert not imported_by(code, workspace) & {
        "torch",
        "torchvision",
        "mlflow",
        "scipy",
        "pandas",
        "plotly",
        "PIL",
        "rich",
    }


@pytest.mark.slow
def test_a_finished_study_says_so_without_torch_and_mlflow(tmp_path: Path, image_cache: Path) -> None:
    """Its weights are read all the same: damaged ones are made again."""
    (tmp_path / "studies").mkdir()
    file = f"from tests.conftest import make_study\n\nSTUDY = make_study({str(image_cache)!r})\n"
    (tmp_path / "studies" / "tiny.py").write_text(file)
    code = (
        "from harness.cli.commands import main\nassert main('run --study tiny --trials 1 --set epochs=1'.split()) == 0"
    )
    assert "torch" in imported_by(code, tmp_path)
    assert not imported_by(code, tmp_path) & {"torch", "torchvision", "mlflow", "pandas", "plotly"}


@pytest.mark.slow
def test_garbage_is_collected_while_a_study_trains(tmp_path: Path, image_cache: Path) -> None:
    """Commands start without collecting what imports leave behind."""
    study_in(tmp_path, image_cache)
    code = "\n".join(
        [
            "import atexit, gc",
            "from harness.cli.commands import process",
            "atexit.register(lambda: print(gc.isenabled()))",
            "process(['run', '--study', 'tiny', '--trials', '1'])",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
