"""The faults that `make mutants` plants, each with the tests that must notice it.

Every text to replace occurs exactly once in its file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tests.distributed.cases import matrix_cases

STEP, ENGINE, ZERO3, FSDP2 = (
    "pipeline/defences/sap/step.py",
    "pipeline/engines/engine.py",
    "pipeline/engines/zero3.py",
    "pipeline/engines/fsdp2.py",
)
AUTOGRAD, FROZEN = "pipeline/engines/autograd.py", "pipeline/engines/frozen.py"
FETCHED_AHEAD = (
    "tests/distributed/test_frozen.py::test_the_next_layer_is_on_its_way_while_one_works[fsdp2-]"
)
FORK_SERVER, WARM = "pipeline/running/fork_server.py", "pipeline/running/warm.py"
INHERITED = "tests/unit/running/test_warm.py::test_a_job_finds_what_a_python_of_its_own_finds"
RESTARTED = "tests/unit/training/test_restart.py"
LOSSES, HEAD, BATCHES = (
    "pipeline/objectives/losses.py",
    "pipeline/objectives/head.py",
    "pipeline/objectives/batches.py",
)

DENSE = "tests/unit/defences/test_step.py::test_step_equals_the_dense_reference"
SIGN = "tests/unit/defences/test_step.py::test_the_correction_descends_the_safety_loss"
MASKS = "tests/unit/defences/test_step.py::test_all_passes_see_the_same_dropout_masks"
RESUMED = "tests/unit/defences/test_resumed_step.py"
SHARED = "tests/unit/objectives/test_batches.py"
HEADS = "tests/unit/objectives/test_head.py::test_losses_and_gradients_are_those_of_all_logits[llama-lora-3]"
BUDGET, PACKED = "tests/unit/objectives/test_buckets.py", "tests/unit/objectives/test_packed.py"
RESTORE, TRACES, VECTORS = (
    "tests/distributed/test_sharded.py::test_perturbation_is_seen_and_undone_bit_for_bit",
    "tests/distributed/test_sharded.py::test_auxiliary_passes_leave_no_trace",
    "tests/distributed/test_sharded.py::test_vectors_survive_sharding_with_poisoned_padding",
)
ON_ZERO3, ON_FSDP2 = "[zero3-0]", "[fsdp2]"


@dataclass(frozen=True)
class Mutant:
    """edits: (file, old text, new text), all applied together."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, ((file, old, new),), tests)


def parity(**wanted: Any) -> str:
    """The test of the first matrix case with these factors."""
    case = next(case for case in matrix_cases() if asdict(case) | wanted == asdict(case))
    return f"tests/distributed/equivalence.py::test_case[{case}]"


ZERO3_EXACT, FSDP2_EXACT = (
    parity(engine=engine, ranks=2, schedule="exact", adapter=adapter, accumulation=1)
    for engine, adapter in (("zero3", "wide"), ("fsdp2", "lora"))
)

