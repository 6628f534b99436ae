"""From the sound lines of a job to a plan that fits: tokenise, find the forest, plan, simulate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from batchrun.config import COMPLETIONS_MAX_TOKENS, RunConfig
from batchrun.execution.loop import run_loop
from batchrun.execution.simulate import SimulatedWorker
from batchrun.execution.timeline import Timeline
from batchrun.formats.job import JobLint
from batchrun.formats.plan import PlanFile
from batchrun.intake import Intake, read_requests
from batchrun.models import load_device_spec
from batchrun.planning.cost import CostModel, Work
from batchrun.planning.memory import MemoryBudget, make_budget
from batchrun.planning.order import AUTO, CANDIDATES, units
from batchrun.planning.planner import Plan, PlanOptions, fit_to_pool, in_order, make_plan
from batchrun.prefix.duplicates import first_alike
from batchrun.prefix.forest import PrefixForest, build_forest
from batchrun.prefix.groups import PrefixGroups
from batchrun.report.records import (
    BoundSeconds,
    Estimate,
    GroupSummary,
    KvUse,
    OrderTried,
    StepLog,
    TokenCounts,
    Warned,
    largest_groups,
)
from batchrun.request import Answers, JobLine, LineFault, Requests
from batchrun.schedule.scheduler import Scheduler
from batchrun.specs import DeviceSpec
from batchrun.subject import Fingerprint, Subject
from batchrun.tokenizer import Tokenizer, load_tokenizer

Int32 = npt.NDArray[np.int32]

SIMULATED = 100_000  # requests of a job that are simulated at most
COMPARED = 10_000  # requests that orders are compared on at most
_CLEARLY = 0.995  # an order must take less than this share of the time of the one before it


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that is ready to run: `requests` are computed, and give all `answers`."""

    tokenizer: Tokenizer
    requests: Requests
    answers: Answers
    plan: Plan
    cost: CostModel
    faults: list[LineFault]
    silent: int
    clipped: int
    clipped_to_pool: int
    calls_not_read: int
    seconds: dict[str, float]

    @property
    def prompt_logical(self) -> int:
        """Prompt tokens of all answers, those of duplicates too."""
        return int(self.requests.tokens.lengths[self.answers.request].sum())

    @property
    def duplicates(self) -> int:
        """Answers that are not computed, since another one must be the same."""
        return len(self.answers) - len(self.requests)


def prepare(
    subject: Subject, lines: Iterator[JobLine], config: RunConfig, device: DeviceSpec | None = None
) -> tuple[Prepared, PrefixForest]:
    """Tokenise, find the forest, plan.

    Args:
        device: to plan for; if None, the one that the configuration names.

    Returns:
        The job, and the forest of its requests, which to run them nobody needs.
    """
    began = perf_counter()
    tokenizer = load_tokenizer(subject.model.path, config.chat_template)
    intake = read_requests(lines, tokenizer, subject.spec, subject.generation_config, config)
    tokenized = perf_counter()

    device = device or load_device_spec(config.device_spec or subject.device)
    cost = CostModel(subject.spec, device, subject.dtype)
    budget = make_budget(
        subject.spec, device, subject.dtype, kv_memory=config.kv_memory, page_size=config.scheduler.page_size
    )
    options = PlanOptions(
        schedule_order=config.schedule_order,
        grouping=config.scheduler.grouping,
        step_tokens=config.scheduler.step_tokens or device.step_tokens,
        **({"first_guess": config.scheduler.expected_tokens} if config.scheduler.expected_tokens else {}),
        seed=config.seed,
        probe=config.scheduler.probe,
    )
    fitting = plan_what_fits(intake, cost, budget, options, deduplicate=config.scheduler.deduplicate)
    prepared = Prepared(
        tokenizer=tokenizer,
        requests=fitting.requests,
        answers=fitting.answers,
        plan=fitting.plan,
        cost=cost,
        faults=sorted([*intake.faults, *fitting.faults], key=lambda fault: fault.number),
        silent=intake.silent,
        clipped=intake.clipped,
        clipped_to_pool=fitting.clipped,
        calls_not_read=intake.calls_not_read,
        seconds={"tokenize": tokenized - began, "plan": perf_counter() - tokenized},
    )
    return prepared, fitting.forest


@dataclass(frozen=True, slots=True)
class Fitting:
    """What of a job fits into the KV pool, planned.

    Attributes:
        requests: that are computed.
        answers: that they give.
        forest: of the requests.
        plan: of the requests.
        faults: of lines that can never run in this pool.
        clipped: answers whose limit, which nobody set, was cut to the pool.
    """

    requests: Requests
    answers: Answers
    forest: PrefixForest
    plan: Plan
    faults: list[LineFault]
    clipped: int


