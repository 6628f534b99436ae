"""Workers that compute nothing and believe nothing: they follow the pages and check what every row can see."""

from __future__ import annotations

import zlib
from collections import deque

import numpy as np

from batchrun.planning.cost import CostModel
from batchrun.request import ENDPOINTS, Endpoint, Requests, SamplingParams, TextColumn
from batchrun.schedule.step import PastTokens, Step, StepOutput
from batchrun.specs import DeviceSpec, ModelSpec
from batchrun.tokens import TokenTable

# Rows are dear and merges cheap, so that small jobs share on all levels.
DEVICE = DeviceSpec(
    "cpu",
    "cpu",
    memory_bytes=1 << 30,
    kv_share=0.5,
    page_size=16,
    step_tokens=64,
    flops={"float32": 1e11},
    bandwidth=1e10,
)
DEAR_ROWS = CostModel(ModelSpec("llama", 50, 4096, 16384, 1, 1, 1, 1, 4096, None, "float32"), DEVICE, "float32")


def next_token(context: list[int], vocabulary: int = 50) -> int:
    """A "model": the next token depends on every token before it."""
    return zlib.crc32(np.asarray(context, dtype=np.int32).tobytes()) % vocabulary


def answer(prompt: list[int], limit: int, end: int | None, vocabulary: int = 50) -> list[int]:
    """What the "model" answers when it runs alone."""
    sampled: list[int] = []
    while len(sampled) < limit and (not sampled or sampled[-1] != end):
        sampled.append(next_token(prompt + sampled, vocabulary))
    return sampled


def make_requests(
    prompts: list[list[int]], limits: list[int], *, ignore_eos: bool = False, expected_tokens: list[int] | None = None
) -> Requests:
    """Requests as the pipeline would make them, one a line."""
    count = len(prompts)
    return Requests(
        tokens=TokenTable.from_rows(prompts),
        line=np.arange(count, dtype=np.int32),
        sampling_id=np.zeros(count, dtype=np.int32),
        sampling=[SamplingParams(temperature=0.0, ignore_eos=ignore_eos)],
        max_new_tokens=np.asarray(limits, dtype=np.int32),
        seed=np.arange(count, dtype=np.uint64),
        expected_tokens=np.asarray(expected_tokens or [0] * count, dtype=np.int32),
        line_numbers=np.arange(1, count + 1, dtype=np.int32),
        custom_ids=TextColumn.of(f"r{i}" for i in range(count)),
        endpoints=np.full(count, ENDPOINTS.index(Endpoint.CHAT), dtype=np.uint8),
    )


class ContextWorker:
    """Keeps, in place of K and V, the token and the position of each place of the pool; checks that every row sees
    the whole of its context, each token once, and samples by `next_token`. Steps are computed when they are collected,
    so that it may lag behind what is submitted."""

    def __init__(self, requests: Requests, page_size: int, pages: int, *, end: int | None = None) -> None:
        self.requests = requests
        self.page_size = page_size
        self.end = end
        self.token = np.full(pages * page_size, -1)
        self.position = np.full(pages * page_size, -1)
        self.owner = np.full(pages, -1)
        self.pages_of: dict[int, list[int]] = {}
        self.sampled: dict[int, list[int]] = {}
        self.steps: list[Step] = []
        self.under_way: deque[Step] = deque()
        self.before = np.zeros(0, dtype=np.int32)  # what the step before sampled

    def submit(self, step: Step) -> None:
        self.steps.append(step)
        self.under_way.append(step)

    def restart(self) -> None:
        self.token[:], self.position[:], self.owner[:] = -1, -1, -1
        self.pages_of.clear()
        self.under_way.clear()

    def close(self) -> None:
        pass

    def collect(self) -> StepOutput:
        step = self.under_way.popleft()
        token_ids = step.token_ids.copy()
        token_ids[token_ids < 0] = self.before[-1 - token_ids[token_ids < 0]]
        for slot in step.releases.tolist():
            for page in self.pages_of.pop(slot):
                assert self.owner[page] == slot
                self.owner[page] = -1
        for slot, page in zip(step.grant_sequence.tolist(), step.grant_page.tolist(), strict=True):
            assert self.owner[page] == -1, "a page has two owners"
            self.owner[page] = slot
            self.pages_of.setdefault(slot, []).append(page)
            self.token[page * self.page_size : (page + 1) * self.page_size] = -1
        if step.past is not None:
            ids = step.past.token_ids.copy()
            self.check_known(step.request, step.past)
            ids[ids < 0] = self.before[-1 - ids[ids < 0]]
            ends = np.cumsum(step.past.length)
            past = [ids[end - size : end].tolist() for end, size in zip(ends, step.past.length, strict=True)]
            assert ends[-1] == ids.size
        first_row = np.cumsum(step.length) - step.length
        assert int(step.length.sum()) == step.num_rows
        assert len(set(step.sequence.tolist())) == step.sequence.size
        # Store what all rows bring, then look.
        for c, slot in enumerate(step.sequence.tolist()):
            for k in range(int(step.length[c])):
                place = self.place(slot, int(step.start[c]) + k)
                self.token[place] = token_ids[first_row[c] + k]
                self.position[place] = step.depth[c] + step.start[c] + k
        reads = step.prefix_reads
        assert list(zip(reads.level, reads.first_row, strict=True)) == sorted(
            zip(reads.level, reads.first_row, strict=True)
        )
        tokens, ended = [], []
        for c, slot in enumerate(step.sequence.tolist()):
            seen: list[int] = []
            for j in range(reads.level.size):
                low, high = int(reads.first_row[j]), int(reads.first_row[j] + reads.rows[j])
                mine = range(int(first_row[c]), int(first_row[c] + step.length[c]))
                if low <= mine[0] < high:
                    assert low <= mine[-1] < high, "a read ends inside a chunk"
                    assert reads.position[j] == len(seen)
                    seen += self.read(int(reads.sequence[j]), int(reads.length[j]), len(seen))
            assert len(seen) == step.depth[c]
            seen += self.read(slot, int(step.start[c] + step.length[c]), len(seen))
            request = int(step.request[c])
            if request < 0:
                assert not step.samples[c]
                continue
            done = self.sampled.setdefault(request, [])
            whole = self.requests.tokens[request].tolist() + done
            assert seen == whole[: len(seen)]
            assert step.num_sampled[c] == len(done)
            assert step.samples[c] == (len(seen) == len(whole))
            if step.past is not None:
                looks = step.samples[c] and self.requests.sampling[self.requests.sampling_id[request]].looks_back
                assert past[c] == (done if looks else []), "the past of another request"
            if step.samples[c]:
                done.append(next_token(seen))
                tokens.append(done[-1])
                ended.append(done[-1] == self.end)
        self.before = np.array(tokens, dtype=np.int32)
        return StepOutput(self.before, np.array(ended, dtype=bool), 0.0)

    def check_known(self, request: np.ndarray, past: PastTokens) -> None:
        """What follows a grammar is computed only once all that it has sampled is known."""
        sampling = [self.requests.sampling[self.requests.sampling_id[one]] for one in request]
        follows = np.repeat([one.grammar is not None for one in sampling], past.length)
        assert (past.token_ids[follows] >= 0).all()

    def place(self, slot: int, own: int) -> int:
        return self.pages_of[slot][own // self.page_size] * self.page_size + own % self.page_size

    def read(self, slot: int, length: int, position: int) -> list[int]:
        places = [self.place(slot, own) for own in range(length)]
        assert self.position[places].tolist() == list(range(position, position + length)), "KV of another time"
        return self.token[places].tolist()
