"""Memory and time of a recipe on N GPUs, by arithmetic on the model's config. Nothing in it was measured on a GPU.

    experiment = load("launch/recipes/llama_7b_sap.yaml")
    print(plan_cell(experiment, experiment.cell("sap", 0), ranks=8, gpu_gb=80))

The model's modules are built without memory and counted (model_size.py). What the engines hold is read off
pipeline/engines and DeepSpeed 0.19's ZeRO-3; activations off transformers' decoders (gated MLP, RMSNorm in float32)
and PEFT's LoRA. Sequences count at full length with every token supervised, so the sums lie above what happens;
tests/unit/planner/test_planner.py holds them against engines, graphs and FLOP counts on a CPU. Not counted:
fragmentation of the allocator's memory (leave headroom), offloading to CPUs, ZeRO++, experts, what a run does once,
and what a validation leaves gathered for the pass after it (ZeRO-3 has prefetched for a backward pass that does not
come).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from pipeline.defences import enabled
from pipeline.defences.defence import Cost, Costs, Defence, Moment, Passes, Row, Sizes
from pipeline.engines.ds_config import read_ds_config
from pipeline.model.model_facts import ModelFacts
from pipeline.model.model_outline import outlined
from pipeline.model.model_size import NF4_BLOCK, ModelCounts, count_model
from pipeline.objectives.logits import MOST_LOGITS
from pipeline.objectives.sharing import accumulation, check_shares, share_of
from pipeline.planner.fetching import Fetching, short, split
from pipeline.recipe.recipe import Cell, Experiment, Recipe
from pipeline.recipe.sections import DefenceSection, SafetyPairsSection, TrainSection
from pipeline.running import devices

# of a GPU's memory, up to which gradient_checkpointing auto fills it: the rest is for fragments
FITTED_SHARE = 0.9
CUDA_ALLOWANCE = 2e9  # bytes, an assumption: CUDA context, cuBLAS workspaces, NCCL buffers
# A100: dense bfloat16 peak by NVIDIA's data sheet; the share of it that is reached is an assumption
TFLOPS, UTILISATION = 312.0, 0.35


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one training cell on `ranks` GPUs; see `estimate`."""

    model: ModelCounts
    train: TrainSection
    zero: dict[str, Any]
    dtype_bytes: int
    quantized: bool
    ranks: int
    max_length: int
    safety_max_length: int
    # those that are enabled, with their sections
    defences: tuple[tuple[Defence, DefenceSection], ...] = ()
    pairs: SafetyPairsSection = field(default_factory=SafetyPairsSection)
    recomputed: int | None = None  # decoder layers, for train.gradient_checkpointing auto
    gathered: int | None = None  # frozen layers that stay gathered, for train.keep_gathered auto
    # whether attention works through a packed row whole, and a mask keeps its samples apart
    masked: bool = False

    @property
    def recomputed_layers(self) -> int:
        """Decoder layers whose activations are computed again in a backward pass;
        of auto all, until `fitted` has said how many.
        """
        if self.recomputed is not None:
            return self.recomputed
        return self.model.layers if self.train.gradient_checkpointing else 0

    def fitted(self, memory: float) -> Plan:
        """With gradient_checkpointing auto: the plan that recomputes the fewest layers with which it takes at most
        `memory` bytes. With keep_gathered auto: of these the one that keeps the most layers gathered. Else this one.

        Where nothing fits, all are recomputed and none is kept.
        """
        plan, layers = self, self.model.layers
        if self.train.gradient_checkpointing == "auto":
            fewer = (replace(self, recomputed=count) for count in range(layers))
            plan = _first_within(memory, fewer) or replace(self, recomputed=layers)
        if self.train.keep_gathered == "auto":
            more = (replace(plan, gathered=count) for count in range(self._cut_layers, 0, -1))
            plan = _first_within(memory, more) or replace(plan, gathered=0)
        return plan

    @property
    def _cut_layers(self) -> int:
        """Decoder layers whose frozen weights the ranks cut."""
        cut = self.ranks > 1 and any(map(self.fetching.by_layer, self.model.weights))
        return self.model.layers if cut else 0

    @property
    def kept_layers(self) -> int:
        """Decoder layers whose frozen weights stay gathered; of auto none, until `fitted` has said how many."""
        if self.gathered is not None:
            return self.gathered
        return self._cut_layers if self.train.keep_gathered is True else 0

    def rows(self) -> list[Row]:
        """Every part, in bytes per GPU on the rank that holds the most."""
        rows = [
            *_state(self),
            Row("CUDA and NCCL", "an allowance, assumed", CUDA_ALLOWANCE, "always"),
            *_gathered(self),
            *_activations(self),
        ]
        return sorted(rows, key=lambda row: get_args(Moment).index(row.moment))

    def total(self) -> float:
        """Bytes per GPU at one time: what is always there, and the larger of a pass and what comes between passes."""
        always, in_a_pass, between = (
            sum(row.bytes for row in self.rows() if row.moment == moment)
            for moment in get_args(Moment)
        )
        return always + max(in_a_pass, between)

    def table(self, gpu_gb: float) -> str:
        """All parts in GB (1e9 bytes); the last line is the total and its share of a GPU of `gpu_gb`."""
        lines = [f"{'GB per GPU':<24}{'':>6}  {'when':<9}  from"]
        lines += [
            f"{row.part:<24}{row.bytes / 1e9:>6.2f}  {row.moment:<9}  {row.formula}"
            for row in self.rows()
        ]
        total = self.total() / 1e9
        return "\n".join(
            [
                *lines,
                f"{'most at one time':<24}{total:>6.2f}  {'':<9}  {total / gpu_gb:.0%} of a GPU of {gpu_gb:g} GB",
            ]
        )

    def check(self) -> None:
        """ValueError where the batch sizes do not divide by the ranks, the engine takes one only,
        or a defence does not fit the model.
        """
        if self.train.engine == "single" and self.ranks > 1:
            raise ValueError(
                f"train.engine single runs one process, not {self.ranks}: use engine zero3 or fsdp2"
            )
        check_shares("train.batch_size", self.train.batch_size, self.ranks)
        for defence, section in self.defences:
            defence.fits(section, self.model.layers)

    @property
    def fetching(self) -> Fetching:
        """What is held and fetched of the weights, where no layer stays gathered."""
        return Fetching(
            self.model.weights, self.model.layers, self.train.engine, self.zero, self.ranks
        )

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the task's largest micro-batch on a rank."""
        share, budget = -(-self.train.batch_size // self.ranks), self.train.tokens_per_micro_batch
        if budget is None:
            return min(self.train.micro_batch_size, share) * self.max_length
        # Under a budget the costliest micro-batch is as cheap as can be: at most a rank's share of the batch.
        return min(budget, share * self.max_length)

    @property
    def span(self) -> int:
        """Tokens that attention compares a token of the task's with: of its sample, or of all in a packed row."""
        return max(self.micro_batch_tokens, self.max_length) if self.masked else self.max_length

    @property
    def draws_pairs(self) -> bool:
        """Whether a defence draws safety pairs step by step."""
        return any(defence.draws_pairs for defence, _ in self.defences)

    def flops(self) -> tuple[float, float]:
        """FLOPs of a step on one rank: (as planned, averaged over what is not done at every step;
        plain fine-tuning).
        """
        return sum(count * flops for count, flops, _ in _passes(self)), _costs(self).main[0]

    def received(self) -> float:
        """Bytes of weights that a GPU receives in a step, averaged likewise;
        the reduction of gradients is not in it.
        """
        return sum(count * received for count, _, received in _passes(self))

    def time(self, tflops: float = TFLOPS, utilisation: float = UTILISATION) -> str:
        """What a step costs, in two lines.

        tflops: peak of a GPU; utilisation: the share of it assumed to be reached.
        """
        step, plain = self.flops()
        return (
            f"A step: {step / 1e12:,.0f} TFLOP a GPU, {step / plain:.1f} times plain "
            f"fine-tuning's: {step / (tflops * 1e12 * utilisation):.1f} s "
            f"at {utilisation:.0%} of {tflops:g} TFLOP/s (assumed),\nhad gathering taken no time; "
            f"a GPU receives {self.received() / 1e9:,.0f} GB "
            "of weights in it."
        )


def estimate(
    facts: ModelFacts, train: TrainSection, of_cell: Recipe | None, ds_config: dict[str, Any] | None, dtype_bytes: int,
    quantization: str, ranks: int, max_length: int, safety_max_length: int, eager: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a training; reads no weights. of_cell: whose defences it has; None: plain fine-tuning.

    ds_config: DeepSpeed's, for engine zero3. dtype_bytes: of a weight that is not quantised. quantization: none | nf4.
    Lengths: tokens. Raises ValueError where adapter, quantization, batch sizes or defences do not go with the model or
    the ranks.
    """
    nf4, zero = quantization == "nf4", (ds_config or {}).get("zero_optimization", {})
    counted = count_model(facts, train, dtype_bytes, nf4, eager)
    defences = (
        ()
        if of_cell is None
        else tuple((defence, getattr(of_cell, name)) for name, defence in enabled(of_cell))
    )
    pairs = SafetyPairsSection() if of_cell is None else of_cell.safety_pairs
    plan = Plan(
        counted,
        train,
        zero,
        dtype_bytes,
        nf4,
        ranks,
        max_length,
        safety_max_length,
        defences,
        pairs,
    )
    plan.check()
    return plan


def estimate_training(
    base: Recipe, facts: ModelFacts, train: TrainSection, of_cell: Recipe | None, ranks: int, dtype: str,
    attention: str | None = None,
) -> Plan:  # fmt: skip
    """`estimate` of a cell's training, or without one of the alignment's.

    dtype: of the frozen weights, float32 or bfloat16.

    attention: flash_attention_2, sdpa or eager; None: what model.attention means on this machine.
    """
    section, data = base.model, base.data
    ds_config = read_ds_config(train, ranks) if train.engine == "zero3" else None
    width, attention = 4 if dtype == "float32" else 2, attention or devices.attention(section)
    lengths = (data.max_length, data.safety_max_length)
    plan = estimate(
        facts,
        train,
        of_cell,
        ds_config,
        width,
        section.quantization,
        ranks,
        *lengths,
        attention == "eager",
    )
    plan = replace(plan, masked=train.packing and attention in ("eager", "sdpa"))
    plan.check()
    return plan


def plan_cell(experiment: Experiment, cell: Cell, ranks: int, gpu_gb: float) -> str:
    """Memory and time of a recipe's cell on `ranks` GPUs of `gpu_gb` (1e9 bytes), as text; auto counts as bfloat16 and,
    where no GPU is here, as sdpa.

    Raises ValueError where the model's config could not be loaded, and as `estimate`.
    """
    base = experiment.base
    dtype = "bfloat16" if base.model.dtype == "auto" else base.model.dtype
    attention = "sdpa" if base.model.attention == "auto" and not devices.gpus() else None
    plan = estimate_training(
        base, outlined(base.model), cell.recipe.train, cell.recipe, ranks, dtype, attention
    ).fitted(FITTED_SHARE * gpu_gb * 1e9)
    head = (
        f"{experiment.base.name}, method {cell.method}, {plan.train.engine} on {ranks} GPUs. "
        "Arithmetic: nothing here was run on a GPU."
    )
    return "\n".join([head, plan.table(gpu_gb), plan.time()])


def _first_within(memory: float, plans: Iterable[Plan]) -> Plan | None:
    return next((plan for plan in plans if plan.total() <= memory), None)


def _state(plan: Plan) -> list[Row]:
    """What is held all the time: weights, gradients, AdamW's moments, the defences' own,
    the buffer in which gradients are reduced.

    ZeRO-3 keeps trained weights and gradients in the model's dtype where all weights are trained, and a float32 master.
    Between passes a norm takes a float32 copy, and float64 ones of two flat tensors (Engine.dot). AdamW's update takes
    less.
    """
    engine, ranks, fetching = plan.train.engine, plan.ranks, plan.fetching
    trained, frozen = (
        [weight for weight in plan.model.weights if weight.trained is which]
        for which in (True, False)
    )
    numel, local = (
        sum(weight.numel for weight in trained),
        sum(weight.held(engine, ranks) for weight in trained),
    )
    width = plan.dtype_bytes if engine == "zero3" and plan.train.adapter == "full" else 4
    master = 4 if engine == "zero3" else 0
    how = (
        f"0.5 + 4/{NF4_BLOCK} bytes a weight in nf4, else {plan.dtype_bytes}"
        if plan.quantized
        else f"{plan.dtype_bytes} bytes a weight"
    )
    count, held = (
        f"{short(numel)} / {ranks}",
        sum(fetching.held(weight) * weight.width for weight in frozen),
    )
    flat = (
        min(local, fetching.size("sub_group_size"))
        if engine == "zero3"
        else max(weight.held(engine, ranks) for weight in trained)
    )
    rows = [
        Row(
            "frozen weights",
            f"{sum(split(frozen)) / 1e9:.2f} GB ({how}) / {ranks}",
            held,
            "always",
        ),
        Row(
            "trained weights",
            f"{count} x ({width}{' + 4 of a float32 master' if master else ''}) bytes",
            local * (width + master),
            "always",
        ),
        Row("gradients", f"{count} x {width} bytes", local * width, "always"),
        Row("AdamW's moments", f"{count} x 2 x 4 bytes", local * 8, "always"),
        Row(
            "norms, update",
            f"{count} x 4 bytes, {short(flat)} x 2 x 8 bytes",
            4 * local + 16 * flat,
            "between",
        ),
    ]
    sizes = Sizes(count, local, width, master, plan.model.hidden, plan.model.layers)
    own = (row for defence, section in plan.defences for row in defence.memory(section, sizes))
    rows += dict.fromkeys(own)  # what two of them say alike is there once
    if engine == "zero3":
        bucket = fetching.size("reduce_bucket_size")
        copied = max(min(bucket, numel), max(weight.numel for weight in trained))
        formula = f"reduce_bucket_size {short(bucket)} + {short(copied)} copied out of it, x {width} bytes"
        rows.append(Row("gradients reduced", formula, (bucket + copied) * width, "always"))
    elif engine == "fsdp2":
        inner = sum(weight.numel for weight in trained if weight.in_layer)
        whole = numel if fetching.at_once else 0
        group = whole or max(inner // plan.model.layers, numel - inner)
        formula = (
            f"{short(group)} of the largest group, "
            f"twice{f', + {short(whole)} whole' if whole else ''}, x 4 bytes"
        )
        rows.append(Row("gradients reduced", formula, group * 8 + whole * 4, "in a pass"))
    return rows


def _gathered(plan: Plan) -> list[Row]:
    """Weights that are whole on a GPU while a pass runs, beside its shards."""
    rows = replace(plan.fetching, kept=plan.kept_layers).rows()
    if plan.quantized:
        largest = max(out * into for out, into in plan.model.linears)
        rows.append(
            Row(
                "dequantised weight",
                f"{short(largest)} x {plan.dtype_bytes} bytes",
                largest * plan.dtype_bytes,
                "in a pass",
            )
        )
    return rows


def _activations(plan: Plan) -> list[Row]:
    """What the larger micro-batch (the task's, or the safety pairs' of two sequences each)
    leaves for its backward pass, and its logits.

    In a layer, per token: a float32 copy in either norm; queries, keys and values, repeated for the attention, its
    result and normaliser; gate, up and activation of the MLP; then with LoRA a float32 copy of every adapted module's
    input (PEFT) and A's output, else the norms' outputs before and after their weights, and the inputs of the two
    projections. Backward adds the gradients of the MLP's three. Logits: log-probabilities, their gradient and the cross
    entropy's, in float32, to which losses.py casts; of many tokens some at a time (head.py), which takes less than
    that. Packed rows: a mask for each of at most two kinds of layers, of a byte for any two tokens of a row, and in the
    dtype what attention adds to its scores: eager once more for each mask, sdpa anew in every layer, which keeps it.
    """
    model, b = plan.model, plan.dtype_bytes
    sizes = [(plan.micro_batch_tokens, plan.span, plan.masked)]
    if plan.draws_pairs:
        pairs = min(plan.pairs.micro_batch_size, -(-plan.pairs.batch_size // plan.ranks))
        sizes.append((2 * pairs * plan.safety_max_length, plan.safety_max_length, False))
    alone = 8 * model.hidden + b * (4 * model.queries + 3 * model.intermediate) + 4 * model.heads

    def kept_scores(length: int, masked: bool) -> int:
        if not model.eager:
            return b * length if masked else 0
        # softmax in float32, then the dtype again
        return model.heads * length * (6 if b == 2 else 4)

    tokens, length, masked = max(
        sizes, key=lambda size: (size[0] * (alone + kept_scores(*size[1:])), size)
    )
    scores = kept_scores(length, masked)
    saved = alone + scores
    if plan.train.adapter == "full":
        saved += b * (4 * model.hidden + model.queries + model.intermediate)
    else:
        saved += sum(4 * (into + plan.train.lora.r) for _, into in model.adapted)
    moving = 3 * b * model.intermediate + scores
    at_once = tokens if model.whole_logits else min(tokens, max(1, MOST_LOGITS // model.vocabulary))
    rows = [
        Row(
            "logits",
            f"{at_once} tokens x {model.vocabulary} x 3 copies of 4 bytes",
            at_once * model.vocabulary * 12,
            "in a pass",
        )
    ]
    if plan.train.adapter == "full" and at_once < tokens:
        formula = f"{model.vocabulary} x {model.hidden} x (4 bytes, summed over chunks of tokens, + {b} of a chunk's)"
        rows.append(
            Row("head's gradient", formula, model.vocabulary * model.hidden * (4 + b), "in a pass")
        )
    if plan.masked:
        width = 1 + (b if model.eager else 0)
        formula = f"2 x {plan.span} x {plan.span} x {width} bytes"
        rows.append(Row("masks of packed rows", formula, 2 * plan.span**2 * width, "in a pass"))
    again = plan.recomputed_layers
    parts = [
        (again, model.hidden * b, f"{model.hidden} x {b}"),
        (model.layers - again, saved, f"{saved:,}"),
    ]
    formula = " + ".join(
        f"{count} layers x {tokens} tokens x {each} bytes" for count, _, each in parts if count
    )
    rows.append(
        Row(
            "kept for backward",
            formula,
            sum(count * tokens * kept for count, kept, _ in parts),
            "in a pass",
        )
    )
    # The last layers come first on the way back: what they have kept is gone when the first one of
    # the others is recomputed.
    moving += saved if again == model.layers else 0
    return [
        *rows,
        Row(
            "one layer in backward",
            f"{tokens} tokens x {moving:,} bytes",
            tokens * moving,
            "in a pass",
        ),
    ]


def _passes(plan: Plan) -> Passes:
    """(times a step, FLOPs, bytes received) of a step's passes on one rank."""
    costs = _costs(plan)
    passes: Passes = [(1, *costs.main)]
    for defence, section in plan.defences:
        passes = defence.passes(section, costs, passes)
    return passes


def _costs(plan: Plan) -> Costs:
    """What passes of a step cost one rank."""
    train, drawn, layers = plan.train, plan.pairs, plan.model.layers
    budget = train.tokens_per_micro_batch
    # How many of full length a micro-batch holds.
    rows = train.micro_batch_size if budget is None else max(budget // plan.max_length, 1)
    share, steps = train.batch_size / plan.ranks, accumulation(train.batch_size, rows, plan.ranks)
    pairs, turns = (
        drawn.batch_size / plan.ranks,
        accumulation(drawn.batch_size, drawn.micro_batch_size, plan.ranks),
    )

    def probe(share: float, through: int) -> Cost:
        # A rank whose share of the samples is none computes a copy of one.
        looked_at = share_of(train.batch_size, share)
        passes, sequences = (
            accumulation(looked_at, rows, plan.ranks),
            max(looked_at / plan.ranks, 1),
        )
        return _pass(plan, sequences, plan.max_length, passes, through, False, plan.span)

    return Costs(
        main=_pass(plan, share, plan.max_length, steps, layers, True, plan.span),
        safe=_pass(plan, pairs, plan.safety_max_length, turns, layers, True),
        safety=_pass(plan, 2 * pairs, plan.safety_max_length, turns, layers, True),
        draws=1 / drawn.refresh_every if drawn.refresh_every else 0.0,
        layers=layers,
        probe=probe,
    )


def _pass(
    plan: Plan, sequences: float, length: int, micro_batches: float, layers: int, of_weights: bool,
    span: int | None = None,
) -> tuple[float, float]:  # fmt: skip
    """(FLOPs, bytes received) of a forward pass and a backward pass through the last `layers`;
    of_weights: with the weights' gradients.

    2 FLOPs a weight and token, forward and for the input's gradient, and for the gradient of those weights that are
    trained; attention's products 4 x span x queries forward, twice that backward (span: tokens that it works through,
    `length` unless given); once more forward where a layer is recomputed. Weights are gathered once forward and once
    backward, whether a layer is recomputed or not.
    """
    model, train, span = plan.model, plan.train, span or length
    linear, adapter = (
        sum(out * into for out, into in model.linears),
        sum(train.lora.r * (out + into) for out, into in model.adapted),
    )
    forward = 2 * (linear + adapter) + 4 * span * model.queries
    learned = 2 * (linear if train.adapter == "full" else adapter) if of_weights else 0
    again = plan.recomputed_layers / model.layers
    backward = forward + 4 * span * model.queries + learned + again * forward
    head = (
        2 * model.vocabulary * model.hidden * (3 if of_weights and train.adapter == "full" else 2)
    )
    flops = sequences * length * (model.layers * forward + layers * backward + head)
    received = replace(plan.fetching, kept=plan.kept_layers).received(layers)
    return flops, micro_batches * received * (plan.ranks - 1) / plan.ranks
