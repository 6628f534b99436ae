"""How numbers, times and foreign text are put into words, the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from batchrun.report.records import Estimate, GroupSummary, Report, RequestCounts, Seconds, StartSummary

if TYPE_CHECKING:
    from batchrun.bench import Bench
    from batchrun.check import Checked
    from batchrun.formats.plan import PlanFile
    from batchrun.pipeline import Planned
    from batchrun.prefix.doctor import Diagnosis, Finding
    from batchrun.prefix.explain import ExplainedRequest, Explanation, SharedRuns
    from batchrun.status import RunProgress

STAGES = ("load", "tokenize", "plan", "execute")
STEP_KINDS = ("prefill", "mixed", "decode", "tail", "host", "recovery")
KIND_NAMES = {"mixed": "prefill and decode", "host": "host and waiting for it", "recovery": "lost workers"}


def outcome(counts: RequestCounts) -> str:
    """The outcome of a run in one line: "479 of 480 requests answered, 1 failed"."""
    text = f"{counts.completed:,} of {counts.total:,} requests answered, {counts.failed:,} failed"
    return f"{text}, {counts.remaining:,} remaining" if counts.remaining else text


def duration(seconds: float) -> str:
    """A time to about three digits: "35 ms", "3.2 s", "4 min 10 s", "2 h 5 min", "3 d 4 h"."""
    if seconds < 0.9995:
        milliseconds = 1000 * seconds
        return f"{milliseconds:.1f} ms" if 0 < milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def rate(value: float) -> str:
    """A rate to three digits or to the unit: "0.0312", "4.07", "31.4", "1,204"."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share as "87.6 %"."""
    return f"{100 * share:.1f} %"


def plural(count: int, noun: str) -> str:
    """ "1 request", "2,000 requests"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(number: float) -> str:
    """A number of bytes: "512 B", "24.0 KiB", "1.5 GiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while number >= 1023.95 and power < len(units) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.1f} {units[power]}" if power else f"{number:.0f} B"


def stages(seconds: Seconds) -> list[tuple[str, float]]:
    """The stages that happened, in order, and how long each took."""
    return [(name, spent) for name in STAGES if (spent := getattr(seconds, name)) is not None]


def times(report: Report) -> list[tuple[str, float]]:
    """Where the time of a run went, in order, with what the steps spent it on."""
    parts = [(name, spent) for name, spent in stages(report.seconds) if name != "execute"]
    if report.step_seconds is None:
        parts += [("execute", report.seconds.execute)] if report.seconds.execute is not None else []
    else:
        parts += [(name, spent) for name in STEP_KINDS if (spent := getattr(report.step_seconds, name)) > 0]
    spent = sum(part for _, part in parts)
    if report.seconds.total is not None and report.seconds.total > spent:
        parts.append(("other", report.seconds.total - spent))
    return parts


def planned_and_measured(report: Report, plan: PlanFile) -> list[tuple[str, str, str]]:
    """What was planned beside what came of it: name, planned, measured."""
    expected, execute = plan.expected, report.seconds.execute
    return [
        (
            "time of the steps",
            f"{duration(expected.seconds)} ({duration(expected.low)} to {duration(expected.high)})",
            "–" if execute is None else duration(execute),
        ),
        (
            "  at the device's peaks",
            duration(expected.bound),
            "–" if report.bound is None else duration(report.bound.seconds),
        ),
        ("steps", f"{plan.steps:,}", f"{report.steps:,}"),
        ("rows", f"{plan.rows:,}", f"{report.rows:,}"),
        ("prompt tokens computed", f"{plan.tokens.prompt_computed:,}", f"{report.tokens.prompt_computed:,}"),
        ("output tokens", f"{plan.tokens.output:,}", f"{report.tokens.output:,}"),
        ("KV pages at peak", f"{plan.kv.peak_pages:,}", f"{report.kv.peak_pages:,}"),
    ]


