"""Jobs that are URLs, directories and patterns: the same run as of a local file, and no change goes unseen."""

from __future__ import annotations

import functools
import gzip
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zstandard
from kills import killed_before

from batchrun.cli import app
from batchrun.config import InputConfig, load_config
from batchrun.errors import ExitCode, OutputError, RunDirError, Stopped, UsageError
from batchrun.formats.job import lint_job, read_job
from batchrun.pipeline import Outcome, Silent, plan_job, run_job
from batchrun.sources import opening, stores
from batchrun.sources.opening import Opened, open_to_read

LINES: list[Any] = [
    {"id": "a", "prompt": "The quick brown fox", "max_tokens": 3},
    {"id": "b", "messages": [{"role": "user", "content": "plum"}], "max_tokens": 4, "temperature": 0},
    "",
    {"id": "c", "prompt": "x", "max_tokens": "ten"},
    {"prompt": "The quick brown dog", "max_tokens": 2},
]


def text(lines: list[Any]) -> bytes:
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()


@pytest.fixture
def opened() -> Iterator[Callable[..., Opened]]:
    """`opened("shards", prompt_column="q")`: a job as a command that writes nothing opens it."""
    with ExitStack() as stack:
        yield lambda job, **config: open_to_read(job, InputConfig(**config), stack)


class Watcher(Silent):
    def __init__(self, stop: Callable[[], bool] = lambda: False) -> None:
        self.stages: list[str] = []
        self.finished = 0
        self.should_stop = stop  # type: ignore[method-assign]

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def step(self, rows: int, sampled: int, finished: int) -> None:
        self.finished += finished


@pytest.fixture
def run(here, model_dir) -> Callable[..., Outcome]:
    def call(job: str, observer: Watcher | None = None, **config: Any) -> Outcome:
        return run_job(job, load_config(model=str(model_dir()), **config), observer)

    return call


def answers(run_dir: Path) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for name in ("results.jsonl", "errors.jsonl"):
        for raw in (run_dir / name).read_text(encoding="utf-8").splitlines():
            line = json.loads(raw)
            body = line["response"]["body"]
            assert line["batchrun"]["line"] not in found
            choices = [{**choice, "message": None} for choice in body.get("choices", ())]
            found[line["batchrun"]["line"]] = (line["custom_id"], choices, body.get("error"))
    return found


def files(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir()}


# --- where jobs may lie


@pytest.mark.parametrize("name", ["jobs.jsonl", "jobs.jsonl.gz", "jobs.jsonl.zst"])
def test_a_job_in_a_store_runs_as_the_local_file(name, run, memory, here):
    (here / "local.jsonl").write_bytes(text(LINES))
    local = run("local.jsonl")
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    memory.pipe_file(f"/deep/{name}", pack(text(LINES)))
    outcome = run(f"memory://deep/{name}")
    assert outcome.run_dir == Path("jobs.run")
    assert outcome.report.request_counts == local.report.request_counts
    assert answers(outcome.run_dir) == answers(local.run_dir)
    assert files(outcome.run_dir) - files(local.run_dir) == {"job.jsonl"}
    assert (outcome.run_dir / "job.jsonl").read_bytes() == text(LINES)
    told = json.loads((outcome.run_dir / "run.json").read_bytes())
    assert told["job"] == told["source"]["location"] == f"memory://deep/{name}"
    [file] = told["source"]["files"]
    assert (file["name"], file["lines"]) == (name, len(LINES))
    assert json.loads((local.run_dir / "run.json").read_bytes())["source"] is None


def test_a_local_file_of_json_lines_is_read_where_it_lies(run, here):
    (here / "jobs.jsonl").write_bytes(text(LINES))
    watcher = Watcher()
    outcome = run("jobs.jsonl", watcher)
    assert "fetch" not in watcher.stages
    assert "job.jsonl" not in files(outcome.run_dir)


