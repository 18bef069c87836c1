"""Rows of CSV, TSV and JSON text, each with its line or number; what is malformed is told apart, not mended.

    names, rows, bad, doubtful = csv_rows(text, ",", header=True)
    rows, bad = json_rows(text, lines=True)

Text may hold bytes that are not valid UTF-8, as `surrogateescape` leaves them: the rows that hold one are malformed.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from pipeline.data.malformed import Bad, Place

Row = dict[str, Any]
Placed = list[tuple[Place, Row]]

_SIGNS = {",": "commas", "\t": "tabs"}
_ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that could not be decoded
_SWALLOWED = 6  # lines of one row that look like rows: more than a text has by chance
# Keys under which one row holds a list: a lone object with such a list is a row, not a wrapper of rows.
_LISTS_OF_A_ROW = (
    "messages",
    "conversations",
    "history",
    "chosen",
    "rejected",
    "prompt",
    "completion",
    "tools",
)

_TEXTS_OF_A_ROW = ("instruction", "question", "response", "answer", "output", "text")


class NotReadable(ValueError):
    """What is wrong with a file as a whole, and where: half a sentence that follows the file's name."""


def csv_rows(
    text: str, delimiter: str, header: bool
) -> tuple[list[str], Placed, list[Bad], list[Place]]:
    """Column names, rows of texts, malformed rows, and places of doubtful ones.

    header: whether the first line names the columns.

    Doubtful is a row of a few lines that all look like rows:
    a text may, and a quote that closes too late takes in rows.

    Raises NotReadable for a quote that takes in other lines, and for column names that no row could be mapped by.
    """
    # Python's own limit is 131,072 characters, less than a long document
    csv.field_size_limit(sys.maxsize)
    spanned: list[str] = []  # the lines of the row that is read
    lines = (spanned.append(line) or line for line in io.StringIO(text, newline=""))  # type: ignore[func-returns-value]
    # strict, or a quote that never closes would take in the rest of the file
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    rows: Placed = []
    bad: list[Bad] = []
    doubtful: list[Place] = []
    while True:
        place = Place(reader.line_num + 1, "line")
        spanned.clear()
        try:
            values = next(reader, None)
        except csv.Error as error:
            if reader.line_num > place.number or not names:
                raise NotReadable(_open_quote(place.number, str(error))) from None
            bad.append(Bad(place, "quotes that do not match", f"quotes do not match ({error})"))
            continue
        if values is None:
            return names, rows, bad, doubtful
        if not values or (place.number == 1 and _names_the_sign(spanned[0], delimiter)):
            continue  # a blank line, or one for Excel alone
        if not names:
            names = values if header else [str(number) for number in range(len(values))]
            _check_names(names, delimiter, place)
            if header:
                continue
        problem = _csv_problem(values, names, delimiter, place, spanned)
        if problem is None:
            rows.append((place, dict(zip(names, values, strict=True))))
            doubtful += [place] if _like_rows(spanned, len(names), delimiter) == 1 else []
        else:
            bad.append(problem)


def _names_the_sign(line: str, delimiter: str) -> bool:
    """Whether a first line says sep=, as Excel reads it. Raises NotReadable where that is another sign."""
    found = re.fullmatch('"?sep=(.)"?\\s*', line)
    if found and found[1] != delimiter:
        raise NotReadable(
            f"says sep={found[1]} in line 1: separate its fields with {_SIGNS[delimiter]}"
        )
    return found is not None


def _open_quote(line: int, error: str) -> str:
    return (
        f"has a quote that is not closed where it should be, in the row that begins in line {line} ({error}): close "
        'it, and write a quote inside of a quoted field twice ("")'
    )


def _check_names(names: list[str], delimiter: str, place: Place) -> None:
    if len(names) == 1 and any(sign in names[0] for sign in {",", ";", "\t", "|"} - {delimiter}):
        signs = _SIGNS[delimiter]
        raise NotReadable(f"has the one column '{names[0][:80]}': separate its fields with {signs}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise NotReadable(
            f"names the column '{twice}' twice in {place}: give each a name of its own"
        )
    if _ESCAPED.search("".join(names)):
        raise NotReadable(
            f"is not valid UTF-8 in {place}, which names the columns: save it as UTF-8"
        )


