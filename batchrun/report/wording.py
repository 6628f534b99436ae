"""How numbers, times and foreign text are put into words, the same on the terminal and on the page."""

from __future__ import annotations

from batchrun.report.records import RequestCounts, Seconds

STAGES = ("load", "tokenize", "plan", "execute")


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


def stages(seconds: Seconds) -> list[tuple[str, float]]:
    """The stages that happened, in order, and how long each took."""
    return [(name, spent) for name in STAGES if (spent := getattr(seconds, name)) is not None]


def printable(text: str, limit: int = 400) -> str:
    r"""Text that came with a job, made safe to show on one line: what does not print is escaped (`\x1b`, `\n`).

    Beyond `limit` characters it is cut, with "..." at its end.
    """
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