def test_files_of_a_directory_are_one_job_in_the_order_of_their_names(run, here):
    folder = here / "shards"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.jsonl").write_bytes(text([{"id": "b1", "prompt": "x", "max_tokens": 1}, "{bad"]).rstrip())
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text([{"id": "a1", "prompt": "y", "max_tokens": 1}, "", ""])))
    (folder / "c.ndjson").write_bytes(text([{"id": "a1", "prompt": "z"}, {"id": "long", "prompt": "fox " * 600}]))
    for name in (".hidden.jsonl", "_SUCCESS", "README.md", "inner/d.jsonl"):
        (folder / name).write_text("nothing of the job\n")
    outcome = run("shards")
    assert outcome.run_dir == Path("shards.run")
    found = answers(outcome.run_dir)
    lines = [json.loads(raw) for raw in (outcome.run_dir / "errors.jsonl").read_bytes().splitlines()]
    errors = {line["batchrun"]["line"]: line["response"]["body"]["error"]["message"] for line in lines}
    assert errors.keys() == {5, 6, 7}
    assert errors[5].endswith("(line 2 of b.jsonl)")
    assert "taken by line 1 of a.jsonl.gz;" in errors[6]
    assert errors[6].endswith("(line 1 of c.ndjson)")
    assert errors[7].endswith("(line 2 of c.ndjson)")
    assert {number: found[number][0] for number in found} == {1: "a1", 4: "b1", 5: "line-5", 6: "a1", 7: "long"}
    assert outcome.report.request_counts.completed == 2
    told = json.loads((outcome.run_dir / "run.json").read_bytes())["source"]
    assert [(file["name"], file["lines"]) for file in told["files"]] == [
        ("a.jsonl.gz", 3),
        ("b.jsonl", 2),
        ("c.ndjson", 2),
    ]


def test_patterns_reach_down_and_name_files_by_their_folders(opened, here):
    for name in ("x/2.jsonl", "x/1.jsonl", "y/1.jsonl", "y/no.csv"):
        (here / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "data" / name).write_bytes(text([{"id": name, "prompt": "x"}]))
    job = opened("data/**/*.jsonl")
    assert [file.name for file in job.source.files] == ["x/1.jsonl", "x/2.jsonl", "y/1.jsonl"]
    assert [line.custom_id for line in read_job(job.job)] == ["x/1.jsonl", "x/2.jsonl", "y/1.jsonl"]


def test_the_order_of_lines_and_their_numbers_are_those_of_the_files_put_together(opened, here):
    """Whatever ends a shard: nothing, a line end, several, or the two bytes of other systems."""
    ends = [b"", b"\n", b"\n\n\n", b"\r\n"]
    (here / "shards").mkdir()
    for i, end in enumerate(ends):
        body = text([{"id": f"{i}-{j}", "prompt": "x"} for j in range(3)]).rstrip()
        (here / "shards" / f"{i}.jsonl").write_bytes(b"\xef\xbb\xbf" + body + end)
    (here / "shards" / "9.jsonl").write_bytes(b"")
    job = opened("shards")
    found = [(line.number, line.custom_id) for line in read_job(job.job)]
    starts = [0, 3, 6, 11]
    assert found == [(starts[i] + j + 1, f"{i}-{j}") for i in range(4) for j in range(3)]
    assert [file.lines for file in job.source.files] == [3, 3, 5, 3, 0]


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("empty", ["has no job", ".parquet"]),
        ("data/*.nothing", ["has no job"]),
        ("mixed", ["several kinds", "a.csv and b.jsonl"]),
        ("jobs.run", ["is a run directory"]),
        ("none.csv", ["no job file none.csv"]),
        ("memory://none.jsonl", ["There is nothing at memory://none.jsonl"]),
        ("nosuch://none.jsonl", ["nosuch://none.jsonl"]),
        ("cut.jsonl.gz*", ["cut.jsonl.gz cannot be read", "EOFError"]),
        ("cut.jsonl.zst*", ["cut.jsonl.zst cannot be read", "no end"]),
        ("../*.jsonl", ["has no job"]),
    ],
)
def test_what_cannot_be_read_is_told_and_leaves_nothing(job, words, run, memory, here):
    for name in ("empty", "data", "mixed", "jobs.run"):
        (here / name).mkdir()
    (here / "jobs.run" / "run.json").write_text("{}")
    (here / "mixed" / "a.csv").write_text("prompt\nx\n")
    (here / "mixed" / "b.jsonl").write_bytes(text(LINES))
    (here / "cut.jsonl.gz").write_bytes(gzip.compress(text(LINES * 50))[:-20])
    (here / "cut.jsonl.zst").write_bytes(zstandard.compress(text(LINES * 50))[:-20])
    before = sorted(here.rglob("*"))
    with pytest.raises(UsageError) as caught:
        run(job, out="new.run")
    for word in words:
        assert word in caught.value.message
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("job", ["*.jsonl", ".", "..", "memory://*.jsonl"])
def test_a_job_that_names_no_run_directory_needs_one(job, run, memory, here):
    (here / "a.jsonl").write_bytes(text(LINES))
    memory.pipe_file("/a.jsonl", text(LINES))
    with pytest.raises(UsageError, match="does not say how to name the run directory"):
        run(job)


