"""Every equivalence case ends at the single process's weights:
`make matrix`, or `make matrix FULL=1` for the full product.

Not collected by `make test`, which has a limit of time. A case that did not run has no result, which is a failure.
"""

import os
from pathlib import Path

import pytest

from tests.distributed.cases import Case, all_cases, matrix_cases
from tests.distributed.matrix import AGES, BOUND, CONTROL_BOUND, MAX_NORM, Results, measure
from tests.tiny import LAYERS

pytestmark = pytest.mark.timeout(0)  # the first test waits for all cases

LOGGED_BOUND = 1e-4
# of a rank's process; anything else is no check of ours
ERRORS = {"ValueError": ValueError, "AssertionError": AssertionError}
FULL = os.environ.get("FULL", "") not in ("", "0")


@pytest.fixture(scope="session")
def measured(request, tmp_path_factory) -> Results:
    """Results of the selected cases; kept where EQUIVALENCE_RESULTS says, for tests.distributed.table."""
    folder = Path(os.environ.get("EQUIVALENCE_RESULTS") or tmp_path_factory.mktemp("equivalence"))
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("results-*.jsonl"):
        old.unlink()
    return measure(
        [
            item.callspec.params["case"]
            for item in request.session.items
            if "measured" in item.fixturenames
        ],
        folder,
    )


@pytest.mark.parametrize("case", all_cases() if FULL else matrix_cases(), ids=str)
def test_case(measured: Results, case: Case):
    found = measured.get(str(case))
    assert found is not None, "the case did not run"
    if "error" in found:
        raise ERRORS.get(found["error"], RuntimeError)(found["message"])
    assert found["control"] > CONTROL_BOUND, "leaving SAP out must show, or the case shows nothing"
    assert found["difference"] < BOUND[case.adapter]
    assert found["logged"] < LOGGED_BOUND, (
        "loss, gradient norm or direction norm: AdamW would hide a wrong factor"
    )
    assert found["ages"] == AGES[case.schedule]
    assert not case.clipping or min(found["norms"]) > 2 * MAX_NORM, (
        "the gradient must be clipped at every step"
    )
    by_layer = case.adapter != "lora" or case.offload_param
    root = case.engine == "fsdp2"  # FSDP2's own group of what is in no layer
    layers = LAYERS if by_layer else 1 - root
    assert case.engine == "single" or found["groups"] == layers + root
    assert case.engine == "single" or found["uneven"] > 0, "the sizes must not divide by the ranks"