OF_THE_STEP = (
    mutant(
        "V's two gradients of different samples",
        STEP,
        "loss, p0 = self._probe_gradient(part, zero)",
        "loss, p0 = self._probe_gradient(useful, zero)",
        "tests/unit/defences/test_step.py::test_v_of_a_share_of_the_samples_equals_the_dense_reference",
    ),
    mutant(
        "SAP left out, exact",
        STEP,
        "with self.probe.active(self.v, requires_grad=False):\n            probed",
        "with self.probe.active(zero, requires_grad=False):\n            probed",
        DENSE,
    ),
    mutant(
        "SAP left out, lagged",
        STEP,
        "with self.probe.active(v) as rows:\n            loss, p0",
        "with self.probe.active(torch.zeros_like(v)) as rows:\n            loss, p0",
        DENSE,
    ),
    mutant(
        "V's sign flipped, exact",
        STEP,
        "self._probe_step(p1 - p0)  # V_safe",
        "self._probe_step(p0 - p1)",
        SIGN,
    ),
    mutant(
        "V's sign flipped, lagged",
        STEP,
        "self._probe_step(p1 - p0)  # V_t:",
        "self._probe_step(p0 - p1)  # V_t:",
        DENSE,
    ),
    mutant(
        "V added up over steps",
        STEP,
        "self.v = self._probe_step(p1 - p0)  # V_t:",
        "self.v = self.v + self._probe_step(p1 - p0)  # V_t:",
        DENSE,
    ),
    mutant(
        "exact starts from the last V",
        STEP,
        "zero = self.probe.zeros(self.engine.device)",
        "zero = self.v",
        DENSE,
    ),
    mutant(
        "perturbation downhill",
        STEP,
        "return self.section.eps * weight_norm",
        "return -self.section.eps * weight_norm",
        SIGN,
    ),
    mutant(
        "p(1) and p(0) on different batches",
        STEP,
        "shifted, p1 = self._probe_gradient(part, zero)",
        "shifted, p1 = self._probe_gradient(part[:-1], zero)",
        DENSE,
    ),
    mutant(
        "norms per tensor",
        STEP,
        "        return self.direction\n",
        "        return [part / part.norm().clamp(min=1e-30) for part in self.direction]\n",
        DENSE,
    ),
    mutant(
        "direction counted younger after resume",
        STEP,
        "self.direction_step, self.adam_count = int(direction_step),",
        "self.direction_step, self.adam_count = int(direction_step) + 1,",
        RESUMED,
    ),
    mutant(
        "direction lost on resume",
        STEP,
        'return {} if self.direction is None else {"direction": self.direction}',
        "return {}",
        RESUMED,
    ),
    mutant(
        "V lost on resume",
        STEP,
        "self.v, self.adam_mean, self.adam_square = (\n            state",
        "_, self.adam_mean, self.adam_square = (\n            state",
        RESUMED,
    ),
    mutant(
        "V's scale never moved",
        STEP,
        "self.scale *= factor",
        "self.scale *= 1.0",
        f"{DENSE}[target_correction-difference-exact]",
    ),
    mutant(
        "V's scale moved away from the target",
        STEP,
        "ratio = self.section.target_correction / max(correction, 1e-12)",
        "ratio = correction / self.section.target_correction",
        f"{DENSE}[target_correction-difference-lagged]",
    ),
    mutant(
        "V's scale lost on resume",
        STEP,
        "direction_step, self.scale, calibrated,",
        "direction_step, _, calibrated,",
        f"{RESUMED}::test_a_resumed_step_is_the_same_step[target_correction-exact]",
    ),
    mutant(
        "V's scale found anew on resume",
        STEP,
        "self.calibrated, self.checked, self.warned = bool(calibrated),",
        "self.calibrated, self.checked, self.warned = False,",
        f"{RESUMED}::test_a_resumed_step_is_the_same_step[target_correction-lagged]",
    ),
)

OF_THE_LOSSES = (
    mutant(
        "dropout masks differing",
        LOSSES,
        "        for generator in generators:\n            generator.manual_seed(seed)\n        yield\n    finally:\n"
        "        for generator, state in zip(generators, states, strict=True):\n            generator.set_state(state)",
        "        yield\n    finally:\n        pass",
        MASKS,
    ),
    mutant(
        "no causal shift", BATCHES, "following = labels[:, 1:]", "following = labels[:, :-1]", DENSE
    ),
    mutant("safety loss summed over tokens", LOSSES, "(sums / counts).split", "sums.split", DENSE),
    mutant(
        "loss not weighted by tokens",
        BATCHES,
        "batches.append(MicroBatch(*tensors, global_tokens,",
        "batches.append(MicroBatch(*tensors, sum(map(_supervised, labels)) * len(indices) // len(chunk),",
        DENSE,
    ),
    mutant(
        "fillers counted as pairs", LOSSES, "(values * batch.weights).sum()", "values.sum()", SHARED
    ),
    mutant("a budget's fillers counted", BATCHES, "([shortest], 0.0)", "([shortest], 1.0)", BUDGET),
    mutant(
        "packed samples see each other",
        "pipeline/objectives/packed.py",
        "samples = None if packed is None else packed.samples",
        "samples = None",
        f"{PACKED}::test_every_packable_type_keeps_samples_apart[llama]",
    ),
    mutant(
        "positions go on over packed samples",
        BATCHES,
        "positions = torch.arange(len(numbers)) - borders[numbers]",
        "positions = torch.arange(len(numbers))",
        f"{PACKED}::test_no_sample_foretells_the_next_ones_first_token",
    ),
    mutant(
        "packed samples foretell the next one",
        BATCHES,
        "following[np.cumsum([0, *map(len, labels[:-1])])] = IGNORE",
        "pass",
        f"{PACKED}::test_every_packable_type_keeps_samples_apart[llama]",
    ),
    mutant(
        "chunks of logits: no token is the right one",
        HEAD,
        "(len(tokens), 1), -1.0",
        "(len(tokens), 1), 0.0",
        HEADS,
    ),
    mutant(
        "chunks of logits: tokens weigh alike",
        HEAD,
        "(gradient.to(upstream.dtype) * upstream[:, None]).to(gradient.dtype)",
        "gradient",
        HEADS,
    ),
)

