"""The doctor passes a healthy engine and fails each broken one at the check that is there for it."""

import contextlib
import json
import math
import re

import pytest
import torch

from pipeline.cli import main
from pipeline.defences import recipes
from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.section import SapSection
from pipeline.doctor.case import choose_cell
from pipeline.doctor.checks import diagnose
from pipeline.doctor.measure import central_slope
from pipeline.doctor.report import FAIL, OK, WARN, Finding, Report, graded
from pipeline.doctor.resources import Meter, held_weights
from pipeline.engines.single import SingleEngine
from pipeline.model.models import decoder_layers
from pipeline.objectives.batches import PairBatch
from pipeline.objectives.losses import useful_loss
from tests.project import make_project, run, sap, write_recipe
from tests.tiny import HIDDEN, StepBatches, tiny_lora

pytestmark = [pytest.mark.processes, pytest.mark.slow]


class Unseen(SingleEngine):
    """What DeepSpeed #5667 is: passes go on with gathered copies of the unperturbed weights."""

    @contextlib.contextmanager
    def perturbed(self, direction, scale):
        yield


class HalfSeen(SingleEngine):
    """Every other weight's copy is stale."""

    def perturbed(self, direction, scale):
        return super().perturbed([d * (i % 2) for i, d in enumerate(direction)], scale)


class Backwards(SingleEngine):
    def perturbed(self, direction, scale):
        return super().perturbed(direction, -scale)


class NotRestored(SingleEngine):
    @contextlib.contextmanager
    def perturbed(self, direction, scale):
        with torch.no_grad():
            for p, d in zip(self.parameters, direction, strict=True):
                p.add_(d.view_as(p), alpha=scale)
        yield


class MasterRestored(NotRestored):
    """The optimizer's weights are back, the copies that passes compute with are not."""

    def weights(self):
        self.master = getattr(self, "master", None) or super().weights()
        return self.master


class RestoredWithoutFinally(SingleEngine):
    @contextlib.contextmanager
    def perturbed(self, direction, scale):
        stash = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, d in zip(self.parameters, direction, strict=True):
                p.add_(d.view_as(p), alpha=scale)
        yield
        with torch.no_grad():
            for p, saved in zip(self.parameters, stash, strict=True):
                p.copy_(saved)


class LeavesGradient(SingleEngine):
    def gradient(self, loss_fn, batches):
        return self._backward(loss_fn, batches), self.accumulated_gradient()


class LeaksIntoMainPass(SingleEngine):
    """What a stale accumulation buffer does: an auxiliary pass's gradient is added to the step's."""

    leaked = None

    def gradient(self, loss_fn, batches):
        loss, self.leaked = super().gradient(loss_fn, batches)
        return loss, self.leaked

    def forward_backward(self, loss_fn, batches, v=()):
        result = super().forward_backward(loss_fn, batches, v)
        for p, leaked in zip(self.parameters, self.leaked or [], strict=False):
            p.grad += leaked.view_as(p)
        return result


class HalfGradient(SingleEngine):
    """DeepSpeed's mean over two ranks, taken for a sum."""

    def gradient(self, loss_fn, batches):
        loss, shard = super().gradient(loss_fn, batches)
        return loss, [0.5 * part for part in shard]


class FlippedDirection(SingleEngine):
    def gradient(self, loss_fn, batches):
        loss, shard = super().gradient(loss_fn, batches)
        return loss, [-part for part in shard] if isinstance(batches[0], PairBatch) else shard


class ProbeTwice(SingleEngine):
    def probe_gradient(self, loss_fn, batches, v):
        loss, gradient = super().probe_gradient(loss_fn, batches, v)
        return loss, 2 * gradient


class ProbeFlipped(SingleEngine):
    def probe_gradient(self, loss_fn, batches, v):
        loss, gradient = super().probe_gradient(loss_fn, batches, v)
        return loss, -gradient


class ProbeBackwards(SingleEngine):
    """Probe passes inside a perturbation see W - dW: right at W, right losses, and V has the wrong sign."""

    inside = None

    @contextlib.contextmanager
    def perturbed(self, direction, scale):
        with super().perturbed(direction, scale):
            self.inside = (direction, scale)
            try:
                yield
            finally:
                self.inside = None

    def probe_gradient(self, loss_fn, batches, v):
        if self.inside is None:
            return super().probe_gradient(loss_fn, batches, v)
        direction, scale = self.inside
        with super().perturbed(direction, -2 * scale):
            return super().probe_gradient(loss_fn, batches, v)


