"""The data report as one HTML page that needs nothing else: light and dark, no script, no request."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from itune.data.limits import Judged

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --box: #f5f6f8; --text: #1c2128; --soft: #5b6570; --rule: #d9dee4;
  --fill: #3f7fca; --fill2: #d98a4a; --fine: #1a7f4b; --fault: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --box: #1d2228; --text: #e4e8ec; --soft: #98a3ae;
  --rule: #343c45; --fill: #5c9fe6; --fill2: #e0a066; --fine: #5cc98f; --fault: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1.2rem 1rem 4rem;
  background: var(--paper); color: var(--text); }
h1 { font-size: 1.5rem; margin: .4rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem;
  border-bottom: 1px solid var(--rule); } h3 { font-size: 1rem; margin: 1.1rem 0 .3rem; }
p { margin: .4rem 0; max-width: 48rem; } .soft { color: var(--soft); } .fine { color: var(--fine); }
.fault { color: var(--fault); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.card { background: var(--box); border-radius: 8px; padding: .6rem .8rem; } .card span { color: var(--soft);
  font-size: .85rem; display: block; } .card b { font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .22rem 1rem .22rem 0; text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 500; } tr + tr > * { border-top: 1px solid var(--rule); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.at { overflow-wrap: anywhere; } .pair { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
figure { margin: .3rem 0; max-width: 36rem; background: var(--box); border-radius: 8px; padding: .6rem .8rem;
  min-width: 0; }
figcaption { font-weight: 600; font-size: .92rem; } svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } rect.a { fill: var(--fill); }
rect.b { fill: var(--fill2); } details { margin: .4rem 0; } summary { cursor: pointer; }
"""


