"""What a user can get wrong about a study on PostgreSQL: one sentence, exit code 2, and nothing is changed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from harness.base.environment import versions
from harness.store.database import _createdb, check_database
from harness.store.opening import open_store, read_store
from tests.faulty import CommandLine, one_sentence, small_study
from tests.postgres import PASSWORD, PostgreSQL
from tests.refusal import tree


def content(url: str) -> dict[str, list[Any]]:
    """Every table with its rows."""
    engine = sqlalchemy.create_engine(url)
    metadata = sqlalchemy.MetaData()
    metadata.reflect(engine)
    with engine.connect() as connection:
        found = {each.name: sorted(map(str, connection.execute(each.select()))) for each in metadata.sorted_tables}
    engine.dispose()
    return found


def assert_refused(line: CommandLine, arguments: list[str], words: list[str]) -> None:
    """Exit code 2 and one sentence with these words and without a password."""
    ended = line.run(*arguments)
    assert ended.code == 2, ended.err
    assert one_sentence(ended.err), ended.err
    assert "***" in ended.err or "secret" not in "".join(arguments)
    for word in words:
        assert word in ended.err
    for secret in ("secret", PASSWORD):
        assert secret not in ended.out + ended.err


# What is wrong with the URL, and what is said. {port} is the server's.
URLS = {
    "a wrong password": (
        "postgresql+psycopg://postgres:secret@127.0.0.1:{port}/postgres",
        ["password authentication failed", "check the user and the password"],
    ),
    "a password with an @": (
        "postgresql+psycopg://postgres:se@secret/secret@127.0.0.1:{port}/postgres",
        ["***", "write %40 for an @ in the password"],
    ),
    "no password": ("postgresql+psycopg://postgres@127.0.0.1:{port}/postgres", ["no password", "PGPASSWORD"]),
    "an unknown host": ("postgresql+psycopg://postgres:secret@db.invalid/x", ["db.invalid", "check the host's name"]),
    "a port where nothing is": (
        "postgresql+psycopg://postgres:secret@127.0.0.1:1/x",
        ["Connection refused", "that the server is running"],
    ),
    "a socket that is none": (
        "postgresql+psycopg://postgres@/x?host=/no/such/folder",
        ["/no/such/folder", "check the socket's folder"],
    ),
    "an unknown database": (
        f"postgresql+psycopg://postgres:{PASSWORD}@127.0.0.1:{{port}}/meadow",
        ["create it with `createdb -h 127.0.0.1 -p {port} -U postgres meadow`"],
    ),
    "no database": (f"postgresql+psycopg://postgres:{PASSWORD}@127.0.0.1:{{port}}", ["names no database"]),
    "an unknown option": (
        f"postgresql+psycopg://postgres:{PASSWORD}@127.0.0.1:{{port}}/postgres?sslmod=require",
        ["sslmod", "check the URL"],
    ),
    "another driver": ("postgresql+asyncpg://a:secret@127.0.0.1/x", ["asyncpg"]),
    "MySQL": ("mysql://flora:secret@127.0.0.1/x", ["a study needs SQLite or PostgreSQL"]),
}


@pytest.mark.parametrize(("url", "words"), URLS.values(), ids=URLS.keys())
def test_a_wrong_url_is_refused(
    url: str, words: list[str], postgres: PostgreSQL, line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("PGPASSFILE", "/dev/null")
    before = tree(line.place)
    assert_refused(
        line, ["--storage", url.format(port=postgres.port)], [word.format(port=postgres.port) for word in words]
    )
    assert {*tree(line.place)} - {*before} <= {"studies/tiny.py"}


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ("postgresql+psycopg://flora:secret@db.example:5433/x", "createdb -h db.example -p 5433 -U flora meadow"),
        ("postgresql+psycopg://db.example/x", "createdb -h db.example meadow"),
        ("postgresql:///x?host=/run/pg&port=5433&user=flora", "createdb -h /run/pg -p 5433 -U flora meadow"),
        ("postgresql:///x", "createdb meadow"),
    ],
)
def test_the_command_that_makes_a_database_is_for_the_server_of_the_url(url: str, command: str) -> None:
    assert _createdb(url, "meadow") == command


def test_the_password_may_be_in_the_environment(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    check_database(database.replace(f":{PASSWORD}", ""))


def test_a_missing_driver_is_named(line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    url = "postgresql+psycopg://flora:secret@127.0.0.1/x"
    assert_refused(line, ["--storage", url], ["the database driver psycopg", "pip install 'psycopg[binary]'"])


def test_a_database_of_another_program_is_refused(database: str, line: CommandLine) -> None:
    engine = sqlalchemy.create_engine(database)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE recipes (name TEXT)"))
    engine.dispose()
    assert_refused(line, ["--storage", database], ["is a database but not a study"])
    assert content(database) == {"recipes": []}


@pytest.mark.slow
def test_a_user_who_may_make_no_tables_is_told_so(postgres: PostgreSQL, database: str, line: CommandLine) -> None:
    postgres.do("CREATE ROLE guest LOGIN PASSWORD 'secret'")
    url = database.replace(f"postgres:{PASSWORD}", "guest:secret")
    assert_refused(line, ["--storage", url], ["permission denied", "let this user create tables in it"])
    assert content(database) == {}


# -- a study that others work on -----------------------------------------------------------------------------------


@pytest.fixture
def begun(database: str, line: CommandLine) -> str:
    """A study with two finished trials."""
    ended = line.run("--storage", database, "--trials", "2")
    assert ended.code == 0, ended.err
    return database


@pytest.mark.slow
def test_another_definition_is_refused(begun: str, line: CommandLine) -> None:
    before = content(begun)
    words = ["was started with another definition", "epochs was 2, is 5"]
    assert_refused(line, ["--storage", begun, "--set", "epochs=5"], words)
    assert content(begun) == before


@pytest.mark.slow
def test_other_versions_are_refused_while_somebody_works(begun: str, line: CommandLine) -> None:
    study = small_study("data/cache").located(line.place, None, None)
    with open_store(study, begun) as other:
        other.set_attribute("versions", versions() | {"torch": "1.13"})
        other.ask(study)
        before = content(begun)
        words = ["works on this study with torch 1.13 (here ", "install the same versions, or wait for its end"]
        assert_refused(line, ["--storage", begun, "--trials", "4"], words)
        before["harness_leases"] = content(begun)["harness_leases"]  # which are renewed
        assert content(begun) == before
    ended = line.run("--storage", begun, "--trials", "3")  # nobody works on it now
    assert ended.code == 0, ended.err
    with read_store("tiny", begun) as store:
        assert store.attributes().get("versions") == versions()


@pytest.mark.slow
def test_fresh_is_refused(begun: str, line: CommandLine) -> None:
    before = content(begun)
    assert_refused(line, ["--storage", begun, "--fresh"], ["--fresh renames a SQLite file", "its own database"])
    assert content(begun) == before


@pytest.mark.slow
def test_no_password_is_kept(begun: str, line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--storage", begun, "--trials", "3"]
    monkeypatch.setattr(sys, "argv", ["run_study.py", "--study", "tiny", *arguments])
    ended = line.run(*arguments)
    assert ended.code == 0, ended.err
    assert PASSWORD not in ended.out + ended.err
    assert PASSWORD not in str(content(begun))
    assert "postgres:***@" in str(content(begun)["study_user_attributes"])
    for file in (path for path in Path(line.place).rglob("*") if path.is_file()):
        assert PASSWORD.encode() not in file.read_bytes(), file