OF_THE_ENGINES = (
    mutant(
        "norms of one rank only",
        ENGINE,
        "total += torch.dot(x.double(), y.double())\n        return self.sum_over_ranks(total)",
        "total += torch.dot(x.double(), y.double())\n        return total",
        VECTORS + ON_ZERO3,
    ),
    mutant(
        "zero3: gathered copies not dropped",
        ZERO3,
        "self._partitions.drop_gathered()",
        "pass",
        parity(engine="zero3", persistence=True, adapter="lora", ranks=2),
    ),
    mutant(
        "zero3: padding not masked",
        ZERO3,
        "valid = min(max(cut.numel - self.rank * cut.padded, 0), cut.padded)",
        "valid = cut.padded",
        VECTORS + ON_ZERO3,
    ),
    mutant(
        "zero3: auxiliary gradients not cleared",
        ZERO3,
        "        self._partitions.gradient.zero_()\n",
        "",
        TRACES + ON_ZERO3,
    ),
    mutant(
        "zero3: probe gradients not reduced",
        ZERO3,
        "return self.sum_over_ranks(total), self.sum_over_ranks(gradient)",
        "return self.sum_over_ranks(total), gradient",
        ZERO3_EXACT,
    ),
    mutant(
        "zero3: world size missing in the loss",
        ZERO3,
        "self.ds.backward(loss * self.world_size,",
        "self.ds.backward(loss,",
        ZERO3_EXACT,
    ),
    mutant(
        "zero3: world size missing in the lagged V",
        ZERO3,
        "[row.grad for row in v]) / self.world_size",
        "[row.grad for row in v])",
        parity(engine="zero3", ranks=2, schedule="lagged", adapter="wide", accumulation=1),
    ),
    mutant(
        "zero3: restored by subtracting",
        ZERO3,
        "for lp, saved in zip(self._partitions.compute, stash, strict=True):\n                lp.copy_(saved)",
        "for lp, d in zip(self._partitions.compute, direction, strict=True):\n                "
        "lp.sub_(scale * d.to(lp.device))",
        RESTORE + ON_ZERO3,
    ),
    mutant(
        "zero3: auxiliary pass taken for the step's end",
        ZERO3,
        "set_gradient_accumulation_boundary(ends_step and number",
        "set_gradient_accumulation_boundary(number",
        TRACES + "[zero3-offload]",
    ),
    # Either alone changes nothing, and where a safety gradient comes between not even both:
    # whoever clears, clears for the next.
    Mutant(
        "zero3: probe pass through the engine, main pass without clearing",
        (
            (
                ZERO3,
                "loss = loss_fn(self.module, batch.to(self.device))\n            # Scaled",
                "loss = loss_fn(self.ds, batch.to(self.device))\n            # Scaled",
            ),
            (
                ZERO3,
                "        self._clear_gradient()\n        loss = self._backward(loss_fn, batches, ends_step=True,",
                "        loss = self._backward(loss_fn, batches, ends_step=True,",
            ),
        ),
        (parity(engine="zero3", ranks=2, schedule="reused"),),
    ),
    mutant(
        "fsdp2: not resharded",
        FSDP2,
        "                module.reshard()",
        "                pass",
        RESTORE + "[fsdp2-full]",
    ),
    mutant(
        "fsdp2: auxiliary gradients not cleared",
        AUTOGRAD,
        "        self.discard()\n        return loss, shard",
        "        if self.world_size == 1:  # the reference, which is `single`\n            "
        "self.discard()\n        return loss, shard",
        FSDP2_EXACT,
    ),
    mutant(
        "fsdp2: gradients of an adapter never reduced",
        FSDP2,
        "last or not self._at_once",
        "not self._at_once",
        "tests/distributed/test_fetching.py::test_fsdp2_reduces_an_adapter_s_gradients_once_a_step[lora]",
    ),
    mutant(
        "frozen layers: none is fetched ahead",
        FROZEN,
        "            self.layers[ahead].gather()\n",
        "            pass\n",
        FETCHED_AHEAD,
    ),
    mutant(
        "frozen layers: used before they are there",
        FROZEN,
        "        self.layers[number].wait()\n",
        "",
        FETCHED_AHEAD,
    ),
    mutant(
        "frozen layers: their memory is not given back",
        FROZEN,
        "            if other not in (number, ahead):\n",
        "            if False:\n",
        FETCHED_AHEAD,
    ),
    mutant(
        "frozen layers: a layer computed again in a backward pass fetches the one above it",
        FROZEN,
        "if number == self._at and number > 0:",
        "if False:",
        "tests/distributed/test_frozen.py::test_the_next_layer_is_on_its_way_while_one_works[fsdp2-around]",
    ),
    mutant(
        "frozen layers: every rank keeps the first one's part",
        FROZEN,
        "dist.get_rank() * held",
        "0 * held",
        "tests/distributed/test_frozen.py::test_each_rank_keeps_its_part_and_the_engine_sees_the_rest[fsdp2]",
    ),
    mutant(
        "frozen layers: what two layers share is cut with one of them",
        FROZEN,
        "and n == uses[id(p)] and",
        "and",
        "tests/distributed/test_frozen.py::test_one_rank_fetches_nothing_and_what_layers_share_stays",
    ),
    mutant(
        "zero3: gradients of earlier micro-batches lost",
        ZERO3,
        "loss = _WithGradients.apply(loss, gradients, *used)",
        "pass",
        "tests/distributed/test_fetching.py::test_zero3_reduces_an_adapter_s_gradients_once_a_step_and_loses_none",
    ),
    mutant(
        "zero3: tensors fetched one by one",
        "pipeline/engines/deepspeed_private.py",
        "set_z3_leaf_module(block, True)",
        "set_z3_leaf_module(block, False)",
        "tests/distributed/test_fetching.py::test_the_next_layer_is_on_its_way_while_one_works[lora]",
    ),
    mutant(
        "fsdp2: probe gradients not reduced",
        AUTOGRAD,
        "return self.sum_over_ranks(total), self.sum_over_ranks(gradient)",
        "return self.sum_over_ranks(total), gradient",
        FSDP2_EXACT,
    ),
    mutant(
        "fsdp2: gradients averaged",
        FSDP2,
        "sharded.set_gradient_divide_factor(1.0)",
        "sharded.set_gradient_divide_factor(2.0)",
        FSDP2_EXACT,
    ),
    mutant(
        "fsdp2: restored by subtracting",
        AUTOGRAD,
        "for local, saved in zip(self.storage(), stash, strict=True):\n                local.copy_(saved)",
        "for local, d in zip(self.storage(), direction, strict=True):\n                "
        "local.sub_(d.view_as(local), alpha=scale)",
        RESTORE + ON_FSDP2,
    ),
    mutant(
        "fsdp2: not clipped",
        FSDP2,
        "clip(held, self.gradient_norm().item() if norm is None else norm, self.max_grad_norm)",
        "pass",
        parity(engine="fsdp2", ranks=2, clipping=True),
    ),
    mutant(
        "every rank takes the same micro-batches",
        BATCHES,
        "if number % world_size == rank:\n            ids, labels",
        "if number % world_size == 0:\n            ids, labels",
        SHARED + "::test_small_sets_are_filled_up_with_what_weighs_nothing",
    ),
)