def _csv_problem(
    values: list[str], names: list[str], delimiter: str, place: Place, lines: list[str]
) -> Bad | None:
    """What is wrong with a row's fields, None where nothing is. lines: as they stand in the file.

    Raises NotReadable for a quote that took in other rows, which nobody could count.
    """
    escaped = undecoded("".join(values), place)
    if escaped:
        return escaped
    alike = _like_rows(lines, len(names), delimiter)
    if len(values) != len(names):
        said = f"{_count(values, 'field')}, but {_count(names, 'column')}"
        if alike > 0.5 and len(lines) >= _SWALLOWED:
            raise NotReadable(_open_quote(place.number, said))
        said += (
            f": put a field that holds {_SIGNS[delimiter]} in quotes"
            if len(values) > len(names)
            else ""
        )
        return Bad(place, "wrong number of fields", said)
    if alike == 1 and len(lines) >= _SWALLOWED:
        said = "a field in quotes holds lines that look like rows: close the quote before them, or give JSON Lines"
        return Bad(place, "a quote closed too late", said)
    return None


def _count(items: list[str], what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


def _like_rows(lines: list[str], columns: int, delimiter: str) -> float:
    """Share of a row's lines that look like rows themselves: taken in, perhaps, by a quote that closes too late.

    0 for a row of one line, and where a row has one field.
    """
    if len(lines) < 2 or columns == 1:
        return 0.0
    return sum(line.count(delimiter) == columns - 1 for line in lines) / len(lines)


def undecoded(text: str, place: Place) -> Bad | None:
    """A malformed row where the text holds a byte that is not valid UTF-8."""
    found = _ESCAPED.search(text)
    if found is None:
        return None
    said = (
        f"the byte 0x{ord(found[0]) - 0xDC00:02x} is not valid UTF-8: save the file as UTF-8 (it "
        "may be Windows-1252)"
    )
    return Bad(place, "bytes that are not valid UTF-8", said)


class _Twice(dict[str, Any]):
    """A JSON object that has a key twice."""

    key = ""


class _Written(float):
    """A number with a point or an exponent that keeps its wording: 1.10 is a text that 1.1 is not."""

    def __new__(cls, text: str) -> _Written:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


class _Decoder:
    """JSON with its traps marked: keys that are there twice. NaN and Infinity become floats, looked at later."""

    def __init__(self) -> None:
        self._any = False
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=float, parse_float=_Written
        )

    def _object(self, pairs: list[tuple[str, Any]]) -> Row:
        value = dict(pairs)
        if len(value) == len(pairs):
            return value
        self._any, marked, seen = True, _Twice(value), set()
        marked.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return marked

    def decode(self, text: str, position: int = 0) -> tuple[Any, int]:
        """The value that begins there, and where it ends. JSONDecodeError, ValueError (a number), RecursionError."""
        return self._json.raw_decode(text, position)

    def problem(self, value: Any, place: Place) -> Bad | None:
        """What is wrong with a row as a JSON value."""
        if not isinstance(value, dict):
            kind = {"NoneType": "null", "str": "text", "list": "list"}.get(
                type(value).__name__, "number"
            )
            said = f"rows must hold objects with named values, and this one is a {kind}"
            return Bad(place, "not an object with named values", said)
        key = _key_twice(value) if self._any else None
        return (
            None
            if key is None
            else Bad(place, "a key twice", f"the key '{key[:40]}' appears twice")
        )


def _key_twice(value: Any) -> str | None:
    if isinstance(value, _Twice):
        return value.key
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((key for key in map(_key_twice, items) if key is not None), None)


def json_rows(text: str, lines: bool) -> tuple[Placed, list[Bad]]:
    """Rows of an array, of an object that holds one, of JSON Lines, or of objects one after another; malformed rows.

    lines: whether the name says JSON Lines. Then a line that is not JSON is a malformed row; a .json file is read so
    where its first line is a row. Raises NotReadable where the text as a whole is no JSON.
    """
    # no JSON string holds a line break as it is
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    decoder = _Decoder()
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        # Lines of something else, unless the first line alone is damaged
        return _by_line(text, decoder) if lines and "\n{" in text else _whole(text, decoder)
    if start == "{" and lines:
        found = _by_line(text, decoder)
        return (
            (_or_none(_whole, text) or found)
            if found[1] and not _parses(text.lstrip().partition("\n")[0])
            else found
        )
    try:
        return _whole(text, decoder)
    except NotReadable:
        first, _, more = text.strip().partition("\n")
        if more and _parses(first):
            return _by_line(text, decoder)
        raise


