"""A password in a URL is not repeated: not in a message, not on a page, not in what is stored."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from harness.base.errors import Halt, InputError, masked
from harness.cli import run as running
from harness.report.overview import overview, summary
from harness.report.write import write_report
from harness.store import database
from harness.store.store import Store
from harness.tracking.expected import facts
from tests.analytic import memory_store
from tests.conftest import make_study

URL = "postgresql://flora:secret@db.example:5432/studies"
NAMES = st.text("abcXYZ019-_.", min_size=1, max_size=8)
PASSWORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="@'\""), min_size=4)


@given(NAMES, PASSWORDS)
@settings(max_examples=100)
def test_no_password_is_left_in_a_sentence(user: str, password: str) -> None:
    text = masked(f"--storage 'mysql://{user}:{password}@host/x' cannot be opened; see http://host:5000/page.")
    assert text == f"--storage 'mysql://{user}:***@host/x' cannot be opened; see http://host:5000/page."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URL, "postgresql://flora:***@db.example:5432/studies"),
        ("http://:token@host", "http://:***@host"),
        ("mysql://u:a@b@host/x", "mysql://u:***@host/x"),
        ("mssql://host/x?user=u&password=a/b&timeout=3", "mssql://host/x?user=u&password=***&timeout=3"),
        ("sqlite:////a/b:c@d.db", "sqlite:////a/b:c@d.db"),
        ("http://host:5000", "http://host:5000"),
        ("https://TOKEN@host/x", "https://***@host/x"),
        ("postgresql://flora@host/x?sslpassword=a&x=1", "postgresql://flora@host/x?sslpassword=***&x=1"),
        ("mail flora@example.org", "mail flora@example.org"),
    ],
)
def test_only_passwords_are_hidden(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize("given", [["--on-event", "curl -u me:secret x"], ["--on-event=curl -u me:secret x"]])
def test_the_command_of_events_is_not_recorded(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run_study.py", *given, "--trials", "9"])
    recorded = facts(make_study("cache"), {})["harness.command"]
    assert recorded.endswith("run_study.py --trials 9")


def test_errors_hide_it() -> None:
    for kind in (InputError, Halt):
        assert "secret" not in str(kind(f"The database {URL} failed."))


def test_the_summary_and_the_report_hide_it(tmp_path: Path) -> None:
    study = make_study("cache")
    store = Store(URL, memory_store(study).optuna_study)
    for text in (summary("tiny", store, URL), str(overview("tiny", store, URL))):
        assert "secret" not in text
        assert text.count("flora:***@") == 2
    assert "secret" not in write_report("tiny", store, URL, tmp_path).read_text(encoding="utf-8")


def test_what_mlflow_keeps_and_the_command_to_go_on_hide_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run_study.py", "--storage", URL, f"--tracking-uri={URL}"])
    kept = facts(make_study("cache"), {})
    assert "secret" not in str(kept)
    assert kept["harness.command"].count("flora:***@db.example") == 2
    assert running._stopped(130) == 130
    printed = capsys.readouterr().out
    assert "secret" not in printed
    assert printed.count("flora:***@db.example") == 2


def test_waiting_for_a_server_that_is_away_shows_no_password(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "RETRY_SECONDS", 0.0)
    answers: list[Exception | int] = [OperationalError("SELECT 1", {}, Exception("the connection is closed")), 3]

    def operation() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert database.outlast("postgresql://me:secret@host/studies", operation) == 3
    said = capsys.readouterr().err
    assert "me:***@host" in said
    assert "secret" not in said