COMPANIONS = "tests/unit/defences/test_companions.py::"
ON_TWO_RANKS = "tests/distributed/test_sharded.py::test_companion_methods_on_two_ranks_equal_the_dense_reference"
REPLACED = "tests/distributed/test_sharded.py::test_replaced_weights_are_seen_and_gone_bit_for_bit"
SAFE_MIX, SAFETY_GRADIENT, LISA = (
    f"pipeline/defences/{name}/step.py" for name in ("safe_mix", "safety_gradient", "lisa")
)
EMA = "pipeline/defences/ema/average.py"
SAFT = "pipeline/defences/saft/saft.py"

OF_THE_COMPANIONS = (
    mutant(
        "replaced weights not put back",
        ENGINE,
        "for tensor, saved in zip(self.storage(), stash, strict=True):\n                tensor.copy_(saved)",
        "pass",
        COMPANIONS + "test_an_exception_inside_leaves_the_weights_as_they_were",
    ),
    mutant(
        "zero3: new weights in the master only",
        ZERO3,
        "            lp.copy_(master)\n\n    def storage",
        "\n    def storage",
        REPLACED + ON_ZERO3,
    ),
    mutant(
        "zero3: added gradient not offloaded again",
        ZERO3,
        "            self._partitions.offload_gradient(\n                [parameter for parameter "
        "in self._names if parameter.requires_grad]\n            )\n",
        "            pass\n",
        ON_TWO_RANKS + "[lisa-zero3-offload]",
    ),
    mutant(
        "tokens of a mix counted on one rank",
        SAFE_MIX,
        "total = engine.sum_over_ranks(\n        torch.tensor(float(own), dtype=torch.float64, "
        "device=engine.device)\n    )",
        "total = torch.tensor(float(own))",
        ON_TWO_RANKS + "[safe_mix-fsdp2]",
    ),
    mutant(
        "rejected responses mixed in",
        SAFE_MIX,
        "batch.labels[:n], 0",
        "batch.labels[n:], 0",
        COMPANIONS + "test_only_the_safe_side_is_mixed_in",
    ),
    mutant(
        "Lisa's w_last never moves",
        LISA,
        "if position in (0, section.alignment_steps):",
        "if number == 0:",
        COMPANIONS + "test_a_method_equals_the_dense_reference[lisa]",
    ),
    mutant(
        "safety gradient ascended",
        SAFETY_GRADIENT,
        "self.engine.add_gradient(self.direction, weight)",
        "self.engine.add_gradient(self.direction, -weight)",
        COMPANIONS + "test_the_safety_gradient_has_the_size_asked_for",
    ),
    mutant(
        "average begins at zero",
        EMA,
        "None if section.warmup_steps else engine.weights()",
        "None if section.warmup_steps else [w * 0 for w in engine.weights()]",
        COMPANIONS + "test_the_average_has_its_closed_form",
    ),
    mutant(
        "average lost on resume",
        EMA,
        'self.average = vectors.get("average")',
        "self.average = self.engine.weights()",
        COMPANIONS + "test_a_resumed_run_ends_as_the_straight_one[lisa-shadow]",
    ),
    mutant(
        "embeddings not centred",
        SAFT,
        "centred = embeddings.double() - embeddings.double().mean(dim=0)",
        "centred = embeddings.double()",
        "tests/unit/defences/test_saft.py::test_scores_equal_numpy_s",
    ),
)