def _or_none(
    read: Callable[[str, _Decoder], tuple[Placed, list[Bad]]], text: str
) -> tuple[Placed, list[Bad]] | None:
    try:
        return read(text, _Decoder())
    except NotReadable:
        return None


def _parses(line: str) -> bool:
    try:
        return isinstance(json.loads(line.rstrip().removesuffix(",")), dict)
    except (ValueError, RecursionError):
        return False


def _by_line(text: str, decoder: _Decoder) -> tuple[Placed, list[Bad]]:
    rows: Placed = []
    bad: list[Bad] = []
    # splitlines would split at U+2028 inside of texts, too
    for number, line in enumerate(text.split("\n"), 1):
        line, place = line.strip().removesuffix(","), Place(number, "line")
        if not line:
            continue
        problem = undecoded(line, place)
        if problem is None:
            try:
                value, end = decoder.decode(line)
                if line[end:].strip():
                    raise json.JSONDecodeError("Extra data", line, end)
                problem = decoder.problem(value, place)
            except (ValueError, RecursionError) as error:
                problem = Bad(
                    place, "no valid JSON", f"the line is not valid JSON ({_json_error(error)})"
                )
        if problem is None:
            rows.append((place, value))
        else:
            bad.append(problem)
    if len(rows) == 1:
        _check_columns_of_values(rows[0][1])
    return rows, bad


def _json_error(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "too deeply nested" if isinstance(error, RecursionError) else "a number that is too long"


def _whole(text: str, decoder: _Decoder) -> tuple[Placed, list[Bad]]:
    """The text as JSON values one after another; one alone may be an array of rows, or hold one."""
    escaped = _ESCAPED.search(text)
    if escaped:
        line = text.count("\n", 0, escaped.start()) + 1
        byte = ord(escaped[0]) - 0xDC00
        raise NotReadable(
            f"is not valid UTF-8 in line {line} (byte 0x{byte:02x}): save it as UTF-8 (it may be Windows-1252)"
        )
    values = _values(text, decoder)
    if len(values) == 1:
        values = [(Place(number), row) for number, row in enumerate(_unwrapped(values[0][1]), 1)]
    problems = [(decoder.problem(value, place), place, value) for place, value in values]
    good = [(place, value) for problem, place, value in problems if problem is None]
    return good, [problem for problem, _, _ in problems if problem is not None]


def _values(text: str, decoder: _Decoder) -> list[tuple[Place, Any]]:
    values, position, line, counted = [], 0, 1, 0
    while (position := _skip_space(text, position)) < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.decode(text, position)
        except json.JSONDecodeError as error:
            cut = error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg
            hint = "the file seems cut short" if cut else "check the file"
            at = f"line {error.lineno}, column {error.colno} ({error.msg})"
            raise NotReadable(f"is not valid JSON at {at}: {hint}") from None
        except (ValueError, RecursionError) as error:
            raise NotReadable(
                f"is not valid JSON after line {line} ({_json_error(error)}): check the file"
            ) from None
        values.append((Place(line, "line"), value))
    return values


def _unwrapped(value: Any) -> list[Any]:
    """The rows of a single JSON value: an array's items, the one list of objects that an object holds, or itself."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    _check_columns_of_values(value)
    lists = {
        key: items
        for key, items in value.items()
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items)
    }
    if (
        not lists
        or any(key in _LISTS_OF_A_ROW for key in lists)
        or any(key in _TEXTS_OF_A_ROW for key in value)
    ):
        return [value]
    if len(lists) > 1:
        names = ", ".join(f"'{key}'" for key in lists)
        raise NotReadable(
            f"holds several lists of rows ({names}): put the one that is meant into a file of its own"
        )
    if isinstance(value, _Twice):
        raise NotReadable(f"has the key '{value.key}' twice: leave one of them")
    return next(iter(lists.values()))


def _check_columns_of_values(value: Row) -> None:
    """Raises NotReadable for what pandas' to_json() writes unless it is told otherwise: columns, not rows."""
    numbered = all(isinstance(inner, dict) and "0" in inner for inner in value.values()) and value
    if numbered or {"columns", "index", "data"} <= value.keys():
        raise NotReadable(
            "holds columns instead of rows, as pandas' to_json(path) writes them: write it with "
            "to_json(path, orient='records', lines=True)"
        )


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n,":
        position += 1
    return position
