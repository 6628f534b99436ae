"""The plan of a job: what is shared, in which order it runs, in how much memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from batchrun.errors import UsageError
from batchrun.planning.cost import CostModel
from batchrun.planning.lengths import FIRST_GUESS, OutputLengths, known_lengths
from batchrun.planning.memory import MemoryBudget
from batchrun.planning.order import AUTO, ORDERS, OrderContext, choose_probe
from batchrun.prefix.forest import PrefixForest
from batchrun.prefix.groups import GROUPINGS, GroupCosts, PrefixGroups, choose_groups
from batchrun.request import Requests


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What of a plan the user may set.

    Attributes:
        schedule_order: a name in `planning.order.ORDERS`, or `auto`: `dfs` then stands until the orders are compared
            (`prepare.choose_order`).
        grouping: a name in `prefix.groups.GROUPINGS`.
        step_tokens: rows of a step beyond which no prefill is added.
        first_guess: expected tokens of an answer, until answers have been seen.
        seed: of the `shuffle` order and of the probe.
        probe: share of the requests of each unit to run first, so that lengths are known when the rest is ordered.
    """

    schedule_order: str
    grouping: str
    step_tokens: int
    first_guess: int = FIRST_GUESS
    seed: int = 0
    probe: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, before it is done; a value.

    Attributes:
        groups: the shared prefixes and who reads them.
        order: int32 `[R]`, the requests in the order in which they are admitted.
        probe: how many of them, from the first on, are run to learn lengths; the rest is then ordered anew.
        budget: memory; the pool is no larger than the job can use.
        expected_new_tokens: int32 `[R]`.
        options: as given.
        costs: what the choice of groups and orders weighs.
        prompt_logical: tokens of all prompts.
        prompt_physical: tokens of the forest: every shared run once.
        saving: 1 - physical / logical.
    """

    groups: PrefixGroups
    order: npt.NDArray[np.int32]
    probe: int
    budget: MemoryBudget
    expected_new_tokens: npt.NDArray[np.int32]
    options: PlanOptions
    costs: GroupCosts
    prompt_logical: int
    prompt_physical: int
    saving: float


def make_plan(
    requests: Requests, forest: PrefixForest, cost: CostModel, budget: MemoryBudget, options: PlanOptions
) -> Plan:
    """Plan a job.

    Raises:
        UsageError: an unknown order or grouping.
    """
    for name, known, flag in (
        (options.schedule_order, (*ORDERS, AUTO), "schedule order"),
        (options.grouping, GROUPINGS, "grouping"),
    ):
        if name not in known:
            raise UsageError(f"there is no {flag} {name!r}", hint=f"choose one of: {', '.join(known)}")
    expected = OutputLengths(requests, first_guess=options.first_guess).expected()
    costs = cost.group_costs()
    groups = choose_groups(
        forest, requests.tokens, grouping=options.grouping, expected_new_tokens=expected, costs=costs
    )
    # No more pages than the job can ever use: the pool then does not depend on what memory happens to be free.
    budget = replace(budget, pages=min(budget.pages, _most_pages(groups, requests, budget)))
    plan = Plan(
        groups=groups,
        order=np.arange(len(requests), dtype=np.int32),
        probe=0,
        budget=budget,
        expected_new_tokens=expected,
        options=options,
        costs=costs,
        prompt_logical=forest.prompt_logical,
        prompt_physical=forest.prompt_physical,
        saving=forest.saving,
    )
    return in_order(plan, requests)


def in_order(plan: Plan, requests: Requests) -> Plan:
    """The plan with its requests in the order that its options say, the probe before all others."""
    probe = choose_probe(~known_lengths(requests), plan.options.probe, plan.options.seed)
    order = order_requests(plan, requests, plan.expected_new_tokens)
    first = np.isin(order, probe)
    return replace(plan, order=np.concatenate((order[first], order[~first])), probe=probe.size)


def order_requests(plan: Plan, requests: Requests, expected_new_tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The order of a plan's requests, int32 `[R]`, if answers have the given lengths."""
    options = plan.options
    order = ORDERS["dfs" if options.schedule_order == AUTO else options.schedule_order]
    prompt = requests.tokens.lengths
    context = OrderContext(plan.costs, plan.budget.pages * plan.budget.page_size, options.seed)
    return order(plan.groups, prompt, expected_new_tokens, context)


def _most_pages(groups: PrefixGroups, requests: Requests, budget: MemoryBudget) -> int:
    """Pages that are taken when all prefixes are held and all requests run to their limits."""
    own = -(-(requests.tokens.lengths - groups.request_depth + requests.max_new_tokens - 1) // budget.page_size)
    return int(own.sum() + (-(-groups.length // budget.page_size)).sum())


def pages_needed(groups: PrefixGroups, requests: Requests, budget: MemoryBudget) -> npt.NDArray[np.int64]:
    """Pages that each request takes when it runs alone to its limit, its prefixes included, int64 `[R]`."""
    own = requests.tokens.lengths - groups.request_depth + requests.max_new_tokens - 1
    return _prefix_pages(groups, budget)[groups.request_group] - (-own // budget.page_size)


def fit_to_pool(
    groups: PrefixGroups, requests: Requests, budget: MemoryBudget, defaulted: npt.NDArray[np.bool_]
) -> tuple[int, npt.NDArray[np.bool_]]:
    """See that each request fits into the pool on its own.

    Token limits that nobody set are cut to what fits, in `requests.max_new_tokens`.

    Args:
        defaulted: bool `[R]`, requests whose token limit is what is left of the context.

    Returns:
        How many limits were cut, and which requests can never fit, bool `[R]`.
    """
    own = requests.tokens.lengths - groups.request_depth
    most = ((budget.pages - _prefix_pages(groups, budget)) * budget.page_size + 1)[groups.request_group]
    most -= own
    cut = defaulted & (requests.max_new_tokens > most) & (most > 0)
    requests.max_new_tokens[cut] = most[cut]
    return int(cut.sum()), requests.max_new_tokens > most


def _prefix_pages(groups: PrefixGroups, budget: MemoryBudget) -> npt.NDArray[np.int64]:
    """Pages of all prefixes that a reader of each group reads, int64 `[G + 1]`: [-1], for those of none, is 0."""
    of_group = -(-groups.length // budget.page_size)
    return np.append(np.where(groups.path >= 0, of_group[groups.path], 0).sum(axis=1, dtype=np.int64), 0)
