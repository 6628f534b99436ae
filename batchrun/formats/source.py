"""Where the lines of a job came from that a run keeps as `job.jsonl`: the record that `run.json` has of it."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the files that a job was made of.

    Attributes:
        name: within the location.
        size: bytes, as its store says; None where it does not.
        version: by what its store tells one version from another (`ETag ...`, `mtime ...`); None where it does not.
        lines: of the job that it gave.
    """

    name: str
    size: int | None
    version: str | None
    lines: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where the lines of a job came from, and how rows were made into lines.

    Attributes:
        location: as it was named, secrets cut out; absolute where it is local.
        kind: `jsonl`, `csv`, `parquet`, or `json rows`: JSON lines from which requests are made.
        prompt_column, id_column, field_columns, chat: as in `[input]`.
        template: sha256 of the template's text, or None.
        files: in the order of their lines.
    """

    location: str
    kind: str
    prompt_column: str | None
    id_column: str | None
    field_columns: tuple[str, ...]
    chat: bool
    template: str | None
    files: tuple[Shard, ...]

    def places(self) -> Callable[[int], str]:
        """What tells where a line of the job stood in its file: `line 17 of part-2.jsonl`."""
        ends = list(accumulate(file.lines for file in self.files))
        word = "line" if self.kind == "jsonl" else "row"

        def place(number: int) -> str:
            file = min(bisect_right(ends, number - 1), len(ends) - 1)
            return f"{word} {number - ends[file] + self.files[file].lines} of {self.files[file].name}"

        return place

    def same_reading(self, other: Source) -> bool:
        """Whether the same place is read in the same way, whatever is there."""
        return dataclasses.replace(self, files=()) == dataclasses.replace(other, files=())

    def surely_same(self, now: Source) -> bool:
        """Whether the stores say that nothing has changed; a file whose store tells no versions may have."""
        return not list(self.differences(now)) and all(file.version is not None for file in now.files)

    def differences(self, now: Source) -> Iterator[str]:
        """What has changed, each with its field."""
        for field in dataclasses.fields(self):
            before, after = getattr(self, field.name), getattr(now, field.name)
            if field.name != "files":
                if before != after:
                    yield f"source.{field.name} is {before!r} there and {after!r} now"
            elif len(before) != len(after):
                yield f"source.files are {len(before)} there and {len(after)} now"
            else:
                for i, (old, new) in enumerate(zip(before, after, strict=True)):
                    for name in ("name", "size", "version"):
                        if getattr(old, name) != getattr(new, name):
                            yield (
                                f"source.files[{i}].{name} ({new.name}) is {getattr(old, name)!r} there and "
                                f"{getattr(new, name)!r} now"
                            )
