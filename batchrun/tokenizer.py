"""Text to token ids and back, exactly as transformers does it: the tokenizer is the one that `AutoTokenizer`
builds, reached without the torch that `AutoTokenizer` imports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchrun.errors import ModelRefused, UsageError

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


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
        self._bytes = frozenset[int]()
        decoder = self._backend.decoder
        if decoder is not None and b'"ByteFallback"' in decoder.__getstate__():
            self._bytes = frozenset(id for token, id in fast.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the special tokens that the tokenizer adds by default."""
        return self._encode(texts, add_special_tokens=True)

    def encode_chats(self, chats: Iterable[Sequence[Mapping[str, Any]]]) -> list[list[int] | str]:
        """Token ids of each list of messages in the chat template, up to where the assistant begins to speak.

        Returns:
            For each chat its token ids or, where the template cannot render it, the reason.

        Raises:
            UsageError: the template itself is not valid Jinja.
        """
        from jinja2 import TemplateSyntaxError

        texts: list[str] = []
        faults: dict[int, str] = {}
        for i, messages in enumerate(chats):
            text = ""
            try:
                text = self._fast.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            except TemplateSyntaxError as error:
                raise UsageError(
                    f"The chat template is not valid Jinja: line {error.lineno}: {error.message}.",
                    hint="Give another with --chat-template FILE.",
                ) from error
            except Exception as error:  # a template can raise anything, and it concerns this chat only
                faults[i] = f"the chat template refuses these messages: {error}"
            texts.append(text)
        rows: list[list[int] | str] = [*self._encode(texts, add_special_tokens=False)]
        for i, fault in faults.items():
            rows[i] = fault
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def eos_token_ids(self, generation_config: Mapping[str, Any]) -> frozenset[int]:
        """Every id that ends a text: those of the model's `generation_config.json` and the tokenizer's own."""
        listed = generation_config.get("eos_token_id")
        ids = {*(listed if isinstance(listed, list) else [listed]), self._fast.eos_token_id}
        return frozenset(ids - {None})

    def writes_nothing(self, token_id: int) -> bool:
        """Whether a token leaves no trace in text: a special token, or an id that no token has."""
        return token_id in self._special or self._backend.id_to_token(token_id) is None

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is one byte, to be decoded together with the byte tokens next to it."""
        return token_id in self._bytes

    def _encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]


class IncrementalDecoder:
    """Text of one answer while its tokens arrive.

    What `push` returned so far is a prefix of `decode` of whatever tokens the answer ends up with, and with `flush`
    it is all of it. So text waits while a later token can still change it: a character whose bytes are not all
    there, or a run of byte tokens, which some tokenizers decode as a whole (`tokenizers.decoders.DecodeStream` does
    not wait for the end of such a run: it gives out text that later turns out wrong, or fails).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []  # tokens whose text was not given out yet
        # The tokens given out last, and their text: decoders treat the first token of a text in a special way, so
        # the pending ones are decoded behind these.
        self._context: list[int] = []
        self._context_text = ""

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is settled by it."""
        if self._tokenizer.writes_nothing(token_id):
            return ""
        self._pending.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""
        text = self._pending_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        self._context_text = self._tokenizer.decode(self._context)
        return text

    def flush(self) -> str:
        """The rest of the text, once no more tokens come."""
        return self._pending_text() if self._pending else ""

    def _pending_text(self) -> str:
        return self._tokenizer.decode(self._context + self._pending)[len(self._context_text) :]


class StopStrings:
    """Watches text that arrives in pieces for the first of several stop strings to be completed.

    The outcome depends on the text alone, not on how it was cut into pieces. Of stop strings that are completed by
    the same character the longest counts.

    Attributes:
        text: everything fed so far; once stopped, what stood before the stop string.
        stopped: whether a stop string occurred.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
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
            self.text = self.text[: min(found)[1]]
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
        case "mistral":
            return generic
        case "qwen2":
            name = "Qwen2Tokenizer"
        case "qwen3":
            name = name or "Qwen2Tokenizer"
    if name == "LlamaTokenizer" and '"ByteLevel"' in (model_dir / "tokenizer.json").read_text(encoding="utf-8"):
        return generic
    named = getattr(transformers, name, None)
    return named if isinstance(named, type) and issubclass(named, generic) else generic


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}
