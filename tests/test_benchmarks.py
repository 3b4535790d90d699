"""The list of benchmarks and their records: every script is described, and a fall by a third is noticed."""

from __future__ import annotations

import ast
import contextlib
import importlib
import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import gpu
from benchmarks.accounts import PARTS
from benchmarks.clock import _owner
from benchmarks.machine import Others, kind
from benchmarks.measure import Figures, alternate, ratios
from harness.base.errors import Halt
from tests.conftest import PROJECT
from tests.workers.test_pool import wait_until_gone


def test_every_script_says_in_its_first_line_what_it_measures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    assert benchmarks.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(benchmarks.scripts()) >= 8
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_every_record_belongs_to_a_quick_mode() -> None:
    records = json.loads(benchmarks.RECORDS.read_text())
    for of_one_kind in records.values():
        assert set(of_one_kind) <= set(filter(benchmarks.has_quick, benchmarks.scripts()))
        assert all(ratio > 0 for each in of_one_kind.values() for ratio in each.values())


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Others, "cores", lambda self: 0.01)


def test_a_ratio_that_fell_by_more_than_a_third_is_too_slow_even_after_a_second_measurement(
    idle: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = iter([1.9, 1.9, 1.9, 2.1, 2.1])
    monkeypatch.setattr(benchmarks, "quick", lambda name: {"gain": next(given)})
    assert not benchmarks.holds("some", {"gain": 3.0})  # 1.9 twice
    assert benchmarks.holds("some", {"gain": 3.0})  # 1.9, then 2.1
    assert benchmarks.holds("some", {})  # nothing to compare with
    assert capsys.readouterr().out.count("TOO SLOW") == 3


@pytest.mark.parametrize(("cores", "words"), [(1.0, "other processes took 1.00 cores"), (None, "cannot be seen")])
def test_a_ratio_that_was_measured_beside_other_work_is_printed_and_neither_judged_nor_recorded(
    cores: float | None, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Others, "cores", lambda self: cores)
    monkeypatch.setattr(benchmarks, "quick", lambda name: {"gain": 1.0})
    assert benchmarks.holds("some", {"gain": 3.0})
    said = capsys.readouterr().out
    assert "1   record 3   not judged" in said
    assert words in said
    with pytest.raises(SystemExit, match=words):
        benchmarks.recorded("some")


def test_a_ratio_is_held_against_the_records_of_its_kind_of_processor_alone(
    idle: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmarks, "RECORDS", tmp_path / "records.json")
    monkeypatch.setattr(benchmarks, "quick", lambda name: {"gain": 1.0})
    monkeypatch.setattr("sys.argv", ["benchmarks", "--quick", "start"])
    for processor, code in ((kind(), 1), ("another", 0)):
        benchmarks.RECORDS.write_text(json.dumps({processor: {"start": {"gain": 3.0}}}))
        assert benchmarks.main() == code
    assert f"There is no record of this kind of machine ({kind()})" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="it takes Linux to see what other processes take")
def test_work_beside_a_measurement_is_seen() -> None:
    others = Others()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while Path(f"/proc/{busy.pid}/stat").read_text().rpartition(")")[2].split()[11] == "0":
            pass
        taken = others.cores()
        assert taken is not None
        assert taken > benchmarks.IDLE_CORES
    finally:
        busy.kill()
        busy.wait()


def test_contestants_take_turns_and_each_round_begins_with_another() -> None:
    order: list[str] = []
    figures = alternate({name: lambda name=name: order.append(name) or 1.0 for name in "ab"}, rounds=2)  # type: ignore[misc]
    assert order == ["a", "b", "b", "a"]
    assert figures["a"] == Figures((1.0, 1.0))


