"""What the demo model is trained on and asked: stock tables, questions about them, and the bundled job.

A conversation is a system prompt holding one shop's stock list, then questions with short answers. Which
item has how many boxes, and on which shelf, is drawn afresh for every table, so the answers can only be read
from the prompt. Training text is made of `Segment`s, each saying which of its tokens the loss should cover.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ITEMS = [
    "apples",
    "pears",
    "plums",
    "cherries",
    "lemons",
    "limes",
    "peaches",
    "grapes",
    "onions",
    "carrots",
    "beans",
    "peas",
    "beets",
    "leeks",
    "turnips",
    "radishes",
    "pumpkins",
    "olives",
    "almonds",
    "walnuts",
    "raisins",
    "dates",
    "figs",
    "lentils",
    "noodles",
    "biscuits",
    "crackers",
    "waffles",
    "candles",
    "matches",
    "nails",
    "screws",
    "bolts",
    "hinges",
    "hammers",
    "ropes",
    "chains",
    "buckets",
    "brooms",
    "brushes",
    "sponges",
    "towels",
    "blankets",
    "pillows",
    "mugs",
    "plates",
    "bowls",
    "spoons",
    "forks",
    "knives",
    "kettles",
    "baskets",
    "bottles",
    "jars",
    "lamps",
    "clocks",
    "pencils",
    "crayons",
    "rulers",
    "envelopes",
]
SHOPS = [
    "Kestrel",
    "Heron",
    "Otter",
    "Badger",
    "Falcon",
    "Magpie",
    "Curlew",
    "Plover",
    "Robin",
    "Linnet",
    "Osprey",
    "Puffin",
    "Raven",
    "Siskin",
    "Swift",
    "Teal",
    "Avocet",
    "Bittern",
    "Dunlin",
    "Gannet",
]
NUMBERS = [str(number) for number in range(10, 100)]
SHELVES = [f"{letter}{digit}" for letter in "ABCDEF" for digit in range(1, 9)]

JOB_SEED = 20_240_611
JOB_ROWS = (16, 17, 18, 19, 20, 20, 20, 20, 21, 22, 23, 24)
# A line reads "- apples: 47 boxes, shelf C3". These are its words before the item, after it, and so on.
ROW_WORDING = ("\n-", ":", " boxes", ",", " shelf")
COUNT_QUESTIONS = ("How many boxes of {item} are there?", "How many boxes of {item} do you have?")
SHELF_QUESTIONS = ("On which shelf are the {item}?", "Where can I find the {item}?")


@dataclass(frozen=True)
class Row:
    item: str
    boxes: str
    shelf: str

    def line(self, wording: tuple[str, ...] = ROW_WORDING, values: str = "both") -> str:
        """One line of the list; `values` may leave out one of its two, as in "- apples: shelf C3"."""
        start, colon, boxes, comma, shelf = wording
        count = "" if values == "shelf" else f" {self.boxes}{boxes}"
        place = "" if values == "boxes" else f"{shelf} {self.shelf}"
        return f"{start} {self.item}{colon}{count}{comma if values == 'both' else ''}{place}"


@dataclass(frozen=True)
class Table:
    shop: str
    rows: tuple[Row, ...]

    def system_prompt(self) -> str:
        header = (
            f"You answer questions about the stock list of the shop {self.shop}. Each line names an item, "
            "the number of boxes in stock and the shelf they are on. Answer with one short sentence."
        )
        return header + "".join(row.line() for row in self.rows)


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


class Supervise(Enum):
    NOTHING = "nothing"
    VALUES = "values"  # only numbers and shelves: what a table tells and nothing else could
    ALL = "all"


@dataclass(frozen=True)
class Segment:
    text: str
    supervise: Supervise = Supervise.NOTHING


def draw_table(rng: random.Random, n_rows: int) -> Table:
    items = rng.sample(ITEMS, n_rows)
    rows = tuple(Row(item, rng.choice(NUMBERS), rng.choice(SHELVES)) for item in items)
    return Table(rng.choice(SHOPS), rows)


def all_turns(rng: random.Random, table: Table) -> list[Turn]:
    """Two questions about every row, one for each attribute, in random order and wording."""
    turns = []
    for row in table.rows:
        count = rng.choice(COUNT_QUESTIONS).format(item=row.item)
        turns.append(Turn(count, f"Stock of {row.item}: {row.boxes} boxes."))
        where = rng.choice(SHELF_QUESTIONS).format(item=row.item)
        turns.append(Turn(where, f"Place of {row.item}: shelf {row.shelf}."))
    rng.shuffle(turns)
    return turns


def repeated_run(rng: random.Random, length: int, gap: int) -> list[Segment]:
    """A run of random words, something else, and the same run again: the simplest thing to look up."""
    words = ITEMS + NUMBERS + SHELVES
    run = "".join(f" {word}" for word in rng.choices(words, k=length))
    filler = "".join(f" {word}" for word in rng.choices(words, k=rng.randint(0, gap)))
    return [Segment(run + filler), Segment(run, Supervise.ALL)]


def recited_table(rng: random.Random, n_rows: int, keep: float) -> list[Segment]:
    """The lines of a table, then the same lines in another order: two lookups a line.

    `keep` is the chance of each word around the values to stay in the lines of this table. Without any, every
    value directly follows what it is looked up by. Half of the time the second lines leave out words of their
    own and one of the two values, so that only the item tells which value is meant, at whatever distance.
    """
    rows = draw_table(rng, n_rows).rows
    wording = drawn_wording(rng, keep)
    lines = "".join(row.line(wording) for row in rows)
    again = rng.sample(rows, n_rows)
    if rng.random() < 0.5:
        wording = drawn_wording(rng, keep)
        second = "".join(row.line(wording, rng.choice(("boxes", "shelf"))) for row in again)
    else:
        second = "".join(row.line(wording) for row in again)
    return [Segment(lines), Segment(second, Supervise.VALUES)]


def drawn_wording(rng: random.Random, keep: float) -> tuple[str, ...]:
    return tuple(part if rng.random() < keep else "" for part in ROW_WORDING)


def conversation(table: Table, turns: list[Turn]) -> list[Segment]:
    """The chat format of the job, as the chat template renders it, with the answers supervised."""
    segments = [Segment(f"<|im_start|>system\n{table.system_prompt()}<|im_end|>\n")]
    for turn in turns:
        asked = f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n"
        segments += [Segment(asked), Segment(f"{turn.answer}<|im_end|>", Supervise.ALL), Segment("\n")]
    return segments[:-1]


def job_conversations() -> Iterator[tuple[Table, Turn]]:
    """The bundled job's requests, unshuffled: every question about every row of its tables."""
    rng = random.Random(JOB_SEED)
    shops = rng.sample(SHOPS, len(JOB_ROWS))
    for shop, n_rows in zip(shops, JOB_ROWS, strict=True):
        table = Table(shop, draw_table(rng, n_rows).rows)
        for turn in all_turns(rng, table):
            yield table, turn


def job_tables() -> set[tuple[Row, ...]]:
    return {table.rows for table, _ in job_conversations()}


def write_job(folder: Path) -> int:
    """Write job.jsonl (OpenAI Batch lines, tables interleaved at random) and answers.jsonl."""
    requests = list(job_conversations())
    random.Random(JOB_SEED + 1).shuffle(requests)
    job, answers = [], []
    for number, (table, turn) in enumerate(requests, start=1):
        custom_id = f"{table.shop.lower()}-{number:03d}"
        messages = [
            {"role": "system", "content": table.system_prompt()},
            {"role": "user", "content": turn.question},
        ]
        body = {"model": "demo", "messages": messages, "max_tokens": 16, "temperature": 0}
        job.append({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})
        answers.append({"custom_id": custom_id, "answer": turn.answer})
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("job.jsonl", job), ("answers.jsonl", answers)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return len(job)
