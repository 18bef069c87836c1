"""The project's own task, and built-in archives and models that are not what they should be."""

import sqlite3

import pytest

from pipeline import artifacts
from pipeline.data import builtin, text_to_sql
from pipeline.data.forms import count_forms
from pipeline.data.overlap import normalise


def test_every_query_runs():
    database = sqlite3.connect(":memory:")
    for name, text, _, numbers, label in text_to_sql._TABLES:
        columns = [f"{label} TEXT", f"{text} TEXT", *(f"{number} INTEGER" for number in numbers)]
        database.execute(f"CREATE TABLE {name} ({', '.join(columns)})")
    for row in text_to_sql.text_to_sql_rows():
        database.execute(row["response"])


def test_questions_are_distinct_and_always_the_same():
    rows = text_to_sql.text_to_sql_rows()
    assert len({row["prompt"] for row in rows}) == len(rows) > 1000
    assert rows == text_to_sql.text_to_sql_rows()


WRITTEN = (
    "everyday",
    "ordinary",
    "train_lookalikes",
    "twins_harmless",
    "twins_harmful",
    "test_twins_harmless",
    "test_twins_harmful",
)


def prompts(name: str) -> list[str]:
    return [row["prompt"] for row in builtin.builtin_rows(name)]


@pytest.mark.parametrize("name", WRITTEN)
def test_the_prompts_written_here_are_of_both_forms_and_distinct(name):
    rows = builtin.builtin_rows(name)
    assert len({normalise(row["prompt"]) for row in rows}) == len(rows) >= 60
    counts = count_forms(rows)
    assert abs(counts["question"] - counts["imperative"]) <= 2 and counts["other"] == 0, counts


def test_no_prompt_written_here_is_both_trained_on_and_evaluated():
    trained = {
        normalise(text)
        for name in ("everyday", "twins_harmless", "twins_harmful", "harmful", "harmless")
        for text in prompts(name)
    }
    for name in ("ordinary", "lookalikes", "test_twins_harmful"):
        assert not trained & {normalise(text) for text in prompts(name)}, name


def test_twins_share_words_and_differ():
    for side in ("", "test_"):
        for harmless, harmful in zip(
            prompts(f"{side}twins_harmless"), prompts(f"{side}twins_harmful"), strict=True
        ):
            shared = set(normalise(harmless).split()) & set(normalise(harmful).split())
            assert harmless != harmful and len(shared) >= 2, (harmless, harmful)


def test_there_are_several_hundred_ordinary_instructions_of_many_kinds():
    found = prompts("ordinary")
    firsts = {" ".join(text.split()[:2]) for text in found}
    assert len(found) >= 290 and len(firsts) >= 150, "few begin alike"


def test_a_source_that_is_written_here_is_known_by_its_text(monkeypatch):
    before = {
        name: builtin.identity(name) for name in ("ordinary", "harmless", "lookalikes", "advbench")
    }
    monkeypatch.setitem(builtin._READERS, "ordinary", lambda: [{"prompt": "another"}])
    monkeypatch.setitem(builtin._READERS, "everyday", lambda: [{"prompt": "another"}])
    after = {name: builtin.identity(name) for name in before}
    assert [name for name in before if before[name] != after[name]] == ["ordinary", "harmless"]


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
        with pytest.raises(
            ValueError, match=r"model.safetensors does not match .*: delete"
        ) as caught:
            builtin.builtin_model()
        assert "\n" not in str(caught.value)


def test_the_builtin_model_is_verified_once_a_process(converted, monkeypatch):
    verified, verify = [], artifacts.verify
    monkeypatch.setattr(
        artifacts, "verify", lambda folder: verified.append(folder) or verify(folder)
    )
    assert builtin.builtin_model() == builtin.builtin_model() == converted and verified == [
        converted
    ]