CHAT, TEMPLATE, OVERLAP, SPLITS, ROWS, TEXT_ROWS, SOURCES, PREPARE = (
    f"pipeline/data/{name}.py"
    for name in (
        "chat",
        "chat_template",
        "overlap",
        "splits",
        "rows",
        "text_rows",
        "sources",
        "prepare",
    )
)
CONTRACT = "tests/unit/data/test_fuzz.py::test_a_random_template_is_held_to_the_contract_or_refused"
FAMILIES = (
    "tests/unit/data/test_templates.py::test_what_is_trained_is_what_inference_has_to_produce"
)
SHARED_PROMPTS = "tests/unit/data/test_overlap.py"

OF_THE_DATA = (
    mutant(
        "prompts of training without the opening of the answer",
        TEMPLATE,
        "text = self.renderer.render(messages, tools, generation=True)\n        for message",
        "text = self.renderer.render(messages, tools)\n        for message",
        FAMILIES + "[byte level-phi 4-one turn]",
    ),
    mutant(
        "ends of turn not trained", TEMPLATE, 'return min(places), ""', 'return 0, ""', CONTRACT
    ),
    mutant(
        "no end where the template has none",
        TEMPLATE,
        "rstrip()), self.tokenizer.eos_token",
        'rstrip()), ""',
        CONTRACT,
    ),
    mutant(
        "an opened thought not closed",
        TEMPLATE,
        "        if opened is None:\n",
        "        if True:\n",
        "tests/unit/data/test_templates.py::test_a_thought_that_the_prompt_opens_is_closed",
    ),
    mutant(
        "answers trimmed",
        TEMPLATE,
        "return self._after_thought(lead, content, last, prompt) + self._end(tail)",
        "return self._after_thought(lead, content.strip(), last, prompt) + self._end(tail)",
        CONTRACT,
    ),
    mutant(
        "past turns in one sequence whatever inference sees",
        CHAT,
        "if found and prompt[: len(found[-1][0])] == found[-1][0]:",
        "if found:",
        FAMILIES + "[byte level-tulu 2-several turns]",
    ),
    mutant(
        "a merge over the border of prompt and answer",
        CHAT,
        "if whole[: len(before)] != before:",
        "if not whole:",
        "tests/unit/data/test_chat.py::test_tokens_that_would_merge_at_the_border_do_not",
    ),
    mutant(
        "text of the user in answers",
        TEMPLATE,
        "        if opening[1] and between[1]:\n            lead = _after(opening[2], between[2])",
        "        if opening[1] and between[1]:\n            lead = opening[1] + between[2]",
        FAMILIES + "[byte level-qwen 2.5-one turn]",
    ),
    mutant(
        "conversations known by their last turn",
        OVERLAP,
        "*begun, whole = _prefixes(_messages(row))",
        "*begun, whole = _prefixes(_messages(row)[-1:])",
        SHARED_PROMPTS,
    ),
    mutant(
        "answers to one prompt in several splits",
        SPLITS,
        "groups.setdefault(conversation(row), [])",
        "groups.setdefault(str(id(row)), [])",
        SHARED_PROMPTS,
    ),
    mutant(
        "malformed rows vanish",
        ROWS,
        "bad.append(problem)",
        "pass",
        "tests/unit/data/test_malformed.py::test_prepare_writes_what_it_left_out_into_the_manifest_and_a_list",
    ),
    mutant(
        "numbers in other words",
        TEXT_ROWS,
        "parse_float=_Written",
        "parse_float=float",
        "tests/unit/data/test_text_rows.py::test_numbers_keep_their_wording[d.json]",
    ),
    mutant(
        "classes by their numbers",
        SOURCES,
        "names = table.labels.get(column, [])",
        "names = []",
        "tests/unit/data/test_files.py::test_a_class_is_trained_by_its_name_and_a_label_of_harm_by_its_number[parquet]",
    ),
    mutant(
        "unwanted answers trained",
        SOURCES,
        "if row.get(label) is False]",
        "if row.get(label) is not None]",
        "tests/unit/data/test_malformed.py::test_answers_that_nobody_wants_are_refused_unless_columns_are_named",
    ),
    mutant(
        "rows that cannot be rendered vanish",
        PREPARE,
        'self.skipped.add(name, source, Bad(place, "cannot be rendered", str(error)))',
        "pass",
        "tests/unit/data/test_malformed.py::test_a_row_that_cannot_be_rendered_is_left_out_up_to_the_share[0.02]",
    ),
)