class Raises(SingleEngine):
    def probe_gradient(self, loss_fn, batches, v):
        raise RuntimeError("no gradient\nand a second line")


BROKEN = {
    Unseen: [
        "useful loss along its gradient", "safety loss along its gradient", "useful loss at W + dW (sap.eps)",
        "probe at eps 0.05 (sap.eps)",
    ],
    HalfSeen: ["useful loss along its gradient", "safety loss along its gradient"],
    Backwards: ["useful loss along its gradient", "cosine of correction and g_s"],
    NotRestored: ["traces of perturbed probe gradient", "weights after perturbed", "loss after perturbed"],
    MasterRestored: ["loss after perturbed", "loss after an exception inside"],
    RestoredWithoutFinally: ["weights after an exception inside", "loss after an exception inside"],
    LeavesGradient: ["traces of gradient", "traces"],
    LeaksIntoMainPass: ["main pass: gradient"],
    HalfGradient: ["useful loss along its gradient", "safety loss along its gradient"],
    FlippedDirection: ["safety loss along its gradient"],
    ProbeTwice: ["loss along the probe gradient", "main pass: probe gradient"],
    ProbeFlipped: ["loss along the probe gradient", "main pass: probe gradient"],
    ProbeBackwards: ["cosine of correction and g_s", "<correction, g_s> over first order"],
    Raises: ["traces"],
}  # fmt: skip


def examine(
    kind: type[SingleEngine], section: SapSection | None = None, dtype: torch.dtype = torch.float32
) -> Report:
    model = tiny_lora(dtype)
    engine = kind(
        model,
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False),
        max_grad_norm=1.0,
    )
    batches = StepBatches()
    for number in range(3):
        SingleEngine.forward_backward(engine, useful_loss, batches.useful(number))
        engine.step(1e-2)
    probe = Probe(decoder_layers(model), [1, 2], HIDDEN)
    return diagnose(
        engine,
        probe,
        section or SapSection(enabled=True),
        batches.useful(3),
        batches.pairs(3),
        {"engine": kind.__name__},
    )


def failures(report: Report) -> list[str]:
    return [found.name for found in report.findings if found.verdict == FAIL]


def test_a_healthy_engine_passes_everything(capfd):
    report = examine(SingleEngine)
    assert (report.exit_code, failures(report)) == (0, [])
    assert {found.name for found in report.findings if found.verdict == WARN} == set(), (
        report.table()
    )
    captured = capfd.readouterr()
    assert captured.out == "" and re.search(r"\[doctor\] first order: [\d.]+ s", captured.err)
    lines = report.table().splitlines()
    assert lines[0] == "engine  SingleEngine" and lines[-1].startswith("ok: ")
    assert any(line.startswith("recommended sap.eps") for line in lines)


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_engine_fails_where_it_should(kind):
    report = examine(kind)
    assert report.exit_code == 1
    assert set(BROKEN[kind]) <= set(failures(report)), report.table()
    assert "FAIL: " in report.table()


def test_an_invisible_perturbation_is_named_as_such():
    assert "the loss does not move" in examine(Unseen).table()


def test_eps_inside_the_rounding_is_a_warning_with_a_recommendation():
    report = examine(SingleEngine, SapSection(enabled=True, eps=1e-3), torch.bfloat16)
    found = next(found for found in report.findings if found.name == "probe at eps 0.001 (sap.eps)")
    assert found.verdict == WARN and "sap.eps" in found.advice
    recommended = next(found for found in report.findings if found.name == "recommended sap.eps")
    assert float(recommended.measured.split()[0]) >= 0.02
    assert report.exit_code == 0, report.table()


def test_bfloat16_passes_with_wider_limits():
    report = examine(SingleEngine, dtype=torch.bfloat16)
    assert failures(report) == [], report.table()


def test_slope_is_taken_where_neighbours_agree():
    assert central_slope(lambda h: 3 * h + 50 * h**3, size=3.0, loss=1.0).ratio == pytest.approx(
        1.0, abs=1e-4
    )
    assert central_slope(
        lambda h: 0.73 * 3 * h + 5 * h**3, size=3.0, loss=1.0
    ).ratio == pytest.approx(0.73, abs=1e-3)
    assert central_slope(lambda h: 2.0, size=3.0, loss=2.0).ratio == 0.0
    saturated = central_slope(lambda h: math.tanh(200 * h), size=200.0, loss=6.0)
    assert saturated.ratio == pytest.approx(1.0, abs=1e-3) and saturated.spread < 0.01


