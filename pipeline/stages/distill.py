"""The model's own answers to harmless prompts: licence-clean data that keep an aligned model helpful.

rows = complete_answers(lambda: model, chat, rows, recipe, Path("work/answers"))
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch.distributed as dist
from transformers import PreTrainedModel

from pipeline import artifacts
from pipeline.data.chat import Chat
from pipeline.data.rows import tools_of
from pipeline.engines.exchange import from_first, of_every_rank
from pipeline.generation.generation import generate
from pipeline.judges.refusal import refusal_in
from pipeline.recipe.recipe import Recipe

Row = dict[str, Any]
ANSWERED = "answered.parquet"


def complete_answers(
    open_model: Callable[[], PreTrainedModel],
    chat: Chat,
    rows: Sequence[Row],
    recipe: Recipe,
    folder: Path,
) -> list[Row]:
    """Rows whose response is None get the model's greedy answer, cut at its last whole sentence.

    Rows that it leaves empty are dropped, and so are those that it refuses:
    they would teach to refuse what is harmless.

    Ranks share the work and all return the same rows, input_ids and labels filled in. They are published as `folder`,
    and read back where it is sound: a resumed run trains on what the first one did. open_model is called where answers
    have to be generated.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # rank 0 decides: a rank alone in the collective below would hang
    if from_first(rank == 0 and _sound(folder)):
        return pyarrow.parquet.read_table(folder / ANSWERED).to_pylist()
    missing = [index for index, row in enumerate(rows) if row["response"] is None]
    if rank == 0 and missing:
        print(
            f"[align] the model answers {len(missing)} harmless prompts itself",
            file=sys.stderr,
            flush=True,
        )
    mine = missing[rank::world_size]
    prompts = [
        chat.prompt_ids(json.loads(rows[index]["messages"]), tools_of(rows[index]))
        for index in mine
    ]
    texts = (
        generate(
            open_model(),
            chat.tokenizer,
            prompts,
            recipe.align.distill_tokens,
            batch_size=32,
            stops=chat.template.stops,
        )
        if mine
        else []
    )
    answers = {
        index: text
        for part in of_every_rank(list(zip(mine, texts, strict=True)))
        for index, text in part
    }
    completed = [
        done
        for index, row in enumerate(rows)
        if (done := _completed(chat, row, answers.get(index), recipe.data.max_length)) is not None
    ]
    if rank == 0 and len(completed) < len(rows):
        print(
            f"[align] {len(rows) - len(completed)} of them left out: the model said nothing, or refused",
            file=sys.stderr,
            flush=True,
        )
    if rank == 0:
        with artifacts.building(folder, {}) as temporary:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(completed), temporary / ANSWERED)
    return completed


def _sound(folder: Path) -> bool:
    """Whether the answers are there as they were written; damaged ones are removed, and it is said."""
    if not artifacts.complete(folder):
        return False
    found = artifacts.damage(folder)
    if found:
        print(
            f"[align] the model's own answers are damaged and will be made again: {found}",
            file=sys.stderr,
            flush=True,
        )
        shutil.rmtree(folder)
    return not found


def _completed(chat: Chat, row: Row, answer: str | None, max_length: int) -> Row | None:
    """The row with the model's answer; as it is where it had one; None where nothing is left to learn."""
    if answer is None:
        return row
    text = whole_sentences(answer)
    if refusal_in(row["prompt"], text) is not None:
        return None
    given = row.get("given") or ""
    messages = [
        *json.loads(row["messages"]),
        {"role": "assistant", "content": f"{given} {text}".lstrip()},
    ]
    found = (
        chat.encode(messages, max_length, last_turn_only=True, given=given, tools=tools_of(row))
        if text
        else []
    )
    return (
        {**row, "response": text, "input_ids": found[0].input_ids, "labels": found[0].labels}
        if found
        else None
    )


def whole_sentences(text: str) -> str:
    """The text up to its last sentence end; unchanged where it has none."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]
    return text[: ends[-1]].strip() if ends else text.strip()