OF_THE_PROCESSES = (
    mutant(
        "jobs keep the warm parent's environment",
        FORK_SERVER,
        "    os.environ.clear()\n",
        "",
        INHERITED,
    ),
    mutant(
        "jobs draw the same random numbers",
        FORK_SERVER,
        'sys.modules["torch"].default_generator.seed()',
        "pass",
        INHERITED,
    ),
    mutant(
        "one warm parent for every number of threads",
        WARM,
        'threads = environment.get("OMP_NUM_THREADS")',
        "threads = None",
        INHERITED,
    ),
    Mutant(
        "jobs outlive the command that was killed",
        (
            (FORK_SERVER, "prctl(SET_PDEATHSIG, signal.SIGTERM)", "pass"),
            ("pipeline/running/stop_signals.py", "prctl(SET_PDEATHSIG, signal.SIGTERM)", "pass"),
        ),
        (
            "tests/unit/running/test_warm.py::test_jobs_go_with_the_program_that_started_them_and_may_save_first[9-warm]",
        ),
    ),
    mutant(
        "a process with a second thread is forked",
        FORK_SERVER,
        "    if others:\n",
        "    if False:\n",
        "tests/unit/running/test_warm.py::test_what_cannot_be_forked_is_said_once_and_jobs_import_for_themselves[thread]",
    ),
    mutant(
        "a start from another adapter's checkpoint",
        "pipeline/training/checkpoint_folders.py",
        "if written.get(field) != own:",
        'if field == "model" and written.get(field) != own:',
        f"{RESTARTED}::test_a_checkpoint_that_does_not_go_with_the_run_is_refused[adapter]",
    ),
    mutant(
        "what is skipped depends on where the run was stopped",
        "pipeline/training/spikes.py",
        '            self.seen(metrics, int(metrics["step"]) - 1)',
        "            pass",
        f"{RESTARTED}::test_a_spike_s_update_is_left_out_wherever_the_run_was_stopped",
    ),
)

MUTANTS = (
    OF_THE_STEP
    + OF_THE_LOSSES
    + OF_THE_ENGINES
    + OF_THE_COMPANIONS
    + OF_THE_DATA
    + OF_THE_PROCESSES
)