def plan_what_fits(
    intake: Intake, cost: CostModel, budget: MemoryBudget, options: PlanOptions, *, deduplicate: bool = True
) -> Fitting:
    """Plan; requests that the KV pool can never hold become faults of their lines, and the rest is planned again.

    Prefixes take whole pages of their own. Where a request fits into the pool alone and not beside them, the pool is
    so small that nothing is shared.

    Args:
        deduplicate: whether requests that must have the same answer are computed once.
    """
    asked, defaulted = intake.requests, intake.defaulted
    limits = asked.max_new_tokens.copy()
    faults: list[LineFault] = []
    while True:
        requests, forest, kept, given_by = _fold(asked, defaulted, deduplicate)
        planned = make_plan(requests, forest, cost, budget, options)
        clipped, misfits = fit_to_pool(planned.groups, requests, budget, defaulted[kept])
        asked.max_new_tokens[:] = requests.max_new_tokens[given_by]
        if clipped:
            continue  # shorter answers may be grouped in another way, which must fit too
        if not misfits.any():
            cut = int((asked.max_new_tokens < limits).sum())
            return Fitting(requests, Answers.of(asked, given_by), forest, planned, faults, cut)
        if options.grouping != "none":
            alone = requests.tokens.lengths + np.where(defaulted[kept], 1, requests.max_new_tokens) - 1
            if (alone[misfits] <= budget.pages * budget.page_size).any():
                options = replace(options, grouping="none")
                continue
        lines = np.unique(asked.line[misfits[given_by]])
        most = np.zeros(len(asked.custom_ids), dtype=np.int64)
        np.maximum.at(most, asked.line, asked.tokens.lengths + asked.max_new_tokens)
        for line, tokens in zip(lines.tolist(), most[lines].tolist(), strict=True):
            faults.append(
                LineFault(
                    int(asked.line_numbers[line]),
                    asked.custom_ids[line],
                    "context_length_exceeded",
                    f"prompt and answer may take {tokens} tokens, and the KV memory holds "
                    f"{budget.pages * budget.page_size}; raise --kv-memory or lower max_tokens",
                    "max_tokens",
                )
            )
        rest = np.flatnonzero(~np.isin(asked.line, lines))
        asked, defaulted, limits = asked.take(rest), defaulted[rest], limits[rest]


