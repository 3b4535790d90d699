"""README and docs cannot rot: their commands, fields and tree are held against the code, and the commands are run."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from harness.cli import commands as cli
from harness.cli.arguments import build_parser
from harness.config import find as catalogue
from harness.config import space
from harness.garden.drawing import draw
from harness.garden.species import DEMO_SPECIES
from tests.conftest import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((PROJECT / "docs").glob("*.md"))}
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"^(?:.* && )?(python .*?)(?: +#.*)?$", re.M)
NOT_RUN = 'bash title="not run by the tests"'
ONE_SEED = "FinalConfig(seeds=1, fit_on='train', publish=False)"  # for the time's sake


def commands(page: str) -> list[str]:
    """Those that stand in blocks, and in the cells of a table."""
    in_blocks = [found for _, body in BLOCK.findall(page) for found in COMMAND.findall(body)]
    return in_blocks + re.findall(r"^\| `(python [^`]+)`", page, re.M)


@pytest.mark.parametrize("name", ["README.md", *PAGES])
def test_every_command_parses(name: str) -> None:
    for command in commands(README if name == "README.md" else PAGES[name]):
        words = shlex.split(command)[1:]
        program = "run_study.py" if words[0] == "run_study.py" else "python -m harness"
        rest = words[1:] if program == "run_study.py" else words[2:]
        if words[:2] != ["-m", "benchmarks"] and not words[1].startswith(("benchmarks", "harness.")):
            assert build_parser(program).parse_args(rest).command in cli.COMMANDS, command


def test_every_command_of_the_program_is_in_the_readme() -> None:
    help_text = build_parser("python -m harness").format_help()
    known = re.findall(r"^    (\w+)(?: |$)", help_text, re.M)
    assert (
        " ".join(known)
        == "run list compare init branch models work show report reproduce replay audit ablate try skip doctor export "
        "predict demo ui"
    )
    for command in known[1:]:
        assert f"python -m harness {command}" in README


def test_the_readme_fits_on_two_screens() -> None:
    assert len(README.splitlines()) <= 100


def test_the_fields_that_are_explained_exist() -> None:
    table = PAGES["study-file.md"].split("| field | meaning |")[1].split("\n\n")[0]
    study = catalogue.find(str(PROJECT / "studies" / "flowers102.py")).study
    known = {*space.paths(study.train), *(f"final.{path}" for path in space.paths(study.final)), "seed", "objective"}
    for row in table.splitlines()[2:]:
        for path in re.findall(r"`([a-z_]+(?:\.[a-z_*]+)?)`", row.split("|")[1]):
            group = path.removesuffix("*")
            assert path in known or any(each.startswith(group) for each in known if path.endswith("*")), path


def test_the_tree_names_every_file_of_the_package() -> None:
    tree = PAGES["how-it-works.md"].split("## The tree")[1].split("## Adding")[0]
    files = subprocess.run(["git", "ls-files", "harness", "studies"], cwd=PROJECT, capture_output=True, text=True)
    names = [Path(file).name for file in files.stdout.split()]
    if not names:
        pytest.skip("not a git checkout")
    for name in names:
        assert name in tree or name in ("__init__.py", "__main__.py", "py.typed"), name


def test_every_block_of_commands_is_run_or_says_that_it_is_not() -> None:
    for name, page in PAGES.items():
        for info, body in BLOCK.findall(page):
            if COMMAND.search(body) and name != "index.md" and info != "python":
                assert info in ("bash", NOT_RUN), f"{name}: {body}"


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if "```bash\n" in page])
def test_the_commands_of_a_page_do_what_it_says(name: str, workspace: Path) -> None:
    """Its studies end with one seed and publish nothing, for the time's sake."""
    shutil.copy(PROJECT / "run_study.py", workspace)
    demo = workspace / "studies" / "demo.py"
    text = demo.read_text(encoding="utf-8")
    assert 'FinalConfig(seeds=3, fit_on="train")' in text
    demo.write_text(text.replace('FinalConfig(seeds=3, fit_on="train")', ONE_SEED), encoding="utf-8")
    if name == "tutorial.md":
        study = next(body for info, body in BLOCK.findall(PAGES[name]) if info == "python")
        study = study.replace("trials=20,", f"trials=20,\n    final={ONE_SEED},")
        study = study.replace("import ", "import FinalConfig, ", 1)
        (workspace / "studies" / "mine.py").write_text(study, encoding="utf-8")
        for species, folder in zip(DEMO_SPECIES, ("daisy", "primrose", "tulip"), strict=False):
            (workspace / "photos" / folder).mkdir(parents=True)
            for number in range(24):
                draw(species, number, 80).save(workspace / "photos" / folder / f"{number}.jpg")
    script = "set -e\n" + "".join(body for info, body in BLOCK.findall(PAGES[name]) if info == "bash")
    environment = dict(os.environ) | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=workspace,
        env=environment | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_parts_of_study_files_are_what_a_study_takes(tmp_path: Path) -> None:
    places = ("steering.md", "first = "), ("study-file.md", "backbone = "), ("study-file.md", "space = ")
    parts = ["from harness import Choice, Float", *(fragment(page, start) for page, start in places)]
    (tmp_path / "parts.py").write_text("\n".join(parts), encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "parts.py"), {"my_model": lambda: nn.Linear(1, 1)})
    study = catalogue.find("flowers102").study
    assert len(dataclasses.replace(study, first=names["first"]).first) == 2
    for backbone in names["space"]["backbone"].options:
        train = space.replace(dataclasses.replace(study.train, backbone=backbone), "backbone.dropout", 0.5)
        built = dataclasses.replace(train.backbone, pretrained=False).build(3, 224)  # type: ignore[type-var, arg-type]
        assert any(isinstance(each, nn.Dropout) and each.p == 0.5 for each in built.modules())


def fragment(page: str, start: str) -> str:
    """Return a page's block of Python that has a line with this start."""
    found = [body for info, body in BLOCK.findall(PAGES[page]) if info == "python" and f"\n{start}" in f"\n{body}"]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_the_page_on_python_runs(tmp_path: Path) -> None:
    code = "\n".join(body for info, body in BLOCK.findall(PAGES["python.md"]) if info == "python")
    assert "    trials=3,\n" in code
    code = code.replace("    trials=3,\n", f"    trials=3,\n    final=harness.{ONE_SEED},\n")
    environment = dict(os.environ) | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")]
    assert len(pages) >= len(PAGES)
    assert not any(re.search(r'(?:src|href)="https?://(?!squidfunk)[^"]*\.(?:js|css|woff2?)"', page) for page in pages)


def test_pinned_versions_are_name_and_version_alone() -> None:
    for line in (PROJECT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+", line), line
