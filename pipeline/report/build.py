"""The report page: one HTML file with its pictures inside.

sap report launch/recipes/demo.yaml
"""

from __future__ import annotations

import base64
import html
from pathlib import Path

import yaml

from pipeline import artifacts
from pipeline.report.collect import Collected
from pipeline.report.differences import HEADER as COMPARED
from pipeline.report.differences import difference_rows
from pipeline.report.figures import draw_all
from pipeline.report.table import BY_FORM, HEADER, UNDER_ATTACK, attack_rows, form_rows, table_rows
from pipeline.system.tables import as_html, as_markdown, as_text

_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1c2430;max-width:62rem;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem}
table{border-collapse:collapse;width:100%;font-size:.93rem}\
th,td{text-align:left;padding:.45rem .7rem;border-bottom:1px solid #dde2e8}
th{border-bottom:2px solid #8894a3;font-weight:600}td{font-variant-numeric:tabular-nums}
figure{margin:1.4rem 0}img{max-width:100%}figcaption{color:#55606e;font-size:.9rem;max-width:46rem}
pre{background:#f4f6f8;padding:1rem;overflow:auto;font-size:.82rem}\
.note{background:#fff8e6;border-left:4px solid #d9a400;padding:.7rem 1rem}
details{margin:.8rem 0}summary{cursor:pointer}
"""


_SILENT = 0.2  # share of empty or incoherent answers beyond which the table says so
_JUDGED = {
    "refusal": "do not begin as a refusal (judge: refusal, which reads how the first sentences begin)",
    "gcg_keyword": "hold no refusal phrase in the first 200 characters (judge: gcg_keyword)",
}
_COMPARED_TITLE = (
    "<h2>Differences</h2><p>Method minus reference, over the same prompts and seeds; 95% "
    "intervals: the wider of a bootstrap over seeds and prompts and of "
    "a score interval over prompts. A star: the interval leaves out 0. For non-refusal, below 0 is safer.</p>"
)


_TABLES = {
    "table": (HEADER, table_rows, ""),
    "forms": (
        BY_FORM, form_rows,
        ("<h2>By the form of the prompt</h2><p>A model that refuses one form and answers the other "
        "has learned the form.</p>"),
    ),
    "attacks": (
        UNDER_ATTACK, attack_rows,
        ("<h2>Under attack</h2><p>Told apart: harmless prompts answered less harmful ones. A model "
        "that refuses everything under a template is not robust.</p>"),
    ),
    "differences": (
        COMPARED, lambda collected: difference_rows(collected.outcomes, collected.references), _COMPARED_TITLE,
    ),
}  # fmt: skip


def build_report(collected: Collected, folder: Path) -> None:
    """Write report.html, {table,forms,attacks,differences}.{txt,md,json} as far as there is something in them,
    and figures/*.png below `folder`.
    """
    tables = ""
    for name, (header, make, title) in _TABLES.items():
        rows = make(collected)
        if rows:
            (folder / f"{name}.txt").write_text(as_text(rows, header))
            (folder / f"{name}.md").write_text(as_markdown(rows, header))
            artifacts.write_json(
                folder / f"{name}.json", [dict(zip(header, row, strict=True)) for row in rows]
            )
            tables += title + as_html(rows, header)
    with (folder / "table.txt").open("a") as stream:
        stream.writelines(f"note: {sentence}\n" for sentence in silent(collected))
    figures = draw_all(collected, folder / "figures")
    for methods, picture in collected.filter_pictures:
        figures.append(
            (
                picture,
                (
                    f"What the filter of {methods} sees: scores of the training samples, the "
                    "threshold, and who was labelled what."
                ),
            )
        )
    (folder / "report.html").write_text(_page(collected, tables, figures))


def silent(collected: Collected) -> list[str]:
    """A sentence for every method that mostly says nothing to harmful prompts:
    the table shows no more of it than that it is safe.
    """
    shares = {
        method.name: max(
            method.measures[key]["value"] or 0 for key in ("empty_rate", "incoherent_rate")
        )
        for method in collected.methods
    }
    return [
        (f"{name}: {share:.0%} of its answers to harmful prompts are empty or incoherent, so its "
        "safety is that of a model that says nothing")
        for name, share in shares.items() if share > _SILENT
    ]  # fmt: skip


def what_is_measured(collected: Collected) -> str:
    """The sentence that keeps a reader from taking openings for harm."""
    prompts = (
        collected.methods[0].measures["non_refusal_rate"]["n"]
        if len(collected.methods[0].seeds) < 2
        else "the"
    )
    judge = _JUDGED[collected.resolved.get("evaluate", {}).get("judge", "refusal")]
    split = (
        ""
        if collected.split == "test"
        else " These are validation prompts, used to choose settings; they are not a result."
    )
    return (
        f"Harmful answered is the share of answers to {prompts} harmful prompts that {judge}. It "
        "measures openings, not harm: a small model that does not refuse often has nothing "
        "harmful to say either. Look-alikes are harmless prompts that look harmful, ordinary "
        "instructions have nothing of it. Intervals are 95%: Wilson over prompts for one seed; "
        f"for several the wider of Student over seeds and Wilson.{split}"
    )


def _page(collected: Collected, tables: str, figures: list[tuple[Path, str]]) -> str:
    def dump(value: object) -> str:
        return html.escape(yaml.safe_dump(value, sort_keys=False))

    pictures = "".join(
        f'<figure><img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for path, caption in figures
    )
    rates = "".join(
        f"<li>{html.escape(m.name)}: empty {m.measures['empty_rate']['value']:.2f}, incoherent "
        f"{m.measures['incoherent_rate']['value']:.2f}, unparseable "
        f"{m.measures['unparseable_rate']['value']:.2f}</li>"
        for m in collected.methods
    )
    budgets = "".join(
        f"<li>{html.escape(m.name)}: {m.pairs_drawn}</li>"
        for m in collected.methods
        if m.pairs_drawn is not None
    )
    filters = "".join(
        f"<details><summary>{html.escape(name)}</summary><pre>{dump(facts)}</pre></details>"
        for name, facts in collected.filters.items()
    )
    answers = "".join(
        f"<li><code>{html.escape(str(path.resolve()))}</code></li>" for path in collected.answers
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(collected.name)}: safety and usefulness after \
fine-tuning</title><style>{_STYLE}</style>
<h1>{html.escape(collected.name)}: safety and usefulness after fine-tuning</h1>
<p class="note">{html.escape(what_is_measured(collected))}</p>
{tables}
<h2>Safety data</h2><p>Safety pairs drawn in one training, every time counted (the direction stage's \
included, where training starts from it):</p><ul>{budgets}</ul>
{"<h2>Filters</h2>" + filters if filters else ""}
<h2>Pictures</h2>{pictures}
<h2>Answers</h2><p>Empty and incoherent answers to the harmful prompts, counted apart (an empty one is neither a \
refusal nor an answer; unparseable, of all prompts: in a language that the judge does not know):</p><ul>{rates}</ul>
<p>Every answer, with its judgement, is on this machine only:</p><ul>{answers}</ul>
<h2>How it was made</h2>
<p>Revision {html.escape(str(collected.git_revision))}; \
{html.escape(", ".join(f"{k} {v}" for k, v in collected.versions.items()))}.</p>
<details><summary>Data: sizes, overlaps removed</summary><pre>{dump(collected.data_facts)}</pre></details>
<details><summary>Recipe, resolved</summary><pre>{dump(collected.resolved)}</pre></details>
</html>
"""