def _fold(
    asked: Requests, defaulted: npt.NDArray[np.bool_], deduplicate: bool
) -> tuple[Requests, PrefixForest, npt.NDArray[np.int64], Int32]:
    """Without duplicates: the requests that are left, their forest, which of `asked` they are, and which of them gives
    the answer of each of `asked`."""
    forest = build_forest(asked.tokens)
    own = np.arange(len(asked), dtype=np.int32)
    alike = first_alike(asked, forest, defaulted) if deduplicate else own
    kept = np.flatnonzero(alike == own)
    if kept.size == own.size and not asked.scored.any():
        return asked, forest, kept, own
    requests = asked.take(kept)
    return requests, build_forest(requests.tokens, requests.scored), kept, np.searchsorted(kept, alike).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of a simulation.

    Attributes:
        log: its steps, with the seconds expected.
        work: of all of them.
        requests: how many were simulated.
        scale: rows of the whole job for each row of what was simulated; 1 unless it was a part.
        first_step, last_step: int32 `[R]`, the steps in which each request first and last had rows; -1 for requests
            that were not simulated.
    """

    log: StepLog
    scheduler: Scheduler
    work: Work
    requests: int
    scale: float
    first_step: Int32
    last_step: Int32

    @property
    def seconds(self) -> float:
        """Expected for the whole job."""
        return self.scale * float(self.log.columns["seconds"].sum())


def simulate(prepared: Prepared, most: int = SIMULATED) -> Simulated:
    """The steps of a plan, from the scheduler itself.

    Args:
        most: requests to simulate about at most; of a larger job a random part, whole groups of it.
    """
    if len(prepared.requests) > most:
        part, rows = _part(prepared, most)
        simulated = simulate(part, len(part.requests))
        first, last = (np.full(len(prepared.requests), -1, dtype=np.int32) for _ in range(2))
        first[rows], last[rows] = simulated.first_step, simulated.last_step
        scale = _expected_rows(prepared) / _expected_rows(part)
        return replace(simulated, scale=scale, first_step=first, last_step=last)
    plan, cost = prepared.plan, prepared.cost
    work = Work()

    def price(done: Work) -> float:
        nonlocal work
        work += done
        return cost.seconds(done)

    timeline = Timeline(len(prepared.requests))
    scheduler = Scheduler(plan, prepared.requests)
    worker = SimulatedWorker(plan.expected_new_tokens, price)
    end = run_loop(scheduler, worker, on_step=lambda step, output: timeline.step(step))
    return Simulated(end.log, scheduler, work, len(prepared.requests), 1.0, timeline.first, timeline.last)


def _part(prepared: Prepared, most: int) -> tuple[Prepared, npt.NDArray[np.int64]]:
    """Some lines of a job, drawn by whole groups, planned as the job is; and which requests they have. Of a group
    that is larger than that, some of its lines, evenly."""
    requests, groups, options = prepared.requests, prepared.plan.groups, prepared.plan.options
    budget = prepared.plan.budget
    unit = units(groups, budget.pages * budget.page_size)[0]
    names, of_request, sizes = np.unique(unit, return_inverse=True, return_counts=True)
    drawn = np.random.default_rng(0).permutation(names.size)
    whole = int((np.cumsum(sizes[drawn]) <= most).sum())
    if whole:
        inside = np.zeros(names.size, dtype=bool)
        inside[drawn[:whole]] = True
        chosen = np.flatnonzero(inside[of_request])
    else:
        members = np.flatnonzero(of_request == drawn[0])
        members = members[np.argsort(groups.request_rank[members])]
        count = max(most * np.unique(requests.line).size // len(requests), 1)  # a line may have many requests
        chosen = members[np.linspace(0, members.size - 1, min(count, members.size)).astype(np.int64)]
    lines = np.unique(requests.line[chosen]).astype(np.int64)
    rows = np.flatnonzero(np.isin(requests.line, lines))
    taken = requests.take_lines(lines)
    plan = make_plan(taken, build_forest(taken.tokens, taken.scored), prepared.cost, prepared.plan.budget, options)
    return replace(prepared, requests=taken, plan=plan), rows


def _expected_rows(prepared: Prepared) -> int:
    """Rows that a job computes if nothing is computed twice."""
    plan, requests = prepared.plan, prepared.requests
    own = requests.tokens.lengths - plan.groups.request_depth
    return int(plan.groups.length.sum() + own.sum() + plan.expected_new_tokens.sum(dtype=np.int64))


def choose_order(prepared: Prepared) -> tuple[Prepared, tuple[OrderTried, ...]]:
    """Put requests into the order whose simulation is shortest, where the order was left to `auto`.

    Returns:
        The job in that order, and the orders that were tried, shortest first; none where the order was given.
    """
    if prepared.plan.options.schedule_order != AUTO or not len(prepared.requests):
        return prepared, ()
    part = _part(prepared, COMPARED)[0] if len(prepared.requests) > COMPARED else prepared
    scale = _expected_rows(prepared) / _expected_rows(part)
    found = []
    for name in CANDIDATES:
        simulated = replace(simulate(_in_order(part, name), len(part.requests)), scale=scale)
        found.append(tried(name, simulated))
    # An order that is not clearly shorter than one before it is not taken.
    best = found[0]
    for order in found[1:]:
        if order.seconds < _CLEARLY * best.seconds:
            best = order
    ranked = sorted(found, key=lambda order: (order is not best, order.seconds))
    return _in_order(prepared, best.name), tuple(ranked)


def _in_order(prepared: Prepared, name: str) -> Prepared:
    options = replace(prepared.plan.options, schedule_order=name)
    plan = replace(prepared.plan, options=options)
    return replace(prepared, plan=in_order(plan, prepared.requests))


def plan_file(
    prepared: Prepared,
    simulated: Simulated,
    orders: tuple[OrderTried, ...],
    subject: Subject,
    fingerprint: Fingerprint,
) -> PlanFile:
    planned, counters, scale = prepared.plan, simulated.scheduler.counters, simulated.scale
    tokens = TokenCounts(
        prepared.prompt_logical,
        planned.prompt_physical,
        round(scale * counters.prompt_computed),
        round(scale * counters.sampled),
    )
    return PlanFile(
        requests=len(prepared.requests),
        duplicates=prepared.duplicates,
        tokens=tokens,
        saving=tokens.saving,
        groups=summaries(planned.groups),
        schedule_order=planned.options.schedule_order,
        grouping=planned.options.grouping,
        steps=round(scale * len(simulated.log)),
        rows=round(scale * int(simulated.log.columns["rows"].sum())),
        step_tokens=planned.options.step_tokens,
        kv=KvUse(planned.budget.page_size, planned.budget.pages, simulated.scheduler.pool.peak_used),
        expected=estimate(prepared, simulated),
        orders=orders or (tried(planned.options.schedule_order, simulated),),
        model=subject.name,
        dtype=subject.dtype,
        fingerprint=fingerprint,
    )


def estimate(prepared: Prepared, simulated: Simulated) -> Estimate:
    """How long a job is expected to take."""
    cost = prepared.cost
    seconds, scale = simulated.seconds, simulated.scale
    low, high = cost.spread(seconds)
    bound = bound_of(simulated.work, cost)
    return Estimate(
        seconds=seconds,
        low=low,
        high=high,
        bound_compute=scale * bound.compute,
        bound_memory=scale * bound.memory,
        bound_weights=scale * bound.weights,
        device=cost.device.name,
        hardware=cost.device.hardware,
        calibrated=cost.fitted,
        requests=simulated.requests,
    )


def bound_of(work: Work, cost: CostModel) -> BoundSeconds:
    """The least time that the device's peaks allow for work."""
    bound = cost.bound(work)
    return BoundSeconds(bound.compute, bound.memory, weights=cost.bound(Work(steps=work.steps)).memory)


