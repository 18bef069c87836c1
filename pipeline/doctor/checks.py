"""The checks: each measures one thing through the engine's verbs and yields findings.

    report = diagnose(engine, probe, recipe.sap, useful_batches, pair_batches)
    # all ranks together, on a warm engine without dropout
    print(report.table())

What goes silently wrong on sharded weights, and which check sees it: a perturbation that no pass uses (first order),
one that is not undone in every copy of the weights (restore), gradients that leak from an auxiliary pass into the next
(traces, main pass), losses weighted wrongly over ranks (first order, ranks), a probe signal below the rounding of a
pass (signal), a flipped sign (sign).
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.section import SapSection
from pipeline.doctor.measure import (
    Slope,
    StepUnderTest,
    across_ranks,
    central_slope,
    digest,
    gradients_left,
    relative,
)
from pipeline.doctor.report import FAIL, INFO, OK, WARN, Finding, Report, graded, passed
from pipeline.doctor.resources import Meter, held_weights, mebibytes
from pipeline.engines.engine import B, Engine, LossFunction, ShardedVector
from pipeline.objectives.batches import MicroBatch, PairBatch
from pipeline.objectives.losses import useful_loss

_EPS = (1e-3, 0.01, 0.02, 0.05, 0.1, 0.2)
_MARGIN = 1.5  # signal over noise; nothing but rounding has 1
# a slope that changes by more from one distance to the next shows neither right nor wrong
_INCONCLUSIVE = 0.25
_PADDING = 1.1  # a rank's share of the weights over the even one: padding, uneven rows
# |g(V) - g(0)| / |g(0)| at which the sign is looked at: small enough for first order
_CORRECTION = (0.05, 0.2)
_DEVICE_SHARE = 0.9  # of the device's memory: above, other batches may not fit
_COSINE = 0.02  # a cosine this far below 0 may still be rounding
Findings = Iterator[Finding]


def diagnose(
    engine: Engine,
    probe: Probe,
    sap: SapSection,
    useful: Sequence[MicroBatch],
    pairs: Sequence[PairBatch],
    facts: dict[str, str] | None = None,
) -> Report:
    """Run every check; progress on stderr. The engine ends as after one step at learning rate 0.

    An exception is a FAIL and ends the examination: other ranks may be elsewhere,
    and no collective call would meet theirs.
    """
    examined, report = StepUnderTest(engine, probe, sap, useful, pairs), Report(dict(facts or {}))
    for name, check in CHECKS.items():
        started = time.perf_counter()
        try:
            for finding in check(examined):
                report.add(finding)
        except Exception as error:
            traceback.print_exc()
            what = (
                f"{type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
            )
            report.add(
                Finding(
                    name,
                    what,
                    "no exception",
                    FAIL,
                    "the traceback is on stderr; the checks after this one were not run",
                )
            )
            report.completed = False
            break
        if engine.rank == 0:
            print(
                f"[doctor] {name}: {time.perf_counter() - started:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    return report


def check_traces(examined: StepUnderTest) -> Findings:
    """Auxiliary passes leave neither a gradient nor a changed weight behind, and do not change what a pass computes."""
    engine = examined.engine
    passes: dict[str, Callable[[], object]] = {
        # the first: it also clears what the last step may have left
        "gradient": lambda: examined.gradient,
        "loss": lambda: examined.loss,
        "safety gradient": lambda: examined.direction,
        "probe gradient": lambda: examined.p0,
        "perturbed probe gradient": lambda: examined.perturbed_probe_gradient(
            examined.scale(examined.sap.eps)
        ),
    }
    before = digest(engine.weights())
    for name, run in passes.items():
        run()
        left = gradients_left(engine)
        moved = engine.any_rank(digest(engine.weights()) != before)
        found = "weights changed" if moved else f"gradient of norm {left:.3g}" if left else "none"
        advice = "what it leaves is added to the next step's gradient or weights: do not train with this engine"
        yield Finding(f"traces of {name}", found, "none", passed(found == "none"), advice)
    again = relative(engine, engine.gradient(useful_loss, examined.useful)[1], examined.gradient)
    advice = "auxiliary passes leak into gradients, or this backend's results vary from run to run"
    yield Finding(
        "gradient, computed again", _share(again), "equal", graded(again, 1e-6, 1e-2), advice
    )


def check_ranks(examined: StepUnderTest) -> Findings:
    """Losses, norms and probe gradients are global: bit for bit the same on every rank."""
    engine = examined.engine
    if engine.world_size == 1:
        yield Finding("ranks agree", "one rank", "-", INFO)
        return
    values = {
        "loss": examined.loss,
        "gradient norm": engine.norm(examined.gradient),
        "weight norm": examined.weight_norm,
        "probe gradient": examined.p0.double().norm().item() + examined.p0.double().sum().item(),
    }
    differing = [
        name for name, value in values.items() if len(set(across_ranks(engine, value))) > 1
    ]
    found = f"{', '.join(differing)} differ" if differing else ", ".join(values)
    advice = "ranks that disagree take different steps: check that all run the same code, data and versions"
    yield Finding("ranks agree", found, "equal on every rank", passed(not differing), advice)


def check_shards(examined: StepUnderTest) -> Findings:
    """A rank holds its share of the weights, not all of them."""
    engine = examined.engine
    # what a whole pass leaves, not a forward pass alone
    engine.gradient(useful_loss, examined.useful)
    held = held_weights(engine.module, engine.world_size, engine.frozen)
    most = max(across_ranks(engine, held.shard))
    verdict = INFO if engine.world_size == 1 else passed(most <= _PADDING * held.fair)
    advice = "the model is not sharded: check train.engine and the launcher's number of processes"
    yield Finding(
        "weights held by a rank",
        f"{mebibytes(most)} of {mebibytes(held.whole)}",
        f"{mebibytes(held.fair)}",
        verdict,
        advice,
    )
    gathered = max(across_ranks(engine, held.gathered))
    if gathered:
        verdict = WARN if engine.world_size > 1 and gathered > held.whole / 2 else INFO
        advice = (
            "most of the model stays gathered between passes: lower "
            "stage3_param_persistence_threshold in the DeepSpeed file"
        )
        yield Finding("full copies kept between passes", mebibytes(gathered), "-", verdict, advice)


def check_restore(examined: StepUnderTest) -> Findings:
    """After `perturbed` every bit is back: of the weights, and of the loss,
    which sees the copies that passes compute with.
    """
    engine = examined.engine
    scale, before, loss = (
        examined.scale(examined.sap.eps),
        digest(engine.weights()),
        examined.useful_loss(),
    )
    repeats = examined.useful_loss() == loss
    advice = "this backend's losses vary from run to run, so the loss cannot show whether compute copies came back"
    yield Finding(
        "loss, computed again",
        "equal bits" if repeats else "differs",
        "equal bits",
        OK if repeats else WARN,
        advice,
    )

    def look(when: str) -> Findings:
        same = not engine.any_rank(digest(engine.weights()) != before)
        advice = "training would go on from perturbed weights: do not train with this engine"
        yield Finding(
            f"weights after {when}",
            "equal bits" if same else "changed",
            "equal bits",
            passed(same),
            advice,
        )
        change = examined.useful_loss() - loss
        verdict = (
            OK
            if change == 0
            else FAIL
            if repeats
            else graded(abs(change), 1e-3 * max(abs(loss), 1.0), math.inf)
        )
        yield Finding(
            f"loss after {when}",
            f"{change:+.3g}" if change else "equal bits",
            "equal bits",
            verdict,
            advice,
        )

    with engine.perturbed(examined.direction, scale):
        examined.useful_loss()
    yield from look("perturbed")
    arrived = False
    try:
        with engine.perturbed(examined.direction, -scale):
            examined.useful_loss()
            raise _Inside
    except _Inside:
        arrived = True
    yield from look("an exception inside")
    if not arrived:
        yield Finding(
            "an exception inside perturbed",
            "swallowed",
            "raised",
            FAIL,
            "errors in a perturbed pass would go unnoticed",
        )


def check_first_order(examined: StepUnderTest) -> Findings:
    """The loss moves along a gradient by its norm times the distance:
    the perturbation is seen, and the gradient is the loss's own.
    """
    engine = examined.engine
    yield _along(examined, "useful loss", useful_loss, examined.useful, examined.gradient)
    yield _along(examined, "safety loss", examined.safety_loss, examined.pairs, examined.direction)
    scale = examined.scale(examined.sap.eps)
    with engine.perturbed(examined.direction, scale):
        change = examined.useful_loss() - examined.loss
    predicted = scale * engine.dot(examined.gradient, examined.direction)
    advice = (
        f"raise sap.eps (now {examined.sap.eps:g}) or use model.dtype float32: the perturbation "
        "changes no bit of the loss"
    )
    yield Finding(
        "useful loss at W + dW (sap.eps)",
        f"{change:+.3g}",
        f"not 0; {predicted:+.3g} to first order",
        passed(change != 0),
        advice,
    )


def _along(
    examined: StepUnderTest,
    name: str,
    loss_fn: LossFunction[B],
    batches: Sequence[B],
    gradient: ShardedVector,
) -> Finding:
    """How a loss moves along its gradient."""
    engine, norm = examined.engine, examined.engine.norm(gradient)

    def loss_at(distance: float) -> float:
        with engine.perturbed(gradient, distance / norm):
            return engine.loss(loss_fn, batches)

    slope = central_slope(loss_at, norm, engine.loss(loss_fn, batches), examined.low)
    where = f"{slope.distance / examined.weight_norm:.2g} |W|"
    return _slope_finding(f"{name} along its gradient", slope, where, examined.low, FAIL)


def check_probe(examined: StepUnderTest) -> Findings:
    """The probe gradient against finite differences: along itself, and in the largest coordinate of a few layers."""
    probe, p0 = examined.probe, examined.p0

    def loss_along(unit: torch.Tensor) -> Callable[[float], float]:
        def loss_at(distance: float) -> float:
            with probe.active(distance * unit, requires_grad=False):
                return examined.useful_loss()

        return loss_at

    norm = p0.norm().item()
    slope = central_slope(loss_along(p0 / norm), norm, examined.loss, examined.low)
    yield _slope_finding(
        "loss along the probe gradient", slope, f"|v| {slope.distance:.2g}", examined.low, FAIL
    )
    last = len(probe.layers) - 1
    for row in sorted({0, last // 2, last}):
        index = p0[row].abs().argmax()
        unit = torch.zeros_like(p0)
        unit[row, index] = 1.0
        slope = central_slope(loss_along(unit), p0[row, index].item(), examined.loss, examined.low)
        name = f"loss along layer {probe.layers[row]}, coordinate {index.item()}"
        # One coordinate of a bf16 hidden state may be smaller than its own rounding: no failure there.
        yield _slope_finding(
            name, slope, f"v {slope.distance:.2g}", examined.low, WARN if examined.low else FAIL
        )


def check_signal(examined: StepUnderTest) -> Findings:
    """p(1) - p(0) against its noise over a range of eps (methods.md, SAP);
    the recommended eps has the largest ratio of the two.
    """
    p0, own = examined.p0, examined.sap.eps
    base = p0.norm().item()
    ratios: dict[float, float] = {}
    for eps in sorted({*_EPS, own}):
        scale = examined.scale(eps)
        plus, minus = (
            examined.perturbed_probe_gradient(scale),
            examined.perturbed_probe_gradient(-scale),
        )
        signal = (plus - p0).norm().item() / base
        noise = (plus + minus - 2 * p0).norm().item() / (math.sqrt(3) * base)
        ratios[eps] = signal / max(noise, torch.finfo(torch.float32).tiny) if signal else 0.0
        found = f"signal {signal:.2g}, noise {noise:.2g}, ratio {ratios[eps]:.2g}"
        if eps != own:
            yield Finding(f"probe at eps {eps:g}", found, "-", INFO)
            continue
        verdict = FAIL if not signal else WARN if ratios[eps] < _MARGIN else OK
        advice = "V would be mostly noise: take the recommended sap.eps, or model.dtype float32"
        yield Finding(
            f"probe at eps {eps:g} (sap.eps)", found, f"ratio above {_MARGIN:g}", verdict, advice
        )
    examined.best_eps = max(ratios, key=lambda eps: ratios[eps])
    best = ratios[examined.best_eps]
    advice = "no eps stands out of the noise: use model.dtype float32, or other probed layers"
    found = f"{examined.best_eps:g} (ratio {best:.2g})"
    yield Finding(
        "recommended sap.eps", found, "largest ratio", INFO if best >= _MARGIN else WARN, advice
    )


def check_sign(examined: StepUnderTest) -> Findings:
    """SAP descends the safety loss: <g(V) - g(0), g_s> is positive, and to first order |p(1)
    - p(0)|^2 * (V's scale) / (dW's).
    """
    engine, g0, direction = examined.engine, examined.gradient, examined.direction
    scale = examined.scale(examined.best_eps)
    ascent = examined.perturbed_probe_gradient(scale) - examined.p0
    if not ascent.any():
        yield Finding(
            "correction",
            "p(1) equals p(0)",
            "not 0",
            FAIL,
            "the probe gradient does not see the perturbation: there is no V",
        )
        return
    beta = 0.05 * max(abs(examined.loss), 1.0) / (examined.p0.norm().item() * ascent.norm().item())
    for _ in range(5):
        with examined.probe.active(beta * ascent, requires_grad=False):
            shift: ShardedVector = [
                a - b
                for a, b in zip(engine.gradient(useful_loss, examined.useful)[1], g0, strict=True)
            ]
        correction = engine.norm(shift) / engine.norm(g0)
        if _CORRECTION[0] <= correction <= _CORRECTION[1]:
            break
        beta *= min(
            max(math.sqrt(_CORRECTION[0] * _CORRECTION[1]) / max(correction, 1e-12), 1e-2), 1e2
        )
    product = engine.dot(shift, direction)
    cosine = product / (engine.norm(shift) * engine.norm(direction))
    ratio = product * scale / (beta * ascent.double().square().sum().item())
    wrong = WARN if examined.low else FAIL
    verdict = OK if cosine > 0 else WARN if cosine > -_COSINE else wrong
    advice = "SAP's step does not descend the safety loss here: a sign is wrong, or (bf16) the correction is noise"
    yield Finding(
        "cosine of correction and g_s",
        f"{cosine:+.3f} at correction {correction:.2g}",
        "above 0",
        verdict,
        advice,
    )
    verdict = OK if 0.5 <= ratio <= 2 else wrong if not ratio > 0 else WARN
    advice = (
        "the correction is not beta H H^T dW: curvature or rounding is large at this eps and "
        "correction, or a gradient is wrong"
    )
    yield Finding(
        "<correction, g_s> over first order",
        f"x{ratio:.3f}",
        f"x1 (eps {examined.best_eps:g})",
        verdict,
        advice,
    )


def check_main_pass(examined: StepUnderTest) -> Findings:
    """The step's own pass, after all others: the same gradient and probe gradient as the auxiliary passes.

    Ends the step at rate 0.
    """
    engine = examined.engine
    with (
        examined.probe.active(examined.probe.zeros(engine.device)) as rows,
        Meter(engine.device) as cost,
    ):
        loss, p0 = engine.forward_backward(useful_loss, examined.useful, rows)
    assert p0 is not None, "rows of V were given"
    difference = relative(engine, engine.accumulated_gradient(), examined.gradient)
    engine.step(0.0)
    tolerance = 1e-2 if examined.low else 1e-5
    advice = (
        "the step would not take the gradient that SAP reckons with: an auxiliary pass leaks, or "
        "losses are weighted differently"
    )
    yield Finding(
        "main pass: gradient",
        _share(difference),
        "as before",
        graded(difference, tolerance, 0.05),
        advice,
    )
    difference = ((p0 - examined.p0).norm() / examined.p0.norm()).item()
    yield Finding(
        "main pass: probe gradient",
        _share(difference),
        "as before",
        graded(difference, tolerance, 0.05),
        advice,
    )
    difference = abs(loss.item() - examined.loss) / max(abs(examined.loss), 1e-3)
    yield Finding(
        "main pass: loss",
        _share(difference),
        "as before",
        graded(difference, tolerance, 0.05),
        advice,
    )
    yield _cost_finding("main pass", cost, engine)


def check_costs(examined: StepUnderTest) -> Findings:
    """Time and peak memory of each auxiliary pass."""
    engine = examined.engine

    def perturb() -> None:
        with engine.perturbed(examined.direction, examined.scale(examined.sap.eps)):
            pass

    for name, run in {
        "safety gradient": lambda: engine.gradient(examined.safety_loss, examined.pairs),
        "probe gradient": examined.probe_gradient,
        "loss": examined.useful_loss,
        "perturb and restore": perturb,
    }.items():
        with Meter(engine.device) as cost:
            run()
        yield _cost_finding(name, cost, engine)


def _slope_finding(name: str, slope: Slope, where: str, low: bool, worst: str) -> Finding:
    """worst: verdict where the slope is wrong."""
    verdict = graded(abs(slope.ratio - 1), *((0.15, 0.4) if low else (0.02, 0.1)))
    if verdict == FAIL:
        verdict = WARN if slope.spread > _INCONCLUSIVE else worst
    if slope.moved == 0:
        advice = (
            "the loss does not move: passes do not see the perturbation (stale gathered copies), "
            "so SAP would train on nothing"
        )
    elif verdict == WARN:
        advice = (
            "not quite the gradient's slope: rounding (bf16) or strong curvature; float32 on "
            "prepared data should come closer"
        )
    else:
        advice = (
            "the loss does not follow its gradient: passes may use stale copies of the weights, or "
            "weigh the ranks' losses wrongly"
        )
    return Finding(
        name, f"x{slope.ratio:.4f} (moved {slope.moved:+.2g} at {where})", "x1", verdict, advice
    )


def _cost_finding(name: str, cost: Meter, engine: Engine) -> Finding:
    """The slowest rank's seconds, the largest peak."""
    seconds = max(across_ranks(engine, cost.seconds))
    peak, grown = (
        max(across_ranks(engine, math.nan if value is None else value))
        for value in (cost.peak, cost.grown)
    )
    memory = (
        "memory not measured"
        if math.isnan(peak)
        else f"peak {mebibytes(peak)}, {mebibytes(grown)} above idle"
    )
    verdict, advice = INFO, ""
    if (
        engine.device.type == "cuda"
        and peak > _DEVICE_SHARE * torch.cuda.get_device_properties(engine.device).total_memory
    ):
        verdict = WARN
        advice = "little memory left: lower micro_batch_size or tokens_per_micro_batch, or set gradient_checkpointing"
    return Finding(f"cost of {name}", f"{seconds:.2f} s, {memory}", "-", verdict, advice)


def _share(difference: float) -> str:
    return "equal" if difference == 0 else f"differs by {difference:.2g}"


class _Inside(Exception):
    """Raised inside a perturbation on purpose."""


CHECKS: dict[str, Callable[[StepUnderTest], Findings]] = {
    "traces": check_traces,
    "ranks": check_ranks,
    "shards": check_shards,
    "restore": check_restore,
    "first order": check_first_order,
    "probe gradient": check_probe,
    "signal and noise": check_signal,
    "sign": check_sign,
    "main pass": check_main_pass,
    "costs": check_costs,
}
