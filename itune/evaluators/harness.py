"""An itune model for lm-evaluation-harness, in this process and on its own mesh: a complete `LM`.

It does what the harness's own `hf` model does on the same folder, request by request: the same windows, cuts and stop
strings. Imported only where `lm_eval` is installed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from itune import decode
from itune.data.templates import TemplateRefusal, require_template
from itune.evaluators.heldout_loss import mesh_of, token_step
from itune.sharding import rows_divisor
from itune.types import Batch, InputError

DEFAULT_NEW_TOKENS = 256  # the harness's, where a task names no limit
MARK = "ITUNE_GO_ON_HERE "  # put where a prefilled answer ends, to find the place in the rendered text
CHECK_EVERY = 16  # tokens between two looks for a stop string
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
Scored = tuple[Any, list[int], list[int]]


class HarnessModel(TemplateLM):
    """`loglikelihood`, `loglikelihood_rolling`, `generate_until` and the chat template for a model on any mesh.

    batch_size: rows at one time. stop_ids: what ends an answer besides the task's strings; the tokenizer's by default.
    chunk: tokens whose logits exist at one time.
    """

    def __init__(
        self, model: Any, params: Any, tokenizer: Any, batch_size: int = 16, stop_ids: Sequence[int] | None = None,
        chunk: int = 1024, seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.params, self.ours, self.tokenizer = model, params, tokenizer, tokenizer.hf
        divisor = rows_divisor(mesh_of(model))
        self.rows = -(-batch_size // divisor) * divisor
        self.stop_ids = tuple(tokenizer.stop_ids if stop_ids is None else stop_ids)
        self.chunk, self.seed = chunk, seed

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise InputError("lm_eval: the tokenizer has no end-of-text token (eos); expected one")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the beginning-of-text token, else that of its end."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def max_length(self) -> int:
        return self.model.config.max_length

    @property
    def max_gen_toks(self) -> int:
        return DEFAULT_NEW_TOKENS

    @property
    def batch_size(self) -> int:
        return self.rows

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids as transformers gives them; no second beginning-of-text token where the text has one."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return require_template(self.ours).source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, rendered in the sandbox; without a generation prompt it ends with the last
        message's content, for the model to go on. A template that refuses system messages gets none.
        """
        template, messages = require_template(self.ours), [dict(message) for message in chat_history]
        if not add_generation_prompt:
            messages[-1]["content"] += MARK
        try:
            text = template.render(messages, add_generation_prompt=add_generation_prompt)
        except TemplateRefusal as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise InputError(f"lm_eval: the chat template refuses a task's messages: {error}") from error
            return self.apply_chat_template(rest, add_generation_prompt)
        if add_generation_prompt:
            return text
        before, mark, after = text.rpartition(MARK.strip())
        if not mark:
            raise InputError("lm_eval: the chat template leaves out a prefilled answer; expected one that writes it")
        return before if after.startswith(" ") else before.rstrip()  # a template that trims leaves no space at its end

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding gives it) of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Scored] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(place)
        sums = [0.0] * len(requests)
        for place, (found, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[place] += found
        for request, found in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found)
        return sums

    def _loglikelihood_tokens(self, requests: list[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        """(sum of log-probabilities in nats, whether greedy decoding gives these tokens) of each continuation."""
        sequences = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        longest_first = sorted(range(len(requests)), key=lambda place: -len(sequences[place]))
        for start in range(0, len(requests), self.rows):
            chosen = longest_first[start : start + self.rows]
            batch = self._batch([sequences[place] for place in chosen], [len(requests[place][2]) for place in chosen])
            nll_BL, correct_BL = (np.asarray(x) for x in token_step(self.model, self.chunk)(self.params, {}, batch))
            for row, place in enumerate(chosen):
                scored_L = batch.loss_weights_BL[row] > 0
                value = (-float(nll_BL[row, scored_L].astype(np.float64).sum()), bool(correct_BL[row, scored_L].all()))
                found[place] = value
                if requests[place][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], value)
        return found

    def _batch(self, sequences: list[list[int]], scored: list[int]) -> Batch:
        """One batch of `rows` rows, padded to a power of two, so that few shapes are compiled."""
        longest = max(len(sequence) for sequence in sequences) - 1
        length = min(max(16, 1 << (max(longest, 1) - 1).bit_length()), max(self.max_length, longest))
        tokens_BL, targets_BL, segments_BL = (np.zeros((self.rows, length), np.int32) for _ in range(3))
        weights_BL = np.zeros((self.rows, length), np.float32)
        for row, (sequence, count) in enumerate(zip(sequences, scored, strict=True)):
            size = len(sequence) - 1
            if count > size:
                raise InputError(f"lm_eval: a continuation of {count} tokens has no context left within the model's "
                                 f"{self.max_length}; expected a shorter one")
            tokens_BL[row, :size], targets_BL[row, :size] = sequence[:-1], sequence[1:]
            weights_BL[row, size - count : size], segments_BL[row, :size] = 1, 1
        positions_BL = np.broadcast_to(np.arange(length, dtype=np.int32), (self.rows, length)).copy()
        return Batch(tokens_BL, targets_BL, weights_BL, segments_BL, positions_BL)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, end token or the task's limit; sampled where the task says so."""
        alike: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items(), key=str))].append(place)
        texts = [""] * len(requests)
        for places in alike.values():
            given = requests[places[0]].args[1]
            for place, text in zip(places, self._generate([requests[p].args[0] for p in places], given), strict=True):
                texts[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return texts

    def _generate(self, contexts: list[str], given: dict[str, Any]) -> list[str]:
        limit = int(next((given[name] for name in _LIMITS if given.get(name) is not None), DEFAULT_NEW_TOKENS))
        room = self.max_length - limit
        if room <= 0:
            raise InputError(f"lm_eval: a task asks for {limit} new tokens, the model's context has {self.max_length}; "
                             "set a smaller max_gen_toks in eval.lm_eval_options.gen_kwargs")
        until = given.get("until") or []
        stops = [*([until] if isinstance(until, str) else until), self.tokenizer.decode(self.eot_token_id)]
        temperature = float(given.get("temperature") or 0.0) if given.get("do_sample", True) else 0.0
        sampling = decode.make_sampling(temperature, float(given.get("top_p") or 1.0), self.stop_ids)
        prompts = [np.asarray(self.tok_encode(text)[-room:], np.int32) for text in contexts]
        longest_first = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        texts = [""] * len(prompts)
        for start in range(0, len(prompts), self.rows):
            chosen = longest_first[start : start + self.rows]
            batch = [prompts[place] for place in chosen]
            for answers in decode.grow(self.model, self.params, batch, chosen, sampling, limit, self.seed, self.rows,
                                       CHECK_EVERY):  # fmt: skip
                cut = [self._cut(answer.ids, stops) for answer in answers]
                if all(answer.stopped or found for answer, (_, found) in zip(answers, cut, strict=True)):
                    break
            for place, (text, _) in zip(chosen, cut, strict=True):
                texts[place] = text
        return texts

    def _cut(self, ids: np.ndarray, stops: Sequence[str]) -> tuple[str, bool]:
        """The text before the first stop string, and whether there was one."""
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        short = text
        for stop in stops:
            if stop:
                short = short.split(stop)[0]
        return short, len(short) < len(text)
