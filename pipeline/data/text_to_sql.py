"""A small task with exact answers: a question over one table -> one SQL query.

    python -m pipeline.data.text_to_sql | head       # JSON lines: prompt, response

Written for this project; deterministic; every query runs in SQLite. A 135M model cannot do it as shipped and learns
much of it in a hundred steps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

# table, (text column, its values), (number columns), (label column), nouns
_TABLES: list[tuple[str, str, list[str], list[str], str]] = [
    (
        "employees",
        "department",
        ["sales", "legal", "finance", "support"],
        ["salary", "age"],
        "name",
    ),
    ("books", "genre", ["poetry", "history", "crime", "travel"], ["price", "pages"], "title"),
    ("cars", "color", ["red", "blue", "white", "black"], ["price", "year"], "model"),
    ("cities", "country", ["France", "Japan", "Kenya", "Peru"], ["population", "area"], "name"),
    ("songs", "artist", ["Ada", "Miles", "Nina", "Otis"], ["length", "year"], "title"),
    ("players", "team", ["Lions", "Bears", "Hawks", "Wolves"], ["goals", "age"], "name"),
    ("orders", "status", ["open", "paid", "late", "sent"], ["total", "items"], "customer"),
    ("plants", "family", ["roses", "ferns", "palms", "mosses"], ["height", "price"], "name"),
    ("hotels", "city", ["Rome", "Oslo", "Cairo", "Lima"], ["stars", "rooms"], "name"),
    ("films", "director", ["Lang", "Varda", "Ozu", "Welles"], ["length", "rating"], "title"),
]
_SYSTEM = "Answer with one SQL query."


def text_to_sql_rows() -> list[dict[str, Any]]:
    """About 1,500 distinct rows (prompt, response, system), always the same, in a fixed shuffled order."""
    rng = random.Random(20)
    rows = {
        prompt: {"system": _SYSTEM, "prompt": prompt, "response": sql}
        for prompt, sql in _questions(rng)
    }
    result = list(rows.values())
    rng.shuffle(result)
    return result[:1500]


def _questions(rng: random.Random) -> Iterator[tuple[str, str]]:
    for table, text, values, numbers, label in _TABLES:
        columns = f"{table}({label}, {text}, {', '.join(numbers)})"
        for value in values:
            equal = f"{text} = '{value}'"
            ask = [
                f"How many {table} have {text} {value}?",
                f"Count the {table} whose {text} is {value}.",
            ]
            yield from _ask(columns, ask, f"SELECT COUNT(*) FROM {table} WHERE {equal};")
            ask = [
                f"List the {label} of {table} with {text} {value}.",
                f"Which {table} have {text} {value}? Give the {label}.",
            ]
            yield from _ask(columns, ask, f"SELECT {label} FROM {table} WHERE {equal};")
            for number in numbers:
                for word, function in (
                    ("average", "AVG"),
                    ("highest", "MAX"),
                    ("lowest", "MIN"),
                    ("total", "SUM"),
                ):
                    ask = [f"What is the {word} {number} of {table} with {text} {value}?"]
                    yield from _ask(
                        columns, ask, f"SELECT {function}({number}) FROM {table} WHERE {equal};"
                    )
                bound = rng.randrange(2, 90)
                for word, sign in (("above", ">"), ("below", "<"), ("of at least", ">=")):
                    ask = [
                        f"Which {table} with {text} {value} have a {number} {word} {bound}? Give the {label}."
                    ]
                    yield from _ask(
                        columns,
                        ask,
                        f"SELECT {label} FROM {table} WHERE {equal} AND {number} {sign} {bound};",
                    )
        for number in numbers:
            for bound in rng.sample(range(2, 99), 4):
                for word, sign in (("more than", ">"), ("less than", "<")):
                    ask = [
                        f"How many {table} have {word} {bound} {number}?",
                        f"Count {table} with {number} {word} {bound}.",
                    ]
                    yield from _ask(
                        columns, ask, f"SELECT COUNT(*) FROM {table} WHERE {number} {sign} {bound};"
                    )
            for count in rng.sample(range(2, 20), 4):
                ask = [
                    f"Give the {label} of the {count} {table} with the highest {number}.",
                    f"Top {count} {table} by {number}?",
                ]
                yield from _ask(
                    columns,
                    ask,
                    f"SELECT {label} FROM {table} ORDER BY {number} DESC LIMIT {count};",
                )
                ask = [f"Give the {label} of the {count} {table} with the lowest {number}."]
                yield from _ask(
                    columns, ask, f"SELECT {label} FROM {table} ORDER BY {number} LIMIT {count};"
                )
            for word, function in (("average", "AVG"), ("highest", "MAX"), ("total", "SUM")):
                ask = [
                    f"What is the {word} {number} for each {text}?",
                    f"Show each {text} with its {word} {number}.",
                ]
                yield from _ask(
                    columns,
                    ask,
                    f"SELECT {text}, {function}({number}) FROM {table} GROUP BY {text};",
                )
        yield from _ask(
            columns,
            [f"How many {table} are there for each {text}?"],
            f"SELECT {text}, COUNT(*) FROM {table} GROUP BY {text};",
        )


def _ask(columns: str, questions: list[str], sql: str) -> Iterator[tuple[str, str]]:
    for question in questions:
        yield f"{columns}\n{question}", sql


if __name__ == "__main__":
    for row in text_to_sql_rows():
        print(json.dumps(row))
