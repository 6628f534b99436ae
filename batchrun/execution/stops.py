"""Stop strings: watches the text of the answers that have some, and gives every finished answer its text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from batchrun.request import Requests, SamplingParams
from batchrun.schedule.scheduler import Finished
from batchrun.tokenizer import IncrementalDecoder, StopStrings, Tokenizer


class _Watched:
    """The text of one answer under way. Stop strings count from the token after `min_tokens` on."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, continues: bool) -> None:
        skip = sampling.skip_special_tokens
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip, continues=continues)
        self._matcher = StopStrings(sampling.stop, keep=sampling.include_stop_str_in_output)
        self._before = sampling.min_tokens
        self._head = ""  # text that came before stop strings count

    def push(self, token_id: int) -> bool:
        piece = self._decoder.push(token_id)
        if self._before > 0:
            self._before -= 1
            self._head += piece
            return False
        return self._matcher.feed(piece)

    def end(self) -> tuple[str, bool]:
        """The answer's text up to a stop string, and whether there is one; what was held back counts too."""
        tail = self._decoder.flush()
        if self._before > 0:
            self._head += tail
        else:
            self._matcher.feed(tail)
        return self._head + self._matcher.text, self._matcher.stopped


class TextStops:
    """The text of all answers. Only those with stop strings are decoded while they run."""

    def __init__(self, tokenizer: Tokenizer, requests: Requests) -> None:
        self._tokenizer = tokenizer
        self._requests = requests
        # One that is asked for its prompt alone samples a token, which is no part of its text.
        self._with_stop = np.array([bool(s.stop) and not s.prompt_only for s in requests.sampling], dtype=bool)
        self._watched: dict[int, _Watched] = {}

    def watch(
        self,
        requests: npt.NDArray[np.int32],
        token_ids: npt.NDArray[np.int32],
        ended: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.bool_]:
        """Take the tokens of a step, `[S]` each; say which answers a stop string ends, bool `[S]`."""
        stopped = np.zeros(requests.size, dtype=bool)
        # A token that ends an answer is no part of its text.
        for row in np.flatnonzero(self._with_stop[self._requests.sampling_id[requests]] & ~ended).tolist():
            request = int(requests[row])
            watched = self._watched.get(request)
            if watched is None:
                sampling = self._requests.sampling[self._requests.sampling_id[request]]
                watched = _Watched(self._tokenizer, sampling, self.continues(request))
                self._watched[request] = watched
            stopped[row] = watched.push(int(token_ids[row]))
        return stopped

    def text(self, finished: Finished) -> tuple[str, bool]:
        """The text of a finished answer, and whether a stop string ended it."""
        requests = self._requests
        sampling = requests.sampling[requests.sampling_id[finished.request]]
        skip = sampling.skip_special_tokens
        watched = self._watched.pop(finished.request, None)
        if watched is not None:
            text, by_text = watched.end()
        else:
            ids = finished.token_ids[:-1] if finished.ended else finished.token_ids
            continues = self.continues(finished.request)
            text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=skip, continues=continues)
            by_text = False
        if sampling.echo:
            prompt = requests.tokens[finished.request].tolist()
            text = self._tokenizer.decode(prompt, skip_special_tokens=skip) + text
        return text, by_text

    def continues(self, request: int) -> bool:
        """Whether there is text that an answer goes on from."""
        sampling = self._requests.sampling[self._requests.sampling_id[request]]
        if not sampling.continues:
            return False
        skip, backwards = sampling.skip_special_tokens, self._requests.tokens[request][::-1]
        return not all(self._tokenizer.writes_nothing(int(id), skip_special_tokens=skip) for id in backwards)