def page(report: Mapping[str, Any], judged: Sequence[Judged], proof: Mapping[str, Any]) -> str:
    """The page of a dataset's report, the limits it was judged by, and its held-out proof."""
    sections = [
        ("Limits", _limits(judged)), ("Rows in and out", _sources(report)), ("Lengths", _lengths(report)),
        ("Quality", _quality(report["quality"])), ("Balance", _balance(report)),
        ("Held out", _held_out(report["held_out"], proof)), ("Benchmarks", _benchmarks(report["benchmarks"])),
        ("Languages and scripts", _languages(report["languages"])), ("Voices", _voices(report["voices"])),
    ]  # fmt: skip
    body = "".join(f"<h2>{title}</h2>{text}" for title, text in sections if text)
    head = ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>Data report</title><style>{STYLE}</style>')  # fmt: skip
    return f"{head}<body><h1>Data report</h1>{_cards(report)}{body}</body></html>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers_from: int = 1) -> str:
    """A table; columns from `numbers_from` on hold numbers or text that lines up like them."""
    def cells(row: Sequence[Any], tag: str) -> str:
        kinds = ["" if i < numbers_from else ' class="n"' for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{_shown(cell)}</{tag}>" for kind, cell in zip(kinds, row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells(head, "th")}</tr>{body}</table></div>' if body else ""


def bars(title: str, names: Sequence[str], series: Sequence[Sequence[float]], legend: str = "") -> str:
    """An SVG bar chart; with two series the bars stand side by side."""
    width, height, left, bottom = 560, 200, 46, 36
    most = max((value for values in series for value in values), default=0) or 1
    slot = (width - left) / max(1, len(names))
    wide = slot * 0.8 / len(series)
    parts = [f'<text x="{left - 6}" y="14" text-anchor="end">{most:,.0f}</text>'
             f'<text x="{left - 6}" y="{height - bottom}" text-anchor="end">0</text>']  # fmt: skip
    for place, name in enumerate(names):
        for number, values in enumerate(series):
            tall = (height - bottom - 8) * values[place] / most
            x = left + place * slot + slot * 0.1 + number * wide
            parts.append(f'<rect class="{"ab"[number]}" x="{x:.1f}" y="{height - bottom - tall:.1f}" '
                         f'width="{wide:.1f}" height="{tall:.1f}"><title>{html.escape(name)}: {values[place]:,.6g}'
                         "</title></rect>")  # fmt: skip
        parts.append(f'<text x="{left + (place + 0.5) * slot:.1f}" y="{height - bottom + 16}" text-anchor="middle">'
                     f"{html.escape(name)}</text>")  # fmt: skip
    note = f'<span class="soft">{legend}</span>' if legend else ""
    return (f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img">'
            f"{''.join(parts)}</svg>{note}</figure>")  # fmt: skip


def _shown(value: Any) -> str:
    if value is None:
        return "cannot be told"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _cards(report: Mapping[str, Any]) -> str:
    held, lost = report["held_out"], report["truncated_tokens"]
    dropped = sum(report["dropped"].values())
    cards = [
        ("rows read", report["rows"], f"{_share(dropped, report['rows'])} left out"),
        ("examples to train on", report["examples"], ""),
        ("tokens", report["tokens"], f"{_share(report['supervised_tokens'], report['tokens'])} supervised"),
        ("tokens lost to data.max_length", lost, f"in {report['truncated']:,} rows cut, {report['split']:,} split"),
        ("held-out items", held["items"], f"{held['prompts']:,} different prompts"),
    ]
    return '<div class="cards">' + "".join(
        f'<div class="card"><span>{name}</span><b>{_shown(value)}</b><span>{note}</span></div>'
        for name, value, note in cards) + "</div>"  # fmt: skip


def _limits(judged: Sequence[Judged]) -> str:
    if not judged:
        return '<p class="soft">No limit is set (data.limits, data.novel_min).</p>'
    rows = ""
    for each in judged:
        allowed = f"at {'most' if each.highest else 'least'} {each.limit:.4g}"
        kind, word = ("fine", "kept") if each.kept else ("fault", "exceeded")
        rows += (f'<tr><td>{each.key}</td><td class="n">{each.found:.4g}</td><td class="n">{allowed}</td>'
                 f'<td class="{kind}">{word}</td></tr>')  # fmt: skip
    head = '<tr><th></th><th class="n">found</th><th class="n">allowed</th><th></th></tr>'
    return f'<div class="wide"><table>{head}{rows}</table></div>'


def _sources(report: Mapping[str, Any]) -> str:
    named = ("rows", "kept", "held out", "examples", "truncated", "split", "tokens", "supervised_tokens")
    head = ["source", "rows", "kept", "held out", "examples", "cut", "split", "tokens", "supervised"]
    rows = [[name, *(counts.get(key, 0) for key in named)] for name, counts in report["sources"].items()]
    gone = [[why, *(counts.get(f"dropped: {why}", 0) for counts in report["sources"].values()), count]
            for why, count in report["dropped"].items()]  # fmt: skip
    notes = "".join(f"<p>{count:,} rows have {html.escape(note)}.</p>" for note, count in report["notes"].items())
    why_gone = table(["left out", *report["sources"], "all"], gone)
    notes += '<p class="soft">Each row that was left out stands in rejects.jsonl.</p>'
    return table(head, rows) + why_gone + notes


def _lengths(report: Mapping[str, Any]) -> str:
    figures, rows = [], []
    for key, title in (("tokens", "Tokens an example"), ("supervised", "Supervised tokens an example")):
        found = report["lengths"][key]
        if found["counts"]:
            names = [f"{edge:,}" if edge < 10_000 else f"{edge // 1024}k" for edge in found["edges"][:-1]]
            figures.append(bars(title, names, [found["counts"]], "examples by length, bins from this length on"))
            rows.append([title, *found["percentiles"].values()])
            head = ["", *(f"{p} %" for p in found["percentiles"])]
    return f'<div class="pair">{"".join(figures)}</div>{table(head, rows)}' if rows else "<p>No example is left.</p>"


def _quality(quality: Mapping[str, Any]) -> str:
    rows = [[name.replace("_", " "), action, _most(quality["found"].get(name, {})), quality["rows_found"].get(name, 0)]
            for name, action in quality["actions"].items() if action != "off"]  # fmt: skip
    text = table(["looked for", "action", "mostly as", "rows"], rows, 3)
    for name, listed in quality["examples"].items():
        shown = [[each["address"], each["reason"], each.get("other", ""), each.get("detail", "")] for each in listed]
        text += (f"<details><summary>{html.escape(name.replace('_', ' '))}: where</summary>"
                 f"{table(['row', 'reason', 'other row', 'detail'], shown, 9)}</details>")  # fmt: skip
    return text + '<p class="soft">Every finding stands in findings.jsonl.</p>'


def _most(reasons: Mapping[str, int], most: int = 3) -> str:
    ranked = sorted(reasons.items(), key=lambda pair: -pair[1])
    more = f" and {len(ranked) - most} more" if len(ranked) > most else ""
    return ", ".join(f"{count:,} {why}" for why, count in ranked[:most]) + more


def _balance(report: Mapping[str, Any]) -> str:
    categories = report["categories"]
    names = sorted({name for counts in categories["by_source"].values() for name in counts})
    rows = [[source, *(counts.get(name, 0) for name in names)] for source, counts in categories["by_source"].items()]
    by = ", ".join(f"{count:,} by {how}" for how, count in categories["decided_by"].items())
    text = f"<h3>Rows by source and category</h3>{table(['source', *names], rows)}<p class='soft'>Decided: {by}.</p>"
    mixture = report.get("mixture")
    if mixture:
        for key, title in (("by_category", "category"), ("by_source", "source")):
            groups = mixture[key]["groups"]
            head = [title, "examples", "drawn an epoch", "share of draws", "share of supervised tokens", "passes"]
            rows = [[name, g["rows"], g["draws"], f"{g['share_of_examples']:.1%}", f"{g['share_of_tokens'] or 0:.1%}",
                     g["repeats"]] for name, g in groups.items()]  # fmt: skip
            text += f"<h3>An epoch by {title}</h3>{table(head, rows)}"
            text += f'<p class="soft">Effective number: {mixture[key]["effective_groups"]:.2f}.</p>'
    return text


def _held_out(held: Mapping[str, Any], proof: Mapping[str, Any]) -> str:
    if not held["items"]:
        return '<p class="soft">Nothing is held out (data.eval, data.held_out_share).</p>'
    by = f" They are {held['share']:.0%} of the groups by {html.escape(held['by'])}." if held["by"] else ""
    reasons = ", ".join(f"{count:,} by {name}" for name, count in held["removed_by"].items()) or "none"
    compared = f"{held['training_rows_compared']:,} training rows were compared with them by "
    dropped = held["report"]["dropped"]
    gone = html.escape(", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))
    gone = f" Held out and not judged by: {gone}." if gone else ""
    text = (f"<p>{held['items']:,} items, {held['prompts']:,} different prompts.{by}{gone} {compared}"
            f"{', '.join(held['methods'])}; removed: {reasons}. "
            f"The closest pair left has a similarity of {held['highest_score']:.2f}.</p>")  # fmt: skip
    scores = [item["score"] for item in proof.get("items", [])]
    counts = [sum(low <= 10 * score < low + 1 or (low == 9 and score >= 1) for score in scores) for low in range(10)]
    figure = bars("Nearest training row of each item", [f"0.{low}" for low in range(10)], [counts],
                  "items by TF-IDF cosine of character n-grams")  # fmt: skip
    nearest = sorted(proof.get("items", []), key=lambda item: -item["score"])[:10]
    rows = [[item["address"], item["nearest"], f"{item['score']:.3f}"] for item in nearest]
    listed = table(["held-out item", "nearest training row", "similarity"], rows, 2)
    more = f"<details><summary>The ten closest</summary>{listed}</details>"
    return f'{text}<div class="pair">{figure}</div>{more}<p class="soft">All in heldout_proof.json.</p>'


def _benchmarks(benchmarks: Mapping[str, Any]) -> str:
    rows = [[name, b["items"], b["items_matched"], _share(b["items_matched"], b["items"]), b["rows_removed"]]
            for name, b in benchmarks.items()]  # fmt: skip
    return table(["benchmark", "items", "matched", "share", "training rows removed"], rows)


def _languages(found: Mapping[str, Any]) -> str:
    whole = found["rows_looked_at"]
    parts = []
    for key, title in (("scripts", "script of the answer"), ("languages", "language of answers in Latin script")):
        rows = [[name.capitalize(), count, _share(count, whole)] for name, count in found[key].items()]
        parts.append(table([title, "rows", "share"], rows[:15]))
    return f'<div class="pair">{"".join(parts)}</div><p class="soft">{whole:,} rows looked at.</p>'


def _voices(voices: Mapping[str, Any]) -> str:
    text = ""
    if cover := voices.get("coverage"):
        text += (f"<p>{cover['groups']:,} groups, effective number {cover['effective']:.2f}, largest share "
                 f"{cover['largest_share']:.1%}; {cover['without']:,} rows without a group.</p>")  # fmt: skip
        text += table(["group", "rows"], list(cover["rows"].items())[:20])
    if agreed := voices.get("agreement"):
        rows = [["overall", agreed["overall"]]]
        rows += [[f"{kind} {name}", value] for kind in ("within", "across")
                 for name, value in agreed.get(kind, {}).items()]  # fmt: skip
        text += (f"<p>{agreed['items_with_several']:,} of {agreed['items']:,} items have several ratings.</p>"
                 + table(["Krippendorff's alpha", ""], rows))  # fmt: skip
    return text
