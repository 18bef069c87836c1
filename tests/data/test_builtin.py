"""The project's own task, and built-in archives and models that are not what they should be."""

import sqlite3

import pytest

from pipeline import artifacts
from pipeline.data import builtin, text_to_sql


def test_every_query_runs():
    database = sqlite3.connect(":memory:")
    for table in text_to_sql.tables():
        database.execute(text_to_sql.schema(table))
    for row in text_to_sql.text_to_sql_rows():
        database.execute(row["response"])


def test_questions_are_distinct_and_always_the_same():
    rows = text_to_sql.text_to_sql_rows()
    assert len({row["prompt"] for row in rows}) == len(rows) > 1000
    assert rows == text_to_sql.text_to_sql_rows()


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """A stand-in for the converted model, in a cache of its own."""
    monkeypatch.setenv("SAP_CACHE", str(tmp_path))
    with artifacts.building(builtin.builtin_model_folder(), {}) as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
    return builtin.builtin_model_folder()


def test_a_damaged_builtin_model_is_refused_in_one_sentence(converted):
    (converted / "model.safetensors").write_bytes(b"weighty")
    for _ in range(2):
        with pytest.raises(ValueError, match="model.safetensors does not match .*: delete") as caught:
            builtin.builtin_model()
        assert "\n" not in str(caught.value)


def test_the_builtin_model_is_verified_once_a_process(converted, monkeypatch):
    verified, verify = [], artifacts.verify
    monkeypatch.setattr(artifacts, "verify", lambda folder: verified.append(folder) or verify(folder))
    assert builtin.builtin_model() == builtin.builtin_model() == converted and verified == [converted]