def test_verdicts_and_exit_codes():
    assert [graded(error, 0.1, 0.5) for error in (0.1, 0.3, 0.6, float("nan"))] == [
        OK,
        WARN,
        FAIL,
        FAIL,
    ]
    report = Report()
    assert report.exit_code == 1, "nothing was examined"
    report.add(Finding("a", "1", "1", OK))
    report.add(Finding("b", "1", "2", WARN, "mind b"))
    assert report.exit_code == 0 and "warn: b: mind b" in report.table()
    assert "float32" not in report.table()
    report.facts["model"] = "a folder, bfloat16"
    assert (
        "A warn is no failure. In bfloat16 it may be rounding: " in report.table().splitlines()[-2]
    )
    assert report.table().splitlines()[-1] == "ok: 1 ok, 1 warn, 0 FAIL"
    report.add(Finding("c", "1", "2", FAIL))
    assert report.exit_code == 1 and report.table().splitlines()[-1] == "FAIL: 1 ok, 1 warn, 1 FAIL"


def test_memory_of_a_block_is_its_own():
    earlier = torch.ones(64 * 2**20)  # 256 MiB, gone before the measurement
    del earlier
    with Meter(torch.device("cpu")) as cost:
        block = torch.ones(8 * 2**20)  # 32 MiB
    if cost.grown is not None:  # not every kernel lets a process reset its peak
        assert 30 * 2**20 < cost.grown < 128 * 2**20
    assert cost.seconds > 0 and block.numel()


def test_plain_weights_count_whole():
    model = tiny_lora()
    held = held_weights(model, 2)
    assert (
        held.shard == held.whole == sum(4 * p.numel() for p in model.parameters())
        and held.gathered == 0
    )
    assert held.whole / 2 <= held.fair < held.whole / 2 * 1.1


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    return folder, make_project(folder)


def test_the_method_examined_is_the_first_with_sap(project):
    folder, content = project
    experiment = recipes.load(write_recipe(folder, content))
    assert choose_cell(experiment, None, None).method == "sap"
    assert choose_cell(experiment, "sft", 3).seed == 3


def test_bad_input_is_one_sentence(project, capfd):
    folder, content = project
    plain = write_recipe(folder, content | {"methods": {"sft": {}, "other": {}}}, "plain.yaml")
    assert main(["doctor", str(plain)]) == 2
    assert "no method of" in capfd.readouterr().err
    path = write_recipe(folder, content)
    assert main(["doctor", str(path), "--dry-run"]) == 2
    assert "--dry-run would do nothing in `sap doctor`" in capfd.readouterr().err
    found = run(
        ["launch/doctor.py", "--config", str(path), "--sap.layers", "[40]", "--train.ranks", "1"]
    )
    assert (
        found.returncode == 2
        and found.stderr.startswith("error: ")
        and found.stderr.count("\n") == 1
    )


def test_sap_doctor_on_two_zero3_ranks(project):
    folder, content = project
    found = sap("doctor", write_recipe(folder, content))
    assert found.returncode == 0, found.stdout + found.stderr
    table = found.stdout
    assert (
        "zero3, 2 ranks" in table and "random tokens" in table and "align is not complete" in table
    )
    assert re.search(r"ranks agree .* ok", table) and re.search(
        r"weights held by a rank .* ok", table
    )
    assert table.count("ok: ") == 1, "one rank prints"
    assert not (folder / "runs").exists(), "the doctor writes nothing"


def test_launch_script_alone_writes_json(project):
    folder, content = project
    path = write_recipe(folder, content)
    found = run(
        [
            "launch/doctor.py",
            "--config",
            str(path),
            "--train.engine",
            "single",
            "--json",
            str(folder / "doctor.json"),
        ]
    )
    assert found.returncode == 0, found.stdout + found.stderr
    written = json.loads((folder / "doctor.json").read_text())
    assert written["exit_code"] == 0 and "single, 1 rank on cpu" in written["facts"]["engine"]
    assert {"name", "measured", "expected", "verdict", "advice"} == set(written["findings"][0])