def tried(name: str, simulated: Simulated) -> OrderTried:
    """A schedule order as it was simulated."""
    counters = simulated.scheduler.counters
    return OrderTried(
        name=name,
        seconds=simulated.seconds,
        steps=round(simulated.scale * len(simulated.log)),
        prompt_computed=round(simulated.scale * counters.prompt_computed),
        peak_pages=simulated.scheduler.pool.peak_used,
        evictions=round(simulated.scale * counters.prefix_evictions),
    )


def summaries(groups: PrefixGroups) -> tuple[GroupSummary, ...]:
    depth = (groups.depth + groups.length).tolist()
    return largest_groups(
        GroupSummary(group, tokens, requests)
        for group, (tokens, requests) in enumerate(zip(depth, groups.requests.tolist(), strict=True))
    )


def mismatches(lint: JobLint, subject: Subject) -> Warned | None:
    """Lines that name another model than the one they are run with, in `body.model`."""
    others = {name: count for name, count in lint.models.items() if name != subject.name}
    if not others:
        return None
    most = max(others, key=lambda name: others[name])
    return Warned(
        "model_mismatch",
        sum(others.values()),
        f"model names another model than {subject.name!r} (most often {most!r}), which all lines are run with",
    )


def warnings_of(lint: JobLint, prepared: Prepared, subject: Subject, config: RunConfig) -> list[Warned]:
    """What a person should know, each kind once."""
    warnings = [
        *lint_warnings(lint, subject),
        *model_warnings(subject, config),
        *intake_warnings(prepared.silent, prepared.clipped, prepared.calls_not_read),
    ]
    if prepared.clipped_to_pool:
        warnings.append(
            Warned(
                "max_tokens_clipped_to_memory",
                prepared.clipped_to_pool,
                "an answer that the line itself does not limit may end early, where the KV memory ends; raise "
                "--kv-memory",
            )
        )
    return warnings


def lint_warnings(lint: JobLint, subject: Subject | None) -> list[Warned]:
    """What the lines themselves show, and what the model's name does where there is a model."""
    warnings = [
        Warned("unknown_field", count, f"field {name!r} is not known and was ignored")
        for name, count in lint.unknown_fields.most_common(20)
    ]
    mismatch = mismatches(lint, subject) if subject is not None else None
    return [*warnings, mismatch] if mismatch is not None else warnings


# What `generate` of transformers, or vLLM, reads in generation_config.json besides what we do, with the values at which
# it changes nothing.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale", "typical_p"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens", "diversity_penalty"), (0,)),
    **dict.fromkeys(("penalty_alpha", "epsilon_cutoff", "eta_cutoff", "presence_penalty", "frequency_penalty"), (0,)),
    **dict.fromkeys(("max_new_tokens", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), ([],)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "stop_strings"), ([],)),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "top_h"), ([],)),
}


def model_warnings(subject: Subject, config: RunConfig) -> list[Warned]:
    """What the model's `generation_config.json` asks for in vain."""
    if config.ignore_generation_config:
        return []
    asked = subject.generation_config
    names = [name for name, neutral in _NOT_APPLIED.items() if asked.get(name) not in (None, *neutral)]
    if not names:
        return []
    told = ", ".join(f"{name} = {asked[name]!r:.40}" for name in sorted(names))
    words = f"the model's generation_config.json has what is not applied: {told}"
    return [Warned("generation_config", len(names), words)]


def intake_warnings(silent: int, clipped: int, calls_not_read: int) -> list[Warned]:
    """What came of token limits and tools, as counted by `Intake`."""
    warnings = []
    if silent:
        warnings.append(
            Warned(
                "max_tokens_default",
                silent,
                f"no max_tokens: a completion gets {COMPLETIONS_MAX_TOKENS}, a chat what is left of the context; "
                "--max-tokens sets another limit",
            )
        )
    if clipped:
        warnings.append(Warned("max_tokens_clipped", clipped, "max_tokens reaches past the context and was cut to it"))
    if calls_not_read:
        warnings.append(
            Warned(
                "tool_calls_not_read",
                calls_not_read,
                "how this model writes calls of tools is not known from its chat template; they stay in the text",
            )
        )
    return warnings