def test_ratios_are_taken_within_a_round() -> None:
    disturbed = ratios(Figures((2.0, 20.0, 2.0)), Figures((1.0, 10.0, 1.0)))
    assert disturbed.values == (2.0, 2.0, 2.0)
    assert disturbed.text("x", 1) == "2.0 x (2.0 to 2.0, n = 3)"


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "--quick", "nonsense"])
    assert benchmarks.main() == 2
    assert "nonsense" in capsys.readouterr().err


def test_what_goodput_counts_is_there_under_the_name_by_which_it_is_counted() -> None:
    for name, places in PARTS.items():
        for place, attributes in places.items():
            for attribute in attributes:
                assert callable(getattr(_owner(place), attribute, None)), f"{name}: {place}.{attribute}"


def test_every_name_that_a_script_imports_of_the_harness_is_there() -> None:
    """In the code that it runs in other processes, too."""
    for file in sorted(Path(benchmarks.__file__).parent.rglob("*.py")):
        trees = [ast.parse(file.read_text(encoding="utf-8"))]
        for text in (each.value for each in ast.walk(trees[0]) if isinstance(each, ast.Constant)):
            with contextlib.suppress(SyntaxError, ValueError):
                trees += [ast.parse(text)] if isinstance(text, str) and "import" in text else []
        for each in itertools.chain.from_iterable(map(ast.walk, trees)):
            if isinstance(each, ast.ImportFrom) and (each.module or "").startswith("harness"):
                module = importlib.import_module(each.module or "")
                for alias in each.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{each.module}.{alias.name}")


def test_goodput_counts_every_validation(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks import accounts\n"
        "small = ['epochs=2', 'final.seeds=1', 'final.publish=false', 'final.compare_base=false']\n"
        "small += [f'data.{split}_per_class=4' for split in ('train', 'val', 'test')]\n"
        "given = [f'--set={each}' for each in small]\n"
        "found = accounts.study(Path(sys.argv[1]), ['--trials', '1', *given])\n"
        "print(found['validation'] / found['training steps'])"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True)
    assert float(said.stdout.splitlines()[-1]) > 0.05, said.stderr


def test_a_gpu_part_that_was_not_measured_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def fails(error: Exception) -> None:
        tried.append(error)
        raise error

    parts = {
        "one": partial(fails, Halt("The model uses x, whose results differ")),
        "two": partial(fails, RuntimeError("not measured, no GPU")),
        "three": partial(print, "three is measured"),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "study", lambda keep: None)
    freed: list[object] = []
    monkeypatch.setattr(gpu, "free_memory", freed.append)
    for _ in range(2):
        gpu.full(tmp_path / "kept.txt")
    assert len(tried) == 4
    assert len(freed) == 6  # what is measured next has the memory
    assert (tmp_path / "kept.txt").read_text().count("three is measured") == 1
    assert "whose results differ" in capsys.readouterr().out


def test_a_recipe_of_another_configuration_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = pytest.importorskip("benchmarks.recipe")
    now = recipe.definition(recipe.configured(recipe.TODAY, tmp_path, 128, 12))
    line = {"recipe": recipe.TODAY, "size": 128, "epochs": 12, "machine": "a machine", "test_total": 100}
    kept = [
        line
        | {"seed": seed, "definition": now, "test_correct": 80, "test_flipped": 0.8, "val_correct": 0, "seconds": 1.0}
        for seed in (0, 1)
    ]
    kept.append(kept[0] | {"seed": 2, "definition": "of a former recipe"})
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(each) + "\n" for each in kept))
    monkeypatch.setattr("sys.argv", ["recipe", "--table", "--keep", str(tmp_path / "kept.jsonl")])
    recipe.main()
    assert "| today | 2 | 0.00 % |  | 80.00 % |" in capsys.readouterr().out


def test_the_processes_of_a_benchmark_end_with_it() -> None:
    code = (
        "import os, time; from concurrent.futures import ProcessPoolExecutor; import multiprocessing\n"
        "from benchmarks.recipe import begin\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), begin, (1,)) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    wait_until_gone([pid])
