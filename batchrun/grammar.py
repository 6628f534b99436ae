"""Grammars that answers follow: what llguidance says about them, and which tokens they allow.

An answer under a grammar is at each place the beginning of a text that the grammar has; it can end only where it is
such a text. The library can also write what is certain by itself, a token of its own choice at a time; that is switched
off (`no_forcing`), so that a token is allowed exactly if the text with it can be gone on with.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from batchrun.request import Grammar

Int32 = npt.NDArray[np.int32]

_OPTIONS = '%llguidance {"no_forcing": true}\n'
_KEPT = 1024  # compiled grammars
_SPECIAL = b"\xff"  # what begins no character: the library's mark of tokens that are no text


class GrammarError(ValueError):
    """A grammar that cannot be followed; the message is the library's."""


class Matcher:
    """Where an answer stands in its grammar."""

    __slots__ = ("_matcher", "consumed")

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.consumed = 0  # tokens of the answer

    def fresh(self) -> Matcher:
        """One that stands at the beginning, as this one does."""
        return Matcher(self._matcher.deep_copy())

    def consume(self, token_ids: list[int]) -> None:
        """Go on by some tokens."""
        self._matcher.consume_tokens(token_ids)
        self.consumed += len(token_ids)

    @property
    def fault(self) -> str | None:
        """Why no token can follow, or None: the vocabulary has none, or the library's limits are reached."""
        return _short(self._matcher.get_error()) if self._matcher.is_error() else None


class Grammars:
    """Compiles grammars for a vocabulary, and keeps those used of late.

    Args:
        vocabulary: the bytes that each token adds to a text; empty for tokens that add nothing, which no grammar
            allows.
    """

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        from llguidance import LLExecutor, LLTokenizer, TokenizerWrapper

        self.vocab_size = len(vocabulary)
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(vocabulary)))
        self._executor = LLExecutor(min(os.cpu_count() or 1, 8))
        self._compile = lru_cache(_KEPT)(self._compile_anew)  # in a job each line may have its own

    def fault(self, grammar: Grammar) -> str | None:
        """Why a grammar cannot be followed, or None if it can."""
        compiled = self._compile(grammar)
        return compiled if isinstance(compiled, str) else None

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning.

        Raises:
            GrammarError: the grammar cannot be followed.
        """
        compiled = self._compile(grammar)
        if isinstance(compiled, str):
            raise GrammarError(compiled)
        return compiled.fresh()

    def allowed(self, matchers: Sequence[Matcher]) -> tuple[Int32, npt.NDArray[np.bool_]]:
        """The tokens that may come next. The interpreter is free for other threads meanwhile.

        Returns:
            Bits, int32 `[M, ceil((vocabulary + 1) / 32)]`, token t being bit t % 32 of word t // 32, and which answers
            may end here, bool `[M]`.
        """
        from llguidance.numpy import fill_next_token_bitmask_par

        bits = np.zeros((len(matchers), self.vocab_size // 32 + 1), dtype=np.int32)
        fill_next_token_bitmask_par(self._executor, [(m._matcher, row) for row, m in enumerate(matchers)], bits)
        # The end of the library's own vocabulary comes behind all tokens.
        last, end = bits[:, self.vocab_size // 32], np.int32(self.vocab_size % 32)
        may_end = (last >> end) & 1 == 1
        last &= ~np.left_shift(np.int32(1), end)
        return bits, may_end

    def _compile_anew(self, grammar: Grammar) -> Matcher | str:
        from llguidance import LLMatcher

        try:
            text = _source(grammar)
        except Exception as error:  # what the library raises is not documented
            return _short(str(error))
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            return _short(matcher.get_error())
        compiled = Matcher(matcher)
        first = compiled.fresh()
        self.allowed([first])
        return first.fault or compiled


class _Vocabulary:
    """A vocabulary as llguidance wants it, with one token more, which stands for the end of an answer."""

    bos_token_id = None

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self.eos_token_id = len(vocabulary)
        self.tokens = [token or b"%b[%d]" % (_SPECIAL, id) for id, token in enumerate([*vocabulary, b""])]
        self.special_token_ids = [id for id, token in enumerate([*vocabulary, b""]) if not token]

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("nothing is tokenised: the library is to write no text of its own")


def _source(grammar: Grammar) -> str:
    """A grammar as llguidance takes it."""
    if grammar.kind == "thought":
        return _behind_thought(**json.loads(grammar.text))
    return _OPTIONS + _lark(grammar)


def _lark(grammar: Grammar) -> str:
    """A grammar in llguidance's own dialect of Lark."""
    if grammar.kind == "json":
        return f"start: %json {grammar.text}"
    if grammar.kind == "calls":
        return _calls(**json.loads(grammar.text))
    if grammar.kind == "regex":
        from llguidance import LLMatcher

        [compiled] = json.loads(LLMatcher.grammar_from_regex(grammar.text))["grammars"]
        return str(compiled["lark_grammar"])
    if grammar.kind == "choice":
        choices = json.loads(grammar.text)
        return "start: " + " | ".join(map(_literal, choices))
    from llguidance.gbnf_to_lark import any_to_lark

    return str(any_to_lark(grammar.text))


def _calls(
    begin: list[str | int],
    between: list[str | int],
    end: list[str | int],
    calls: list[list[Any]],
    many: bool,
    **otherwise: Any,
) -> str:
    """Calls of tools, one at least; each piece of them is a text, the id of a special token, or a JSON schema.
    `otherwise` may be a schema of JSON that there may be instead."""
    more = f"({_pieces(between)} call)*" if many else ""
    instead = "".join(f" | {_schema(schema)}" for schema in otherwise.values())
    return f"start: {_pieces(begin)} call {more} {_pieces(end)}{instead}\ncall: " + "\n  | ".join(map(_pieces, calls))


def _pieces(pieces: Sequence[Any]) -> str:
    return " ".join(
        f"<[{piece}]>" if isinstance(piece, int) else _literal(piece) if isinstance(piece, str) else _schema(piece)
        for piece in pieces
    )


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(schema: dict[str, Any] | bool) -> str:
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _behind_thought(begin: str, end: str, optional: bool, then: tuple[str, str]) -> str:
    """A grammar behind a thought, in the library's form for grammars that have others in them."""
    top = f"start: thought{'?' if optional else ''} @answer\n"
    top += f"thought: {_literal(begin) if begin else ''} rest /\\n{{0,2}}/\nrest[suffix={_literal(end)}]: /(.|\\n)*/"
    parts = [{"lark_grammar": _OPTIONS + top}, {"name": "answer", "lark_grammar": _OPTIONS + _lark(Grammar(*then))}]
    return json.dumps({"grammars": parts}, ensure_ascii=False)


def _short(message: str) -> str:
    """The reason of an error message of llguidance: without the text of the grammar and the state of its parser."""
    if message.startswith("NoExtension"):
        return "no token of the vocabulary can follow"
    reason = message.split("\n<state>", maxsplit=1)[0].strip()
    lines = [line.strip() for line in reason.splitlines()]
    kept = [line for line in lines if line and not line[0].isdigit() and line.strip("^ ")] or lines
    return re.sub(r"^at \d+\(\d+\): ", "", " ".join(kept))[:500]