def group_rows(groups: Sequence[GroupSummary], prompt_tokens: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What prefix-sharing groups spare: head and rows of a table.

    Args:
        prompt_tokens: of the whole job.
    """
    rows = []
    for group in groups:
        spared = group.prefix_tokens * (group.requests - 1)
        counts = (group.id, group.prefix_tokens, group.requests, spared)
        rows.append((*(f"{count:,}" for count in counts), percent(spared / max(prompt_tokens, 1))))
    return ("group", "prefix tokens", "requests", "tokens spared", "saved"), rows


def start_rows(starts: Sequence[StartSummary]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What the starts of a run did, and all of them together: head and rows of a table."""

    def row(name: str, start: StartSummary) -> tuple[str, ...]:
        counts = (start.steps, start.prefill_rows, start.decode_rows, start.sampled, start.peak_pages)
        return (name, duration(start.seconds), *(f"{count:,}" for count in counts))

    whole = StartSummary(
        steps=sum(start.steps for start in starts),
        prefill_rows=sum(start.prefill_rows for start in starts),
        decode_rows=sum(start.decode_rows for start in starts),
        sampled=sum(start.sampled for start in starts),
        peak_pages=max(start.peak_pages for start in starts),
        seconds=sum(start.seconds for start in starts),
    )
    rows = [row(f"{number:,}", start) for number, start in enumerate(starts, start=1)]
    head = ("start", "time of steps", "steps", "prefill rows", "decode rows", "sampled", "KV peak")
    return head, [*rows, row("all", whole)]


def unmeasured(report: Report) -> list[str]:
    """What a report does not know, so that nobody takes it for known."""
    words = ["Time saved by sharing: no run without it was made; the saving is one of prompt tokens."]
    if report.expected is not None and not report.expected.calibrated:
        words.append(f"The price of steps: {report.expected.device} is not calibrated, so the plan is from its peaks.")
    if report.step_seconds is not None:
        words += [
            "Time to first token: of each request the first and last step are known, by the time of the steps alone.",
            "Prefill and decode within a step that does both: they are one forward pass.",
        ]
    words.append("Memory but for the pages of KV, and energy.")
    if report.warned_of("resumed"):
        words.append("Earlier starts: tokens, steps and times are of the last one.")
    return words


def printable(text: str, limit: int = 400) -> str:
    r"""Text that came with a job, made safe to show on one line: what does not print is escaped (`\x1b`, `\n`).

    Beyond `limit` characters it is cut, with "..." at its end.
    """
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def quoted(text: str, limit: int = 60) -> str:
    """Text that came with a job, in quotes."""
    return f"'{printable(text, limit)}'"


# --- plans ---


def plan_title(planned: Planned) -> str:
    """What is planned, in one line: "Plan: 479 requests from 480 lines, 1 of them bad"."""
    title = f"Plan: {plural(planned.plan.requests, 'request')} from {plural(planned.total_lines, 'line')}"
    return f"{title}, {len(planned.faults):,} of them bad" if planned.faults else title


def unlisted(runs: SharedRuns, plan: PlanFile) -> str:
    """What is shared besides the runs that are listed; nothing if those are all."""
    saved = percent(runs.others_spared / plan.tokens.prompt_logical)
    return f"And {plural(runs.others, 'smaller one')} with {saved} more." if runs.others else ""


def sharing(planned: Planned) -> str:
    """How many of the runs that prompts share are computed once."""
    runs, once = len(planned.runs.listed) + planned.runs.others, planned.computed_once
    if not runs:
        return "No two prompts begin alike."
    words = f"{once:,} of {plural(runs, 'shared run')} computed once, by grouping {planned.plan.grouping}"
    if once >= runs or planned.plan.grouping == "none":
        return f"{words}."
    return f"{words}; to share the others would cost more than it saves."


def limited_by(expected: Estimate) -> str:
    """One sentence: what a job cannot be faster than, and why."""
    compute, memory = duration(expected.bound_compute), duration(expected.bound_memory)
    if expected.bound_compute >= expected.bound_memory:
        return f"Computing limits it: {compute} at the peaks of {expected.device}, against {memory} of memory traffic."
    return f"Memory limits it: weights and KV take {memory} at the peaks of {expected.device}, computing {compute}."


def estimated_from(expected: Estimate, requests: int) -> str:
    """What an estimate for a job of so many requests stands on."""
    hardware = f" ({expected.hardware})" if expected.hardware else ""
    if expected.calibrated:
        words = f"From steps measured on {expected.device}{hardware}."
    else:
        share = f"{100 * expected.low / expected.high:.0f} % to 100 %" if expected.high else "a share"
        words = f"{expected.device} is not calibrated: the range is {share} of its data sheet's peaks{hardware}."
    if expected.requests < requests:
        words += f" {expected.requests:,} of {requests:,} requests were simulated, and figures scaled to the job."
    return words


_CAUSES = {
    "date": " (a date)",
    "time": " (a time)",
    "uuid": " (a UUID)",
    "email": " (an email address)",
    "number": " (a number)",
    "id": " (an id)",
    "name": " (a name)",
    "white space": " (white space)",
}


def found(finding: Finding) -> str:
    """Why prompts that look alike do not share, and what mending would save."""
    saving = f"would save {percent(finding.saving)} of all prompt tokens"
    shared = f"share {plural(finding.shared_tokens, 'token')}" if finding.shared_tokens else "share nothing"
    one, other = (quoted(text) for text in finding.texts)
    against = f"{one} against {other}" if one != other else f"two tokens that both read {one}"
    lines = " and ".join(printable(line, 40) for line in finding.lines)
    alike = plural(finding.alike_tokens, "token")
    if finding.cause == "order":
        return (
            f"{finding.requests:,} requests {shared}, and then have the same lines in different orders ({alike}; "
            f"{lines} begin with {one} and {other}). One order for all {saving}."
        )
    if finding.cause == "white space":
        remedy = f"The same white space everywhere {saving}, or more."
    else:
        remedy = f"Moving it behind the shared text {saving}."
    return (
        f"{finding.requests:,} requests {shared} and part at token {finding.shared_tokens + 1:,}: {against}"
        f"{_CAUSES.get(finding.cause, '')}, in {lines}. Then {alike} are the same again. {remedy}"
    )


def nothing_found(diagnosis: Diagnosis) -> str:
    """That no prompts that look alike fail to share."""
    return (
        "Nothing to gain: no prompts go on alike after a short difference, or have the same lines in another order, so "
        f"that mending would save 1 % of the prompt tokens or more ({plural(diagnosis.examined, 'prompt')} and "
        f"{plural(diagnosis.branches, 'branch point')} looked at)."
    )


def explained(explanation: Explanation) -> list[tuple[str, str, str]]:
    """What is planned for a line: label, figure and words of each row. Rows of one label follow each other."""
    rows = [("Bad line", "", f"line {fault.number:,}: {fault.code}: {fault.message}") for fault in explanation.faults]
    for number, request in enumerate(explanation.requests):
        if len(explanation.requests) > 1:
            rows.append((f"Request {number + 1}", "", f"of {len(explanation.requests):,} that this line makes"))
        rows += _explained(request)
    return rows


def _explained(request: ExplainedRequest) -> list[tuple[str, str, str]]:
    rows = []
    if request.duplicate_of is not None:
        rows.append(("Duplicate", "", f"of {printable(request.duplicate_of, 40)}, with which it is computed"))
    if request.answers > 1:
        rows.append(("Duplicate", f"{request.answers:,}", "answers are given by computing it once"))
    rows += [
        ("Prompt", f"{request.prompt_tokens:,}", "tokens"),
        ("Prompt", f"{request.shared_tokens:,}", "that some other prompt begins with too"),
        ("Prompt", f"{request.cached_tokens:,}", "read from shared prefixes; the others are computed for it alone"),
    ]
    if request.identical:
        rows.append(("Prompt", f"{request.identical:,}", "more with the very same prompt"))
    for prefix in request.reads:
        lines = ", ".join(printable(line, 40) for line in prefix.with_lines)
        others = f" ({lines}{', ...' if prefix.requests - 1 > len(prefix.with_lines) else ''})" if lines else ""
        words = f"tokens with {plural(prefix.requests - 1, 'other request')}{others}: {quoted(prefix.text)}"
        rows.append(("Shares", f"{prefix.tokens:,}", words))
    if not request.reads:
        rows.append(("Shares", "", "nothing that is computed once for several"))
    rows.append(
        (
            "Answer",
            f"{request.answer_tokens:,}",
            f"tokens expected, {request.max_new_tokens:,} at most",
        )
    )
    rows.append(("Runs", f"{request.place:,}", "is its place in the order"))
    if request.steps is None or request.seconds is None:
        rows.append(("Runs", "", "not among the requests that were simulated"))
        return rows
    first, last = request.steps
    begin, end = (duration(seconds) for seconds in request.seconds)
    rows.append(
        ("Runs", f"{last - first + 1:,}", f"steps, from {first:,} to {last:,}: {begin} to {end} after the start")
    )
    whole = request.page_steps + request.prefix_page_steps
    rows += [
        ("KV", f"{request.pages:,}", f"pages of its own at its end ({size(request.kv_bytes)})"),
        ("KV", f"{request.page_steps:,}", "pages times steps that it holds them"),
        ("KV", rate(request.prefix_page_steps), "the same for its share of the prefixes that it reads"),
        ("KV", rate(whole), f"in all, of {size(request.page_bytes)} each"),
    ]
    return rows


# --- checks and runs in progress ---


def check_title(checked: Checked) -> str:
    """What a check found, in one line."""
    if not checked.total:
        return "The job has no requests: every line is blank, or there is none."
    if not checked.faults:
        return "All lines can run." if checked.total > 1 else "The line can run."
    return f"{len(checked.faults):,} of {plural(checked.total, 'line')} cannot run."


def progress_title(progress: RunProgress) -> str:
    """How far a run is, in one line: "Running, 25.0 %: 120 of 480 requests answered, 0 failed, 360 remaining"."""
    names = {
        "running": "Running",
        "finished": progress.status.capitalize(),
        "stopped": "Stopped early",
        "died": "Killed or crashed",
        "unknown": "In progress or lost",
    }
    counts = progress.request_counts
    done = f", {percent((counts.completed + counts.failed) / counts.total)}" if counts.remaining else ""
    return f"{names[progress.state]}{done}: {outcome(counts)}"


def standing(progress: RunProgress) -> str:
    """What has become of the process of a run, and what to do."""
    process = progress.process
    who = f"process {process.pid} on {process.host}" if process is not None else "its process"
    since = f" since {process.since}" if process is not None else ""
    match progress.state:
        case "running":
            doing = {"in_progress": "works on it", "finalizing": "writes its report"}
            return f"{who} {doing.get(progress.status, 'starts it again')}, and has its lock{since}"
        case "finished":
            return f"it has ended, with exit code {progress.exit_code}"
        case "stopped":
            return f"it has ended early, with exit code {progress.exit_code}; the same command goes on with the run"
        case "died":
            return f"{who} was killed or crashed; the same command goes on with the run"
        case _:
            if process is None:
                return "there is no lock to be read, so that nobody can tell whether a process works on it"
            return f"{who} has worked on it{since}; whether it lives cannot be told from here"


def time_left(progress: RunProgress) -> tuple[str, str] | None:
    """How long a run will still take, as a figure and words; None where nothing of it remains or nobody works on it."""
    if progress.results_per_second is None or not progress.request_counts.remaining:
        return None
    if progress.seconds_left is not None and progress.recent_seconds is not None:
        return duration(progress.seconds_left), f"left, at the rate of the last {duration(progress.recent_seconds)}"
    if progress.recent_seconds is None:
        return "", "it is too early to tell how much is left"
    return "", f"no result in the last {duration(progress.recent_seconds)}, so nobody can tell how much is left"


# --- benchmarks ---


def bench_title(bench: Bench) -> str:
    """What was measured: "demo on cpu in float32: workloads of size cpu, scale 1, 3 runs each"."""
    each = f"{plural(bench.repeats, 'run')} each" if bench.repeats > 1 else "one run each"
    what = f"workloads of size {bench.size}, scale {bench.scale:g}, {each}"
    return f"{bench.model} on {bench.device} in {bench.dtype}: {what}"


def bench_notes(bench: Bench) -> Iterator[str]:
    """What a reader of the figures should know, a sentence or two each."""
    if bench.repeats > 1:
        yield "Time is the median of the runs, and spread the longest less the shortest."
    expected = bench.workloads[0].shared.report.expected
    if expected is not None:
        hardware = f" ({expected.hardware})" if expected.hardware else ""
        if expected.calibrated:
            yield f"Expected and bound are from steps and peaks measured on {expected.device}{hardware}."
        else:
            words = f"{expected.device} is not calibrated: expected and bound are by the peaks of its file{hardware}."
            if bench.device == "cpu":
                words += " scripts/calibrate measures the processor that is here; until then both mean little."
            yield words
    for benched in bench.workloads:
        if benched.part < 1:
            yield f"{benched.name}: lengths were cut to {percent(benched.part)}, to fit the model's context."
        ways = (benched.shared, benched.unshared, *benched.orders)
        if disturbed := sum(way.disturbed for way in ways):
            yield (
                f"{benched.name}: in {plural(disturbed, 'run')} the worker was lost or was short of memory; "
                "their times are of that too."
            )


# --- runs that have ended ---


def beside_execute(report: Report) -> str | None:
    """What to say beside the time of the steps: "expected 480 ms; at the device's peaks 210 ms, 43.8 % of it". What was
    expected is said of a plan that was run as a whole."""
    if report.bound is None or report.bound_share is None:
        return None
    bound = f"at the device's peaks {duration(report.bound.seconds)}, {percent(report.bound_share)} of it"
    whole = not report.request_counts.remaining and not report.warned_of("closed")
    return f"expected {duration(report.expected.seconds)}; {bound}" if report.expected is not None and whole else bound
