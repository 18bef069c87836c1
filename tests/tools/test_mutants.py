"""The planted faults still apply, and docs/correctness.md shows these faults and these cases.

`make mutants` plants them.
"""

import pytest

from tests.distributed.cases import matrix_cases
from tests.distributed.table import DOCUMENT, factors
from tests.tools.mutants import ROOT, applied
from tests.tools.mutants_list import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_applies_to_the_source_as_it_is(mutant):
    changed = applied(mutant, ROOT)
    assert changed and all(path.read_text() != text for path, text in changed.items())
    for path, text in changed.items():
        compile(text, str(path), "exec")  # a fault must fail a test, not the import


def test_names_tell_faults_apart():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_fault_whose_text_is_gone_says_so(tmp_path):
    mutant = MUTANTS[0]
    for file, _, _ in mutant.edits:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("# rewritten\n")
    with pytest.raises(ValueError, match=f"'{mutant.name}' no longer applies"):
        applied(mutant, tmp_path)


def test_the_document_shows_the_present_cases_and_faults():
    text = DOCUMENT.read_text()
    assert [str(case) for case in matrix_cases() if f"| {factors(case)} |" not in text] == []
    assert [mutant.name for mutant in MUTANTS if f"| {mutant.name} |" not in text] == []
    shown = text.partition("| fault |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(shown) == len(MUTANTS), "and no others"
