"""Text to token ids and back, exactly as transformers does it: the tokenizer is the one that `AutoTokenizer`
builds, reached without the torch that `AutoTokenizer` imports."""

from __future__ import annotations

import json
import re
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, groupby, pairwise
from os.path import commonprefix
from pathlib import Path
from string import punctuation
from typing import Any

import numpy as np
import numpy.typing as npt

from batchrun.errors import ModelRefused, UsageError
from batchrun.request import TokenText

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
# The letters that stand for bytes in byte-level BPE (GPT-2): those that print stand for themselves, the others
# for the letters behind U+00FF in their order.
_PRINT = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINT}
_BYTE_OF |= {chr(0x100 + n): byte for n, byte in enumerate(byte for byte in range(0x100) if byte not in set(_PRINT))}
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")

Int32 = npt.NDArray[np.int32]


class Tokenizer:
    """A model's tokenizer and chat template. Built by `load_tokenizer`.

    Attributes:
        vocab_size: number of token ids, added tokens included.
        has_chat_template: whether chats can be encoded.
    """

    def __init__(self, fast: Any) -> None:
        self._fast = fast  # a transformers.PreTrainedTokenizerFast
        self._backend = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = len(fast)
        self.has_chat_template: bool = fast.chat_template is not None
        self._special = frozenset(id for id, token in fast.added_tokens_decoder.items() if token.special)
        self._tokens: dict[int, TokenText] = {}
        self._vocabulary: list[bytes] | None = None
        self._bytes = frozenset[int]()
        decoder = self._backend.decoder
        if decoder is not None and b'"ByteFallback"' in decoder.__getstate__():
            self._bytes = frozenset(id for token, id in fast.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, on all cores.

        Args:
            add_special_tokens: put in the special tokens that the tokenizer adds by default (BOS, for one).
        """
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encoded]

    def encode_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each word, at the beginning of a text and behind a space, as vLLM does for `bad_words`."""
        found = set()
        for word in words:
            for text in (word.lstrip(), " " + word.lstrip()):
                ids = tuple(self._backend.encode(text, add_special_tokens=False).ids)
                if ids:
                    found.add(ids)
        return tuple(sorted(found))

    def token(self, token_id: int) -> TokenText:
        """What one token stands for behind other text, special tokens too."""
        if token_id not in self._tokens:
            name = self._backend.id_to_token(token_id) or ""
            text = self.decode([token_id], skip_special_tokens=False, continues=True)
            data = text.encode("utf-8", "surrogatepass")
            if _REPLACEMENT in text:
                if token_id in self._bytes:
                    data = bytes([int(name[3:5], 16)])
                elif all(letter in _BYTE_OF for letter in name):  # written in the letters of byte-level BPE
                    data = bytes(_BYTE_OF[letter] for letter in name)
            self._tokens[token_id] = TokenText(text, data)
        return self._tokens[token_id]

    @property
    def chat_template(self) -> str | None:
        """The template's text; where there are several (one for tools, say), all of them; None if there is none."""
        template = self._fast.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template

    def template_for(self, tools: bool) -> str:
        """The text of the template that a chat is written in, one with tools or one without."""
        template = self._fast.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use" if tools and "tool_use" in template else "default")
        return template or ""

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens, by what is written for them where they are not left out."""
        return {token.content: id for id, token in self._fast.added_tokens_decoder.items() if token.special}

    def vocabulary(self, size: int) -> list[bytes]:
        """The bytes that each token below `size` adds to a text; none for special tokens and where there is none."""
        if self._vocabulary is None:
            self._vocabulary = self._token_bytes()
        known = self._vocabulary[:size]
        return known + [b""] * (size - len(known))

    def _token_bytes(self) -> list[bytes]:
        decoder, added = self._backend.decoder, self._fast.added_tokens_decoder
        letters = decoder is not None and json.loads(decoder.__getstate__()).get("type") == "ByteLevel"
        found = [b""] * (max(self._fast.get_vocab().values(), default=-1) + 1)
        for name, id in self._fast.get_vocab().items():
            if id in self._special:
                continue
            if letters and id not in added and all(letter in _BYTE_OF for letter in name):
                found[id] = bytes(map(_BYTE_OF.__getitem__, name))
            else:
                found[id] = self.token(id).bytes
        return found

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a chat in the chat template, up to where the assistant begins to speak. It has its special
        tokens in it already.

        Args:
            tools: those that the model may call.
            variables: further ones of the template, and `add_generation_prompt` and `continue_final_message`.

        Raises:
            ValueError: the template does not take these messages; the message says why.
            UsageError: the template itself is not valid Jinja.
        """
        from jinja2 import TemplateSyntaxError

        try:
            return self._fast.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                **{"add_generation_prompt": True, **(variables or {})},
            )
        except TemplateSyntaxError as error:
            raise UsageError(
                f"The chat template is not valid Jinja: line {error.lineno}: {error.message}.",
                hint="Give another with --chat-template FILE.",
            ) from error
        except Exception as error:  # a template can raise anything, and it concerns this chat only
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True, continues: bool = False) -> str:
        """The text of token ids, special tokens left out unless they are wanted.

        Args:
            continues: the text goes on from another one. Many decoders treat the first token of a text in a special
                way: those of Llama 2 and T5 leave out the space in front of a word.
        """
        if not continues:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        whole = self._backend.decode([*self.word, *ids], skip_special_tokens=skip_special_tokens)
        return whole[len(self._word_text) :]

    @cached_property
    def word(self) -> list[int]:
        """Token ids of some word, to decode others behind it; none where the vocabulary has no token for it."""
        try:
            ids = self._backend.encode("a", add_special_tokens=False).ids
        except Exception:  # it has no token for what it does not know either
            return []
        return [id for id in ids if id not in self._special]

    @cached_property
    def _word_text(self) -> str:
        return self._backend.decode(self.word)

    def eos_token_ids(self, generation_config: Mapping[str, Any]) -> frozenset[int]:
        """Every id that ends a text: those of the model's `generation_config.json` and the tokenizer's own."""
        listed = generation_config.get("eos_token_id")
        ids = {*(listed if isinstance(listed, list) else [listed]), self._fast.eos_token_id}
        return frozenset(ids - {None})

    def writes_nothing(self, token_id: int, *, skip_special_tokens: bool = True) -> bool:
        """Whether a token leaves no trace in text: a special token that is left out, or an id that no token has."""
        return (skip_special_tokens and token_id in self._special) or self._backend.id_to_token(token_id) is None

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is one byte, to be decoded together with the byte tokens next to it."""
        return token_id in self._bytes

    def section_starts(self) -> SectionStarts | None:
        """Where texts may be cut without a change of their token ids, or None: nowhere."""
        return _section_starts(self._backend)


class PromptEncoder:
    """Token ids of the prompts of a job: what is certain to be tokenised alike is tokenised once.

    Identical texts are, and identical sections of different ones: the system prompt of a chat, for instance
    (`SectionStarts`). Short ones are known within a call only: to keep one takes more memory than it has text, and
    about the time to tokenise it again.

    Args:
        kept_bytes: memory for sections that are kept for later calls, those used last.
        kept_from: characters from which on a section is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, kept_bytes: int = 64 << 20, kept_from: int = 256) -> None:
        self._tokenizer = tokenizer
        self._starts = tokenizer.section_starts()
        self._kept_from = kept_from
        self._kept: OrderedDict[tuple[bool, str], Int32] = OrderedDict()  # the one used last is last
        self._bytes_left = kept_bytes

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Int32]:
        """As `Tokenizer.encode_batch`; int32 arrays, which are not to be written to."""
        if self._starts is None:
            known = self._encode_sections(set(texts), add_special_tokens)
            return [known[text] for text in texts]
        before, after = self._starts.around if add_special_tokens else (_NO_IDS, _NO_IDS)
        sections = [self._starts.cut(text) for text in texts]
        known = self._encode_sections(set(chain.from_iterable(sections)), False)
        return [np.concatenate([before, *map(known.__getitem__, row), after]) for row in sections]

    def _encode_sections(self, sections: Collection[str], add_special_tokens: bool) -> dict[str, Int32]:
        known: dict[str, Int32] = {}
        new = []
        for section in sections:
            ids = self._kept.get((add_special_tokens, section))
            if ids is None:
                new.append(section)
            else:
                known[section] = ids
                self._kept.move_to_end((add_special_tokens, section))
        for section, row in zip(
            new, self._tokenizer.encode_batch(new, add_special_tokens=add_special_tokens), strict=True
        ):
            known[section] = ids = np.fromiter(row, dtype=np.int32, count=len(row))
            if len(section) >= self._kept_from:
                self._kept[add_special_tokens, section] = ids
                self._bytes_left -= _kept_bytes(section, ids)
        while self._bytes_left < 0:
            (_, section), ids = self._kept.popitem(last=False)
            self._bytes_left += _kept_bytes(section, ids)
        return known


