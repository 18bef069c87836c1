"""Local files and folders of data, read into rows, each with where it stands.

    table = read(Path("data.csv.gz"))
    table.rows     # [(Place(2, "line"), {"question": "a", "reply": "b"}), ...]
    table.bad      # malformed rows, with the reason
    table.format   # "CSV, gzip, UTF-8"

Formats by the ending, .csv, .tsv, .json and .jsonl also with .gz behind it. The first bytes count more than the name
where they leave no doubt: gzip, Parquet, Arrow and byte order marks. A folder holds files of one format, or is what
`datasets` wrote with save_to_disk. Nothing is unpickled.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.data.malformed import Bad, Place
from pipeline.data.text_rows import NotReadable, Placed, csv_rows, json_rows
from pipeline.recipe.file_endings import ENDINGS, SUFFIXES, suffix
from pipeline.system.system_errors import naming

_NAMES = {".csv": "CSV", ".tsv": "TSV", ".json": "JSON", ".jsonl": "JSON Lines"}
_GZIP = b"\x1f\x8b"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
}
# In this order: the mark of UTF-16 is how that of UTF-32 begins
_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# Data that is not read as it is: in a folder of data it would be left out unsaid.
_NEARLY = frozenset(
    (
        ".ndjson",
        ".zst",
        ".zip",
        ".xz",
        ".bz2",
        ".7z",
        ".feather",
        ".orc",
        ".xlsx",
        ".xls",
        ".pkl",
        ".txt",
    )
)
# how a file of a hub data set begins
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?![a-z0-9])", re.I)


@dataclass(frozen=True)
class Table:
    """What a file or folder holds: its format in words, column names, rows with their places, and malformed rows.

    labels: column -> names of the classes that its numbers stand for (`datasets`' ClassLabel). doubtful: places of rows
    that may be several (text_rows.csv_rows).
    """

    format: str
    columns: list[str]
    rows: Placed
    bad: list[Bad] = field(default_factory=list)
    labels: dict[str, list[str]] = field(default_factory=dict)
    doubtful: list[Place] = field(default_factory=list)


def parts(path: Path, split: str = "train") -> list[Path]:
    """The files to read of a file or folder, in their order.

    split: of a folder that holds several splits, the one to read. Raises NotReadable for a folder that is no data set.
    """
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file():  # save_to_disk of several splits
        splits = _metadata(path / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise NotReadable(
                f"holds the splits {', '.join(map(str, splits))} and no '{split}': set split to one of them"
            )
        path = path / split
    if (path / "state.json").is_file():  # save_to_disk: it says which files, and in which order
        named = [
            path / str(item.get("filename"))
            for item in _metadata(path / "state.json").get("_data_files", [])
        ]
        missing = next((file for file in named if not file.is_file()), None)
        if missing:
            raise NotReadable(
                f"names {missing.name} in its state.json and does not hold it: copy the whole folder"
            )
        return named
    return _of_split(_data_files(path), split)


def _metadata(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NotReadable(
            f"has a {path.name} that is not JSON ({type(error).__name__}): copy the whole folder again"
        ) from None
    return found if isinstance(found, dict) else {}


def _data_files(folder: Path) -> list[Path]:
    shown = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "_"))]
    files = [
        path
        for path in shown
        if path.is_file() and suffix(path) and path.name != "dataset_info.json"
    ]
    kinds = sorted({suffix(path) for path in files})
    if len(kinds) > 1:
        raise NotReadable(
            f"holds {' and '.join(kinds)} files: leave files of one format in it, or name one of them"
        )
    if not files:
        folders = [path.name for path in shown if path.is_dir()]
        hint = (
            f"name one of its folders ({', '.join(folders[:5])})"
            if folders
            else f"give one with {ENDINGS} files"
        )
        raise NotReadable(f"is a folder without a data file: {hint}")
    others = [path.name for path in shown if path not in files and _is_data(path)]
    if others:
        raise NotReadable(
            f"holds {', '.join(others[:5])} beside its {kinds[0]} files, which would not be read: "
            "unpack or rename what belongs to the data, and move away the rest"
        )
    return files


def _is_data(path: Path) -> bool:
    """Whether a file that is not read, or a folder, looks as if it held data."""
    if path.is_dir():
        return any(
            suffix(inner) or inner.suffix.lower() in _NEARLY
            for inner in path.iterdir()
            if inner.is_file()
        )
    return path.suffix.lower() in _NEARLY


def _of_split(files: list[Path], split: str) -> list[Path]:
    """Of files named train-00000.parquet, test-00000.parquet and so on those of the split; else all."""
    names = {path: _SPLIT.match(path.name) for path in files}
    found = sorted({match[1].lower() for match in names.values() if match})
    one = len(found) < 2 and (not found or None not in names.values())
    # train is what a recipe says that says nothing
    if one and (not found or split in ("train", *found)):
        return files
    mine = [path for path, match in names.items() if match and match[1].lower() == split]
    if None in names.values() or not mine:
        raise NotReadable(
            f"holds files of the splits {', '.join(found)}{' and others' if None in names.values() else ''}: "
            "set split to one of them, or name a folder or file with those that are meant"
        )
    return mine


def unpacked_bytes(path: Path, split: str = "train") -> int:
    """About how many bytes of data a file or folder holds once unpacked. Raises as `parts`."""
    return sum(_unpacked_bytes(file) for file in parts(path, split))


def _unpacked_bytes(path: Path) -> int:
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(2) == _GZIP and size >= 4:
            stream.seek(-4, 2)  # gzip ends with the size of what it holds
            return max(size, int.from_bytes(stream.read(4), "little"))
    return size


def read(path: Path, header: bool = True, split: str = "train") -> Table:
    """All rows of a file or folder. header: whether the first line of CSV and TSV names the columns.

    Raises NotReadable (a ValueError of half a sentence, which follows the path) for what cannot be read as a whole.
    """
    files = parts(path, split)
    tables = []
    for file in files:
        with naming(file):
            tables.append(_read_file(file, header))
    if not path.is_dir():
        return tables[0]
    other = next(
        (
            file
            for file, table in zip(files, tables, strict=True)
            if table.labels != tables[0].labels
        ),
        None,
    )
    if other:  # one number would be two classes
        raise NotReadable(
            f"has other classes in {other.name} than in {files[0].name}: name one of them, or write texts"
        )
    named = [(file.name, table) for file, table in zip(files, tables, strict=True)]
    return Table(
        f"folder of {len(files)} files, {tables[0].format}" if tables else "empty folder",
        list(dict.fromkeys(name for table in tables for name in table.columns)),
        [(replace(place, part=name), row) for name, table in named for place, row in table.rows],
        [
            replace(bad, place=replace(bad.place, part=name))
            for name, table in named
            for bad in table.bad
        ],
        tables[0].labels if tables else {},
        [replace(place, part=name) for name, table in named for place in table.doubtful],
    )


def _read_file(path: Path, header: bool) -> Table:
    kind = suffix(path)
    with path.open("rb") as stream:
        head = stream.read(64)
    _check_foreign(head)
    if head.startswith(b"PAR1") or kind == ".parquet":
        return _parquet(path, head)
    if head.startswith(b"ARROW1") or kind == ".arrow":
        return _arrow(path, head)
    data, packed = path.read_bytes(), head.startswith(_GZIP)
    if packed:
        data = _unzipped(data)
        _check_foreign(data[:64])
    text, encoding = decoded(data)
    name = ", ".join((_NAMES[kind], *(["gzip"] if packed else []), encoding))
    if kind in (".csv", ".tsv"):
        columns, rows, bad, doubtful = csv_rows(text, "\t" if kind == ".tsv" else ",", header)
        return Table(name, columns, rows, bad, doubtful=doubtful)
    rows, bad = json_rows(text, lines=kind == ".jsonl")
    return Table(name, columns_of(rows), rows, bad)


def columns_of(rows: Placed) -> list[str]:
    """Names of every row's values, in the order in which they first appear."""
    return list(dict.fromkeys(name for _, row in rows for name in row))


def _check_foreign(head: bytes) -> None:
    what = next((said for mark, said in _FOREIGN.items() if head.startswith(mark)), None)
    if what:
        raise NotReadable(f"is {what}: unpack it, or export it as one of {', '.join(SUFFIXES)}")
    if head.startswith(b"version https://git-lfs"):
        raise NotReadable("is a pointer of Git LFS and not the data: run git lfs pull")


def _unzipped(data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except EOFError:
        raise NotReadable("is a gzip file that is cut short: copy or download it again") from None
    except (OSError, zlib.error) as error:
        raise NotReadable(
            f"is a damaged gzip file ({_first(error)}): copy or download it again"
        ) from None


def decoded(data: bytes) -> tuple[str, str]:
    """The text of a file, and its encoding in words: what a byte order mark says, or UTF-8.

    Bytes that are no UTF-8 stay as `surrogateescape` leaves them, so that they are found with their line. Raises
    NotReadable for damaged UTF-16 or UTF-32, and for UTF-16 without a mark.
    """
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    if not mark and len(data) > 1 and data[:2].count(0) == 1:
        raise NotReadable("seems to be UTF-16 without a byte order mark: save it as UTF-8")
    codec = _MARKS.get(mark, "utf-8")
    said = codec.upper().removesuffix("-SIG") + (" by its byte order mark" if mark else "")
    try:
        return data.decode(codec), said
    except UnicodeDecodeError as error:
        if codec.startswith("utf-8"):
            return data.decode(codec, errors="surrogateescape"), "UTF-8 with other bytes in it"
        line = data[: error.start].decode(codec, errors="ignore").count("\n") + 1
        raise NotReadable(
            f"is damaged {codec.upper()} in line {line} ({error.reason}): save it as UTF-8"
        ) from None


def _parquet(path: Path, head: bytes) -> Table:
    import pyarrow
    import pyarrow.parquet

    if not head.startswith(b"PAR1"):
        raise NotReadable(
            "is not a Parquet file, though its name ends so: give it the ending of what it is"
        )
    try:
        # read_table would make columns of folders named a=b
        with pyarrow.parquet.ParquetFile(path) as file:
            table = _whole(file.read())
    except (pyarrow.ArrowException, OSError) as error:
        raise _cannot_be_read(error, "Parquet") from None
    return _of_arrow(table, "Parquet")


def _arrow(path: Path, head: bytes) -> Table:
    import pyarrow

    is_file = head.startswith(b"ARROW1")  # else a stream, as `datasets` writes
    try:
        with pyarrow.OSFile(str(path)) as stream:
            opened = pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)
            table = _whole(opened.read_all())
    except (pyarrow.ArrowException, OSError) as error:
        raise _cannot_be_read(error, "Arrow") from None
    return _of_arrow(table, f"Arrow {'file' if is_file else 'stream'}")


def _whole(table: Any) -> Any:
    """The table, after a look at every offset in it: damaged ones would end the process. ArrowException for those."""
    import pyarrow

    try:
        table.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):  # texts are looked at row by row
            raise
        table.validate()
    return table


