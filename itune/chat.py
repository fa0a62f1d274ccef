"""Talking to a model folder: a dialogue in the terminal, and the answers to a file of prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax

from itune.data.formats import messages_of
from itune.data.jsonl import read_jsonl
from itune.data.render import render_prompt
from itune.data.templates import load_tokenizer, require_template
from itune.decode import Generated, check_settings, generate_ids, stream_ids
from itune.models import load_pretrained
from itune.runtime.compilation import use_compilation_cache
from itune.sharding import make_mesh
from itune.types import Address, Conversation, InputError, Message
from itune.writers import write_atomically

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /quit ends"
COMMANDS = ("/reset", "/system", "/quit", "/help")


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A loaded model with its tokenizer."""

    model: Any
    params: Any
    tokenizer: Any

    def stream(
        self, messages: list[Message], max_new_tokens: int, temperature: float, seed: int
    ) -> Generator[str, None, None]:
        """The answer to a conversation in pieces of text, as it is made. Joined they are the whole answer."""
        conversation = Conversation(tuple(messages), Address("this conversation"))
        prompt, shown = render_prompt(conversation, self.tokenizer), ""
        answer = Generated(prompt[:0], False)
        for answer in stream_ids(
            self.model, self.params, prompt, max_new_tokens=max_new_tokens, stop_ids=self.tokenizer.stop_ids,
            temperature=temperature, seed=seed,
        ):
            text = self.tokenizer.decode(answer.ids).rstrip("\ufffd")  # half a character waits for its other bytes
            if text.startswith(shown):
                yield text[len(shown) :]
                shown = text
        text = self.tokenizer.decode(answer.ids)
        yield text[len(shown) :] if text.startswith(shown) else ""


def load_speaker(folder: str) -> Speaker:
    """Model and tokenizer of a folder or hub id, for inference: bfloat16 on accelerators, spread over their devices.

    A run directory gives its newest checkpoint, adapters beside their base, in the run's own dtypes. Raises InputError
    for a folder that cannot be loaded, or a tokenizer without a chat template.
    """
    use_compilation_cache()
    if (Path(folder) / "checkpoints").is_dir():
        from itune.saved_run import load_run

        run = load_run(folder, mesh=make_mesh({"fsdp": -1}))
        require_template(run.tokenizer)
        return Speaker(run.model, run.params, run.tokenizer)
    tokenizer = load_tokenizer(folder)
    require_template(tokenizer)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    mesh = make_mesh({"fsdp": -1}) if jax.device_count() > 1 else None
    model, params = load_pretrained(folder, mesh, dtype, compute_dtype=dtype)
    return Speaker(model, params, tokenizer)


class Dialogue:
    """The messages of a conversation so far, and what each line of the user does to them."""

    def __init__(self, speaker: Speaker, max_new_tokens: int = 256, temperature: float = 0.0) -> None:
        self.speaker, self.max_new_tokens, self.temperature = speaker, max_new_tokens, temperature
        self.system: list[Message] = []
        self.turns: list[Message] = []

    def answer(self, line: str) -> Generator[str, None, None]:
        """The pieces of the reply to a line: of the model's answer, or one line about a command.

        What the model has said when the caller stops listening stays in the conversation; a prompt that does not fit
        (InputError) does not.
        """
        if line.startswith("/"):
            yield self.command(line)
            return
        asked, said = [*self.turns, Message("user", line)], ""
        try:
            pieces = self.speaker.stream(
                [*self.system, *asked], self.max_new_tokens, self.temperature, seed=len(asked)
            )
            for piece in pieces:
                said += piece
                yield piece
        finally:
            if said:
                self.turns = [*asked, Message("assistant", said)]

    def command(self, line: str) -> str:
        name, _, text = line.partition(" ")
        if name == "/reset":
            self.turns.clear()
            return "(forgotten)"
        if name == "/system":
            system = [Message("system", text.strip())] if text.strip() else []
            try:
                asked = (*system, Message("user", "?"))
                render_prompt(Conversation(asked, Address("/system")), self.speaker.tokenizer)
            except InputError as error:
                return f"({error}; nothing changes)"
            self.system = system
            self.turns.clear()
            return "(system message set, conversation forgotten)" if self.system else "(no system message)"
        if name == "/help":
            return HELP
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        return f"(no command {name}{f'; did you mean {near[0]}?' if near else ''}; {HELP})"


