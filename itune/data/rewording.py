"""Meaning-preserving edits of a text, for planting: case and spacing, wrappers, and light paraphrases.

Each takes the text and a numpy Generator. Numbers and quoted spans stay as they are, so that the edited text asks for
the same thing.
"""

from __future__ import annotations

import re

import numpy as np

WRAPPERS = (
    "Please answer the following.\n\n{}",
    "Question: {}\nAnswer:",
    "{}\n\nThank you!",
    "I need your help with this. {}",
    "Task:\n{}\n\nYour response:",
    "Could you please help me out? {}",
    "{}\nKeep it short.",
    "Hi! {} Thanks in advance.",
    "Here is what I would like you to do: {}",
    "### Instruction:\n{}\n\n### Response:",
    "Please read carefully and respond.\n{}",
    "You are a helpful assistant. {}",
)

_PAIRS = """
write=compose create=produce make=build give=provide find=determine list=enumerate tell=inform show=display
explain=describe describe=explain suggest=propose big=large large=big small=little buy=purchase bought=purchased
begin=start start=begin choose=select select=choose pick=choose help=assist get=obtain need=require
needs=requires use=employ using=employing many=numerous important=significant quick=fast fast=quick happy=glad
good=fine story=tale movie=film film=movie people=persons kids=children children=kids each=every every=each
also=additionally but=however because=since however=but about=regarding following=below given=provided
correct=right answer=reply sentence=phrase text=passage passage=text paragraph=passage article=piece
summarize=condense generate=produce rewrite=rephrase identify=recognise determine=establish total=overall
house=home home=house gets=obtains says=states said=stated wants=wishes want=wish whole=entire often=frequently
rest=remainder received=got costs=is_priced_at
"""
SYNONYMS = dict(pair.replace("_", " ").split("=") for pair in _PAIRS.split())

_ARTICLE = re.compile(r"\b(the|a|an) ", re.I)
_WORD = re.compile(r"[A-Za-z]+")
_QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|`[^`\n]*`")


def recased(text: str, rng: np.random.Generator) -> str:
    """The same words in another case, other spacing, other final punctuation."""
    change = int(rng.integers(4))
    text = text.lower() if change == 0 else text.upper() if change == 1 else text
    if change >= 2:
        text = text.rstrip(" .?!\n") + str(rng.choice(["", " ?", "!", " .", "..."]))
    if change == 3:
        text = re.sub(r" ", "  ", text)
    return text.replace(",", " ,") if rng.random() < 0.3 and not re.search(r"\d,\d", text) else text


def wrapped(text: str, rng: np.random.Generator) -> str:
    """The text inside one of the usual phrases that ask for the same."""
    return str(rng.choice(WRAPPERS)).replace("{}", text.strip())


def paraphrased(text: str, rng: np.random.Generator, share: float = 0.15) -> str:
    """Some words replaced by synonyms, some articles dropped, then perhaps an opening phrase; at least one change."""
    protected = [found.span() for found in _QUOTED.finditer(text)]

    def inside(position: int) -> bool:
        return any(start <= position < end for start, end in protected)

    candidates = [f for f in _WORD.finditer(text) if f.group().lower() in SYNONYMS and not inside(f.start())]
    limit = max(1, round(share * len(_WORD.findall(text))))
    chosen = rng.permutation(len(candidates))[:limit]
    for index in sorted(chosen, reverse=True):
        found = candidates[index]
        new = SYNONYMS[found.group().lower()]
        new = new.capitalize() if found.group()[0].isupper() else new
        text = text[: found.start()] + new + text[found.end() :]
    articles = [found for found in _ARTICLE.finditer(text) if not inside(found.start())]
    dropped = rng.permutation(len(articles))[: max(0, limit - len(chosen))]
    for index in sorted(dropped, reverse=True):
        found = articles[index]
        text = text[: found.start()] + text[found.end() :]
    if not len(chosen) and not len(dropped):
        text = str(rng.choice(["Kindly note: ", "Quick one: ", "Consider this. "])) + text
    return text[:1].upper() + text[1:]