def _cannot_be_read(error: Exception, kind: str) -> Exception:
    """A sentence where the file is at fault; errors of the system, which have a number, pass."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return NotReadable(
        f"cannot be read as {kind} ({_first(error)}): it may be cut short, so copy or write it again"
    )


def _first(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.replace(". ", ", ").rstrip(".")[:200]


def _of_arrow(table: Any, format: str) -> Table:
    names = table.column_names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise NotReadable(f"names the column '{twice}' twice: give each a name of its own")
    bad: list[Bad] = []
    try:
        values = list(enumerate(table.to_pylist(), 1))
    except UnicodeDecodeError:  # of a text column with other bytes in it: told row by row
        values = []
        for number in range(1, table.num_rows + 1):
            try:
                values += [(number, row) for row in table.slice(number - 1, 1).to_pylist()]
            except UnicodeDecodeError as error:
                said = (
                    f"a text holds the byte 0x{error.object[error.start]:02x}, which is not valid "
                    "UTF-8: write it as UTF-8"
                )
                bad.append(Bad(Place(number), "bytes that are not valid UTF-8", said))
    except (ValueError, OverflowError) as error:  # a date that Python does not know
        raise NotReadable(
            f"holds a value that cannot be read ({_first(error)}): leave its column out"
        ) from None
    rows = [(Place(number), without_fillers(row)) for number, row in values]
    return Table(format, names, rows, bad, _labels(table.schema.metadata or {}))


def _labels(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Names of the classes, by column, from what `datasets` keeps in a schema."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found = {
            name: feature
            for name, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
        return {name: [str(label) for label in feature["names"]] for name, feature in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        # none, or of a kind that is not known here
        return {}


def without_fillers(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls with which Arrow fills the keys of a struct that other rows have.

    A call's arguments, or a tool's schema, would be trained with them. A null that was meant cannot be told from those.
    """
    return {name: _filled(value) for name, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _filled(inner) for name, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value