def chat(
    model: str, max_new_tokens: int = 256, temperature: float = 0.0, *, read: Callable[[str], str] = input
) -> None:
    """Read lines, stream answers, until /quit or the end of input. Ctrl-C ends an answer, and the chat between two.

    Raises InputError for a model that cannot be loaded or has no chat template.
    """
    check_settings(max_new_tokens, temperature)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is refused below, and the chat goes on
    speaker = load_speaker(model)
    dialogue = Dialogue(speaker, max_new_tokens, temperature)
    print(f"{model}: {HELP}")
    while True:
        try:
            line = read("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if not line:
            continue
        if not line.isascii() and any("\ud800" <= character <= "\udfff" for character in line):
            print("(this line is not UTF-8; nothing was asked)")
            continue
        try:
            with contextlib.closing(dialogue.answer(line)) as pieces:
                for piece in pieces:
                    print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" (stopped)")
        except InputError as error:
            print(f"({error}; /reset forgets the conversation)")


def generate_file(
    model: str, prompts: str, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0,
    out: str | None = None, *, top_p: float = 1.0, batch_size: int = 16, log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Answer every prompt of a file (see `read_prompts`) and print the answers, or write them to `out` as JSONL.

    Returns {"answers": [{address, messages, answer, stopped, tokens}], "seconds", "tokens_per_second"}; the time
    includes compilation. Raises InputError for a bad file or model.
    """
    check_settings(max_new_tokens, temperature, top_p, seed)
    conversations = read_prompts(prompts)
    speaker = load_speaker(model)
    ids = [render_prompt(conversation, speaker.tokenizer) for conversation in conversations]
    longest = speaker.model.config.max_length
    for conversation, prompt in zip(conversations, ids, strict=True):
        if len(prompt) >= longest:
            raise InputError(f"{conversation.address}: {len(prompt)} tokens; the model takes fewer than {longest}")
    begun = time.monotonic()
    answers = generate_ids(
        speaker.model, speaker.params, ids, max_new_tokens=max_new_tokens, stop_ids=speaker.tokenizer.stop_ids,
        temperature=temperature, top_p=top_p, seed=seed, batch_size=batch_size,
    )
    seconds = time.monotonic() - begun
    rows: list[dict[str, Any]] = []
    for conversation, answer in zip(conversations, answers, strict=True):
        messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
        text = speaker.tokenizer.decode(answer.ids)
        rows.append({"address": str(conversation.address), "messages": messages, "answer": text,
                     "stopped": answer.stopped, "tokens": len(answer.ids)})  # fmt: skip
    if out:
        write_atomically(Path(out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        log(f"{len(rows)} answers in {out}")
    else:
        for row in rows:
            log(f"> {row['messages'][-1]['content']}\n{row['answer']}{'' if row['stopped'] else ' (cut)'}\n")
    tokens = sum(row["tokens"] for row in rows)
    return {"answers": rows, "seconds": seconds, "tokens_per_second": tokens / seconds}


def read_prompts(file: str) -> list[Conversation]:
    """The conversations of a prompts file: a text file with a prompt a line (blank lines are left out), or JSONL
    (`.jsonl`, also `.gz` and `.zst`) whose rows have `messages` or `prompt`. Raises InputError with file and line.
    """
    path = Path(file)
    if not path.is_file():
        raise InputError(f"--prompts: no file {file}; expected text with a prompt a line, or JSONL")
    found = []
    if ".jsonl" in path.suffixes:
        for line, row in read_jsonl(file):
            where = f"{file}:{line}"
            if isinstance(row.get("prompt"), str):
                messages = _said(row["prompt"], f"{where}: prompt")
            elif "messages" in row:
                messages = messages_of(row["messages"], f"{where}: messages")
            else:
                keys = ", ".join(row) or "none"
                raise InputError(f"{where}: neither messages nor a prompt (keys found: {keys}); expected one of them")
            while messages and messages[-1].role == "assistant":  # what is asked ends before the answer
                messages = messages[:-1]
            if not messages:
                raise InputError(f"{where}: messages: nothing stands before the assistant's answer; expected a prompt")
            found.append(Conversation(tuple(messages), Address("prompts", file, line)))
    else:
        try:
            lines = path.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: byte {error.start} is not UTF-8; expected text with a prompt a line") from error
        for number, text in enumerate(lines, 1):
            if text.strip():
                said = _said(text.strip(), f"{file}:{number}")
                found.append(Conversation(tuple(said), Address("prompts", file, number)))
    if not found:
        raise InputError(f"{file}: holds no prompt; expected one a line")
    return found


def _said(text: str, where: str) -> list[Message]:
    """The user's message with this text, checked as those of a row are."""
    return messages_of([{"role": "user", "content": text}], where)