def _kept_bytes(section: str, ids: Int32) -> int:
    return sys.getsizeof(section) + sys.getsizeof(ids) + 300  # the last for the key and its place in the dictionary


# --- sections -----------------------------------------------------------------------------------------------------

_NO_IDS = np.empty(0, dtype=np.int32)

# The parts that treat each section between added tokens by itself, all that `tokenizers` 0.23 has: what they do
# with a section depends on its text, and (Metaspace with prepend_scheme "first") on whether it begins the whole text.
_NORMALIZERS = {"BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled"}
_NORMALIZERS |= {"Prepend", "Replace", "Sequence", "Strip", "StripAccents"}
_PRE_TOKENIZERS = {"BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace"}
_PRE_TOKENIZERS |= {"Punctuation", "Sequence", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"}
# Those that change no ids but put some before and behind them.
_POST_PROCESSORS = {"BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"}
_MODELS = {"BPE", "Unigram", "WordLevel", "WordPiece"}
_PUNCTUATION = set(punctuation) - {"_"}  # ASCII's; none of it is a space or part of a word


class SectionStarts:
    """Where a text can be cut such that the token ids of the pieces, one after another, are those of the text.

    `tokenizers` takes added tokens out of a text before anything else, and each section between them goes through
    normalizer, pre-tokenizer and model by itself. So a text may be cut in front of an added token, if that token is
    found whatever stands around it:

    - it is looked for in the text as it is (`normalized` is false), where of the tokens that begin first the longest
      is taken, and the search goes on behind it; the same search is made here;
    - it asks nothing of its neighbours and takes no spaces from them (`single_word`, `lstrip` and `rstrip` are false);
    - it begins and ends with punctuation, so its neighbours, if they ask for a word's end or take spaces, see on its
      side what they see at the end of a text.

    Only the first piece begins where the text begins; every other one begins with its token, as it does in the text.

    Attributes:
        around: ids that the tokenizer adds before and behind those of a text.
    """

    def __init__(self, searched: Iterable[str], starts: Collection[str], around: tuple[Int32, Int32]) -> None:
        self._search = re.compile(_longest_of(sorted(searched)))
        self._starts = frozenset(starts)
        self.around = around

    def cut(self, text: str) -> list[str]:
        """The pieces of a text, none of them empty."""
        starts = (match.start() for match in self._search.finditer(text) if match[0] in self._starts)
        return [text[start:stop] for start, stop in pairwise((0, *starts, len(text))) if start < stop]


def _section_starts(backend: Any) -> SectionStarts | None:
    model = backend.model
    if (
        not _kinds(backend.normalizer) <= _NORMALIZERS
        or not _kinds(backend.pre_tokenizer) <= _PRE_TOKENIZERS
        or not _kinds(backend.post_processor) <= _POST_PROCESSORS
        or type(model).__name__ not in _MODELS
        # Tokenising at random (BPE dropout, sampling from a unigram model), and special tokens taken for text.
        or getattr(model, "dropout", None)
        or getattr(model, "alpha", None)
        or backend.encode_special_tokens
    ):
        return None
    searched = [token for token in backend.get_added_tokens_decoder().values() if not token.normalized]
    starts = [
        token.content
        for token in searched
        if not (token.single_word or token.lstrip or token.rstrip)
        and {token.content[0], token.content[-1]} <= _PUNCTUATION
    ]
    if not starts:
        return None
    one = backend.encode(starts[0])  # a text of one token
    at = one.special_tokens_mask.index(0)
    before, after = (np.array(ids, dtype=np.int32) for ids in (one.ids[:at], one.ids[at + 1 :]))
    return SectionStarts((token.content for token in searched), starts, (before, after))


def _kinds(part: Any) -> set[str]:
    """The kinds of a tokenizer's part and of those in it; none if it has no such part."""

    def kinds(state: dict[str, Any]) -> Iterator[str]:
        # A template may have the text twice in it, or not at all.
        template = state.get("single", ({"Sequence": {"id": "A"}},))
        if [piece["Sequence"]["id"] for piece in template if "Sequence" in piece] != ["A"]:
            yield "a template that does more than to add tokens"
        yield state["type"]
        for name in ("normalizers", "pretokenizers", "processors"):
            for inner in state.get(name, ()):
                yield from kinds(inner)

    try:
        return set() if part is None else set(kinds(json.loads(part.__getstate__())))
    except Exception:  # written in Python: it has no state that can be told
        return {"unknown"}


def _longest_of(texts: list[str]) -> str:
    """A regular expression for the longest of some sorted texts that stands at a place. It is a tree over their
    letters, as there may be thousands that begin alike."""
    may_end = not texts[0]
    branches = []
    for _, group in groupby(filter(None, texts), key=lambda text: text[0]):
        alike = list(group)
        shared = commonprefix(alike)  # noqa: RUF071 (of texts, letter by letter)
        branches.append(re.escape(shared) + _longest_of([text[len(shared) :] for text in alike]))
    if not branches:
        return ""
    tree = "|".join(branches)
    return (f"(?:{tree})" if may_end or len(branches) > 1 else tree) + ("?" if may_end else "")


# --- decoding -----------------------------------------------------------------------------------------------------


class IncrementalDecoder:
    """Text of one answer while its tokens arrive.

    What `push` returned so far is a prefix of `decode` of whatever tokens the answer ends up with, and with `flush`
    it is all of it. So text waits while a later token can still change it: a character whose bytes are not all
    there, or a run of byte tokens, which some tokenizers decode as a whole (`tokenizers.decoders.DecodeStream` does
    not wait for the end of such a run: it gives out text that later turns out wrong, or fails).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continues: bool = False) -> None:
        """`continues`: as for `Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._pending: list[int] = []  # tokens whose text was not given out yet
        # The tokens given out last, and their text: decoders treat the first token of a text in a special way, so
        # the pending ones are decoded behind these.
        self._context = tokenizer.word if continues else []
        self._context_text = self._decode(self._context) if continues else ""

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is settled by it."""
        if self._tokenizer.writes_nothing(token_id, skip_special_tokens=self._skip):
            return ""
        self._pending.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""
        text = self._pending_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return text

    def flush(self) -> str:
        """The rest of the text, once no more tokens come."""
        return self._pending_text() if self._pending else ""

    def _pending_text(self) -> str:
        return self._decode(self._context + self._pending)[len(self._context_text) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class StopStrings:
    """Watches text that arrives in pieces for the first of several stop strings to be completed.

    The outcome depends on the text alone, not on how it was cut into pieces. Of stop strings that are completed by
    the same character the longest counts.

    Args:
        keep: whether the stop string stays in the text.

    Attributes:
        text: everything fed so far; once stopped, what stood before the stop string.
        stopped: whether a stop string occurred.
    """

    def __init__(self, stop: Sequence[str], *, keep: bool = False) -> None:
        self._stop = stop
        self._keep = keep
        self._longest = max(map(len, stop))
        self.text = ""
        self.stopped = False

    def feed(self, piece: str) -> bool:
        """Take the next piece of text; return whether a stop string has occurred. Pieces after that are ignored."""
        if self.stopped or not piece:
            return self.stopped
        # A stop string that this piece completes begins at most its own length less one before the piece.
        start = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        found = [(at + len(stop), at) for stop in self._stop if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.stopped = True
            end, at = min(found)
            self.text = self.text[: end if self._keep else at]
        return self.stopped


def load_tokenizer(model_dir: Path, chat_template: Path | None = None) -> Tokenizer:
    """The tokenizer of a model directory.

    Args:
        chat_template: a Jinja file to use in place of the model's own template, or None.

    Raises:
        ModelRefused: the tokenizer cannot be loaded, or its text cannot be decoded as it comes.
        UsageError: the template file cannot be read.
    """
    try:
        fast = _tokenizer_class(model_dir).from_pretrained(model_dir)
    except Exception as error:  # what tokenizers and transformers raise on a broken file is not documented
        raise ModelRefused(f"The tokenizer of {model_dir} cannot be loaded: {error}.") from error
    if fast.clean_up_tokenization_spaces and _is_cleaned_up(fast):
        raise ModelRefused(
            f"The tokenizer of {model_dir} cleans up spaces in decoded text, which would change text after a stop "
            "string was looked for in it.",
            hint='Set "clean_up_tokenization_spaces": false in its tokenizer_config.json.',
        )
    if chat_template is not None:
        try:
            fast.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The chat template {chat_template} cannot be read: {error}.") from error
    return Tokenizer(fast)


def _is_cleaned_up(fast: Any) -> bool:
    """Whether transformers really cleans up where it is asked to: for BPE only if a second setting insists."""
    insists = fast.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return insists or type(fast.backend_tokenizer.model).__name__ != "BPE"


def _tokenizer_class(model_dir: Path) -> Any:
    """The class that `AutoTokenizer` picks for the architectures that batchrun runs.

    Some of them set up their own pre-tokeniser in place of that of tokenizer.json, so the choice changes token ids.
    """
    import transformers

    generic = transformers.PreTrainedTokenizerFast
    config = _read_json(model_dir / "config.json")
    name = _read_json(model_dir / "tokenizer_config.json").get("tokenizer_class") or config.get("tokenizer_class")
    name = (name or "").removesuffix("Fast")
    match config.get("model_type"):
        case "granite" | "mistral" | "mixtral" | "olmo2" | "phi3":
            return generic
        case "qwen2":
            name = "Qwen2Tokenizer"
        case "qwen3" | "qwen3_moe":
            name = name or "Qwen2Tokenizer"
        case "gemma2" | "gemma3" | "gemma3_text":
            name = name or "GemmaTokenizer"
    if name == "LlamaTokenizer" and '"ByteLevel"' in (model_dir / "tokenizer.json").read_text(encoding="utf-8"):
        return generic
    named = getattr(transformers, name, None)
    return named if isinstance(named, type) and issubclass(named, generic) else generic


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}
