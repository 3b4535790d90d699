"""A module imports only from its own layer or a lower one, and what answers at once does not import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.small import study_in

HARNESS = PROJECT / "harness"

# Lowest first; `config` stands on `errors` and `space`.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("processes",),
    (
        "errors",
        "results",
        "seeds",
        "space",
        "config",
        "interrupt",
        "environment",
        "outbox",
        "files",
        "mlflow_library",
        "options",
    ),
    ("final_result", "facts", "ledger", "packing", "evidence", "cost", "audit", "predictions", "thumbnails"),
    ("history", "extrapolation"),
    (
        "data",
        "models",
        "optim",
        "engine",
        "search",
        "asking",
        "rehearsal",
        "database",
        "leases",
        "mounts",
        "opened_file",
        "jobs",
    ),
    ("trainer", "auto"),
    ("experiment", "checkpoint", "features"),
    (
        "objective",
        "storage",
        "records",
        "taking",
        "opening",
        "tracking",
        "mlflow_tracker",
        "mlflow_run",
        "mlflow_places",
        "mlflow_files",
        "mlflow_client",
        "mlflow_check",
    ),
    (
        "study",
        "final",
        "retraining",
        "choice",
        "rerank",
        "saved_model",
        "worker",
        "workers",
        "catalogue",
        "reproduce",
        "replay",
        "doctor",
    ),
    ("ray_cluster", "ray_head", "ray_workers"),
    ("overview", "report", "export", "model_card", "mlflow_model", "predict"),
    ("cli", "arguments", "running", "coordinator", "auditing", "demo_page", "display", "pretrain", "__main__"),
)
FREE_OF_TORCH = (
    *(
        "errors",
        "results",
        "seeds",
        "space",
        "config",
        "search",
        "storage",
        "opening",
        "overview",
        "report",
        "catalogue",
        "cli",
    ),
    *(
        "arguments",
        "asking",
        "extrapolation",
        "history",
        "rehearsal",
        "replay",
        "taking",
        "leases",
        "opening",
        "ledger",
        "packing",
        "evidence",
        "audit",
        "predictions",
        "thumbnails",
        "cost",
    ),
)


def module_of(file: Path) -> str:
    """harness/data/cache.py is harness.data.cache."""
    parts = file.relative_to(PROJECT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer_of(module: str) -> int | None:
    """The layer of a module of the harness, None for everything else."""
    first, _, rest = module.partition(".")
    if first != "harness" or not rest:
        return None
    name = rest.split(".")[0]
    return next((number for number, names in enumerate(LAYERS) if name in names), -1)


def imports(tree: ast.AST) -> list[str]:
    """The modules that a file imports anywhere, `if TYPE_CHECKING:` excepted."""
    found: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            found += [name for each in node.orelse for name in imports(each)]
        elif isinstance(node, ast.Import):
            found += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            assert node.module is not None
            # `from harness import storage` names a module, `from harness.space import Float` lies in one.
            found += [f"harness.{each.name}" for each in node.names] if node.module == "harness" else [node.module]
        else:
            found += imports(node)
    return found


MODULES = {module_of(file): file for file in sorted(HARNESS.rglob("*.py"))}


def test_every_module_has_a_layer() -> None:
    assert [name for name in MODULES if layer_of(name) == -1] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name != "harness"])
def test_a_module_imports_from_its_layer_or_a_lower_one(module: str) -> None:
    own = layer_of(module)
    assert own is not None
    edges = [name for name in imports(ast.parse(MODULES[module].read_text(encoding="utf-8")))]
    wrong = [f"{module} -> {name}" for name in edges if (layer := layer_of(name)) is not None and layer > own]
    assert wrong == []


def test_the_configuration_stands_on_errors_and_space_alone() -> None:
    found = {name for name in imports(ast.parse(MODULES["harness.config"].read_text(encoding="utf-8")))}
    assert {name for name in found if name.startswith("harness")} <= {"harness.errors", "harness.space"}


def test_no_two_modules_import_each_other() -> None:
    graph = {
        module: {name for name in imports(ast.parse(file.read_text(encoding="utf-8"))) if name in MODULES}
        for module, file in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in graph[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_records_need_the_standard_library_only() -> None:
    for name in ("errors", "results", "seeds"):
        for each in imports(ast.parse(MODULES[f"harness.{name}"].read_text(encoding="utf-8"))):
            assert each.split(".")[0] in sys.stdlib_module_names, f"{name} -> {each}"


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
        "import harness.mlflow_places",
        "harness.arguments.build_parser('run_study.py').format_help()",
        "harness.arguments.build_parser('harness').format_help()",
        "[harness.catalogue.find(name) for name in ('demo', 'flowers102', 'flowers102_grid', 'flowers102_head')]",
    ]
    assert not imported_by("\n".join(lines), workspace) & {"torch", "torchvision", "mlflow", "pandas", "plotly"}


def test_the_help_imports_next_to_nothing() -> None:
    code = "from harness.cli import main\ntry:\n    main(['run', '--help'])\nexcept SystemExit:\n    pass"
    assert not imported_by(code) & {"torch", "mlflow", "pandas", "plotly", "optuna", "sqlalchemy", "numpy", "pydantic"}


def test_show_answers_without_torch_and_mlflow(workspace: Path) -> None:
    code = "\n".join(
        [
            "from harness import catalogue",
            "from harness.cli import main",
            "from harness.opening import open_store",
            "from tests.analytic import run_analytic",
            "found = catalogue.find('demo')",
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
    code = "from harness.cli import main\nassert main('run --study tiny --trials 1 --set epochs=1'.split()) == 0"
    assert "torch" in imported_by(code, tmp_path)
    assert not imported_by(code, tmp_path) & {"torch", "torchvision", "mlflow", "pandas", "plotly"}


@pytest.mark.slow
def test_garbage_is_collected_while_a_study_trains(tmp_path: Path, image_cache: Path) -> None:
    """Commands start without collecting what imports leave behind."""
    study_in(tmp_path, image_cache)
    code = "\n".join(
        [
            "import atexit, gc",
            "from harness.cli import process",
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
