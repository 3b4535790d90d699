"""The README cannot rot: its commands, fields and tree are held against the code."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from harness.cli import commands as cli
from harness.cli.arguments import build_parser
from harness.config import find as catalogue
from harness.config import space
from tests.conftest import PROJECT

README = (PROJECT / "README.md").read_text()
COMMANDS = re.findall(
    r"^(?:.* && )?(python .*?)(?: +#.*)?$", "\n".join(re.findall(r"```\n(.*?)```", README, re.S)), re.M
)


def test_every_command_in_the_readme_parses() -> None:
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        program = "run_study.py" if words[0] == "run_study.py" else "python -m harness"
        rest = words[1:] if program == "run_study.py" else words[2:]
        assert build_parser(program).parse_args(rest).command in cli.COMMANDS, command


def test_every_command_of_the_program_is_in_the_readme() -> None:
    help_text = build_parser("python -m harness").format_help()
    commands = re.findall(r"^    (\w+)(?: |$)", help_text, re.M)
    assert " ".join(commands) == "run show report reproduce replay audit doctor export predict demo ui"
    for command in commands[1:]:
        assert f"python -m harness {command}" in README


def test_the_fields_that_the_readme_explains_exist() -> None:
    table = README.split("| field | meaning |")[1].split("\n\n")[0]
    study = catalogue.find(str(PROJECT / "studies" / "flowers102.py")).study
    known = {*space.paths(study.train), *(f"final.{path}" for path in space.paths(study.final)), "seed"}
    for row in table.splitlines()[2:]:
        for path in re.findall(r"`([a-z_]+(?:\.[a-z_*]+)?)`", row.split("|")[1]):
            group = path.removesuffix("*")
            assert path in known or any(each.startswith(group) for each in known if path.endswith("*")), path


def test_the_tree_in_the_readme_names_every_file_of_the_package() -> None:
    tree = README.split("```\nrun_study.py")[1].split("```")[0]
    files = subprocess.run(["git", "ls-files", "harness", "studies"], cwd=PROJECT, capture_output=True, text=True)
    names = [Path(file).name for file in files.stdout.split()]
    if not names:
        pytest.skip("not a git checkout")
    for name in names:
        assert name in tree or name in ("__init__.py", "__main__.py", "py.typed"), name


def test_pinned_versions_are_name_and_version_alone() -> None:
    for line in (PROJECT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+", line), line