@pytest.mark.parametrize(
    ("job", "name"),
    [
        ("memory://bucket/jobs.jsonl.gz", "jobs.run"),
        ("memory://bucket/data", "data.run"),
        ("https://host/a/jobs.csv?key=v.x", "jobs.run"),
        ("zip://inner.csv::https://host/a.zip", "inner.run"),
        ("simplecache::s3://bucket/x.parquet", "x.run"),
        ("s3://bucket/data/**/*.parquet", "data.run"),
        ("folder/x.tsv", "folder/x.run"),
        ("folder/deep/*.csv", "folder/deep.run"),
    ],
)
def test_run_directories_are_named_after_what_is_run(job, name):
    assert opening._default_out(job) == Path(name)


@pytest.mark.parametrize(
    ("protocol", "library", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs"), ("https", "aiohttp", "http")]
)
def test_a_missing_library_is_one_error_with_what_to_install(protocol, library, extra, opened, monkeypatch):
    registry = sys.modules["fsspec.registry"]  # the package has something else of this name
    monkeypatch.setattr(registry, "_registry", {k: v for k, v in registry._registry.items() if k != protocol})
    for module in [name for name in sys.modules if name.partition(".")[0] == library or name.endswith("fsspec.http")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError) as caught:
        opened(f"{protocol}://bucket/jobs.jsonl")
    assert "needs a library that is not installed" in caught.value.message
    assert caught.value.hint == f"Install it with pip install 'batchrun[{extra}]'."


def test_options_for_tables_are_refused_for_json_lines(run, memory, here):
    (here / "jobs.jsonl").write_bytes(text(LINES))
    memory.pipe_file("/jobs.jsonl", text(LINES))
    for job in ("jobs.jsonl", "memory://jobs.jsonl"):
        with pytest.raises(UsageError, match="--id-column is for the rows of tables"):
            run(job, input={"id_column": "text"})


def test_plan_and_check_take_them_too_and_write_nothing(here, memory, model_dir):
    from typer.testing import CliRunner

    memory.pipe_file("/jobs.jsonl", text(LINES))
    for command in (["plan", "--model", str(model_dir())], ["check"], ["check", "--model", str(model_dir())]):
        done = CliRunner().invoke(app, [command[0], "memory://jobs.jsonl", *command[1:], "--json"])
        assert done.exit_code == ExitCode.SOME_FAILED, done.stderr
    assert plan_job("memory://jobs.jsonl", load_config(model=str(model_dir()))).total_lines == 4
    assert not list(here.iterdir())


# --- the same command again


def stop_after_one(run: Callable[..., Outcome], job: str, **config: Any) -> Path:
    watcher = Watcher()
    watcher.should_stop = lambda: watcher.finished > 0  # type: ignore[method-assign]
    outcome = run(job, watcher, **config)
    assert outcome.exit_code is ExitCode.STOPPED
    return outcome.run_dir


def test_what_has_not_changed_is_not_brought_again(run, memory):
    memory.pipe_file("/jobs.jsonl", text(LINES))
    out = stop_after_one(run, "memory://jobs.jsonl")
    watcher = Watcher()
    outcome = run("memory://jobs.jsonl", watcher)
    assert "fetch" not in watcher.stages
    assert outcome.exit_code is ExitCode.SOME_FAILED
    assert outcome.report.request_counts.completed == 3
    assert files(out) >= {"job.jsonl"}


def test_a_file_written_anew_with_the_same_lines_is_brought_again_and_gone_on_with(run, memory):
    memory.pipe_file("/jobs.jsonl", text(LINES))
    out = stop_after_one(run, "memory://jobs.jsonl")
    before = json.loads((out / "run.json").read_bytes())["source"]["files"]
    memory.pipe_file("/jobs.jsonl", text(LINES))
    watcher = Watcher()
    outcome = run("memory://jobs.jsonl", watcher)
    assert "fetch" in watcher.stages
    assert outcome.exit_code is ExitCode.SOME_FAILED
    assert json.loads((out / "run.json").read_bytes())["source"]["files"] != before


def test_a_source_that_changed_is_refused_with_the_field_named(run, memory):
    memory.pipe_file("/jobs.jsonl", text(LINES))
    out = stop_after_one(run, "memory://jobs.jsonl")
    kept = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lock"}
    memory.pipe_file("/jobs.jsonl", text([*LINES, {"prompt": "more"}]))
    with pytest.raises(RunDirError) as caught:
        run("memory://jobs.jsonl")
    assert "job is '" in caught.value.message
    size = len(text(LINES))
    assert f"source.files[0].size (jobs.jsonl) is {size} there and " in caught.value.message
    assert "source.files[0].version (jobs.jsonl) is 'modified" in caught.value.message
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lock"} == kept
    fresh = run("memory://jobs.jsonl", fresh=True)
    assert fresh.report.request_counts.completed == 4
    assert (out / "job.jsonl").read_bytes() == text([*LINES, {"prompt": "more"}])
    assert (out.with_name("jobs.run.1") / "job.jsonl").read_bytes() == text(LINES)


@pytest.mark.parametrize("pattern", ["data/**/*.jsonl", "data/*.jsonl"])
def test_what_a_run_puts_down_where_its_job_lies_is_no_part_of_the_job(pattern, run, here):
    out = "data" if pattern != "data/**/*.jsonl" else "data/out"
    (here / "data").mkdir()
    for name, length in {"a": 2, "b": 9}.items():
        line = {"id": name, "prompt": "fox", "max_tokens": length, "ignore_eos": True}
        (here / "data" / f"{name}.jsonl").write_bytes(text([line]))
    stop_after_one(run, pattern, out=out)
    gone_on = run(pattern, out=out)
    assert gone_on.exit_code is ExitCode.OK
    assert gone_on.report.request_counts.total == 2
    assert run(pattern, out=out).already_done


def test_a_shard_more_is_a_change(run, here):
    (here / "shards").mkdir()
    (here / "shards" / "a.jsonl").write_bytes(text(LINES))
    stop_after_one(run, "shards")
    (here / "shards" / "b.jsonl").write_bytes(text([{"prompt": "more"}]))
    with pytest.raises(RunDirError, match=r"source\.files are 1 there and 2 now"):
        run("shards")


def test_a_source_that_is_gone_does_not_stop_a_run_that_has_its_lines(run, memory):
    memory.pipe_file("/jobs.jsonl", text(LINES))
    stop_after_one(run, "memory://jobs.jsonl")
    memory.rm("/jobs.jsonl")
    outcome = run("memory://jobs.jsonl")
    assert outcome.report.request_counts.completed == 3
    [warning] = [one for one in outcome.report.warnings if one.code == "source_not_checked"]
    assert "There is nothing at memory://jobs.jsonl" in warning.message
    with pytest.raises(UsageError, match=r"There is nothing at memory://other\.jsonl"):
        run("memory://other.jsonl", out="jobs.run")


def test_retry_and_close_read_the_kept_lines(run, memory, here, model_dir):
    from batchrun.close import close_run
    from batchrun.retry import retry_run

    shards = [text(LINES), text([{"id": "late", "prompt": "x", "max_tokens": 0}])]
    for i, shard in enumerate(shards):
        memory.pipe_file(f"/shards/{i}.jsonl", shard)
    out = stop_after_one(run, "memory://shards")
    memory.rm("/shards", recursive=True)
    retried = retry_run(out, finish_reason="length", max_tokens=5)
    assert retried.outcome.report.request_counts.remaining == 0
    told = json.loads((out / "run.json").read_bytes())
    assert [file["lines"] for file in told["source"]["files"]] == [5, 1]
    assert "(line 1 of 1.jsonl)" in (out / "errors.jsonl").read_text()

    memory.pipe_file("/shards/0.jsonl", shards[0])
    memory.pipe_file("/shards/1.jsonl", shards[1])
    out = stop_after_one(run, "memory://shards", out="closed.run")
    (out / "errors.jsonl").write_text("")
    memory.rm("/shards", recursive=True)
    assert close_run(out).report.request_counts.remaining == 0
    assert "(line 1 of 1.jsonl)" in (out / "errors.jsonl").read_text()


# --- while it is brought


def test_a_stop_while_it_is_brought_leaves_nothing(run, memory, here):
    memory.pipe_file("/jobs.jsonl", text(LINES))
    with pytest.raises(Stopped):
        run("memory://jobs.jsonl", Watcher(stop=lambda: True))
    assert not list(here.iterdir())


def test_a_source_that_changes_meanwhile_is_refused(run, memory, here, monkeypatch):
    memory.pipe_file("/jobs.jsonl", text(LINES))

    def stop() -> bool:
        memory.pipe_file("/jobs.jsonl", text([*LINES, {"prompt": "more"}]))
        return False

    with pytest.raises(UsageError, match=r"changed while it was read: source.files\[0\].size"):
        run("memory://jobs.jsonl", Watcher(stop))
    assert not list(here.iterdir())


def test_a_transfer_that_ends_early_is_no_job(run, memory, here, monkeypatch):
    memory.pipe_file("/jobs.jsonl", text(LINES))
    real = stores._file
    monkeypatch.setattr(stores, "_file", lambda *args: real(*args[:2], {**args[2], "size": 10_000}, args[3]))
    with pytest.raises(UsageError, match=r"ended after .* of 10,000 bytes"):
        run("memory://jobs.jsonl")
    assert not list(here.iterdir())


def test_a_full_disk_is_told_as_such(run, memory, here):
    memory.pipe_file("/jobs.jsonl", text(LINES) * 20_000)
    (here / "blocked").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write blocked/out\.run: Not a directory"):
        run("memory://jobs.jsonl", out="blocked/out.run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(OutputError, match=r"cannot write .*job\.jsonl: File too large"):
            run("memory://jobs.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in here.iterdir()] == ["blocked"]


CALLS = [(os, "fsync"), (os, "replace"), (Path, "replace"), (Path, "mkdir"), (Path, "unlink"), (os, "rename")]


def test_killed_at_any_write_of_the_spool_nothing_half_is_taken_for_whole(model_dir, here):
    """Also with an earlier, other job in the directory, and with two shards. What died is cleared away."""
    from batchrun.formats.rundir import RunDir

    (here / "shards").mkdir()
    for name in ("a", "b"):
        (here / "shards" / f"{name}.jsonl").write_bytes(text([{"id": name, "prompt": "x", "max_tokens": 1}]))
    out = here / "out.run"

    def bring() -> None:
        with ExitStack() as stack:
            config = load_config(model="demo", out=str(out))
            opened, _ = opening.open_to_run("shards", config, stack, tell=lambda stage: None, stop=lambda: False)
            with RunDir.open(out, {"job": lint_job(opened.job).fingerprint}):
                opened.keep(out)

    whole = b"".join((here / "shards" / f"{name}.jsonl").read_bytes() for name in ("a", "b"))
    for call in range(100):
        done = killed_before(call, CALLS, bring)
        if (out / "job.jsonl").exists():
            assert (out / "job.jsonl").read_bytes() == whole
        if done:
            break
    assert 4 < call < 99
    assert not list(out.glob(".source.*"))
    assert (out / "job.jsonl").read_bytes() == whole


def test_a_folder_that_another_process_fills_is_left_to_it(run, memory, here):
    memory.pipe_file("/jobs.jsonl", text(LINES))
    other, dead = here / "jobs.run" / ".source.1", here / "jobs.run" / ".source.2"
    other.mkdir(parents=True)
    dead.mkdir()
    with ExitStack() as stack:
        stack.callback(os.close, opening._hold(other))
        run("memory://jobs.jsonl")
    assert other.exists()
    assert not dead.exists()


# --- secrets


def test_secrets_of_a_url_are_written_nowhere(here, memory, model_dir):
    from typer.testing import CliRunner

    url = "memory://me:hunter2@host/jobs.jsonl?sig=hunter2"
    memory.pipe_file("/me:hunter2@host/jobs.jsonl?sig=hunter2", text(LINES))
    call = functools.partial(CliRunner().invoke, app, catch_exceptions=False)
    done = [
        call(["run", url, "--model", str(model_dir())]),
        call(["check", url]),
        call(["run", url.replace("jobs", "none"), "--model", str(model_dir())]),
        call(["run", url, "--model", str(model_dir()), "--results", "s3://me:hunter2@b/x.parquet"]),
        call(["run", url, "--model", str(model_dir()), "--results", "s3://b/x.parquet?sig=hunter2"]),
    ]
    assert [one.exit_code for one in done] == [3, 3, 2, 2, 2]
    memory.pipe_file("/me:hunter2@host/jobs.jsonl?sig=hunter2", text(LINES[:1]))
    done.append(call(["run", url, "--model", str(model_dir())]))
    memory.rm("/", recursive=True)
    done.append(call(["run", url, "--model", str(model_dir())]))
    assert [one.exit_code for one in done[-2:]] == [76, 3]
    for one in done:
        assert "hunter2" not in one.stdout + one.stderr
    for path in here.rglob("*"):
        assert "hunter2" not in path.name
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
    assert json.loads((here / "jobs.run" / "run.json").read_bytes())["job"] == "memory://***@host/jobs.jsonl?***"


def test_a_server_that_is_not_reached_is_not_a_file_that_is_not_there() -> None:
    with (
        pytest.raises(UsageError, match="cannot be read: ConnectionRefusedError: refused"),
        stores.reading("http://a/b"),
    ):
        raise FileNotFoundError("http://a/b") from ConnectionRefusedError("refused")
    with pytest.raises(UsageError, match="There is nothing at"), stores.reading("http://a/b"):
        raise FileNotFoundError("http://a/b")
