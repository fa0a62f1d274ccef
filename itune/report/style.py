"""The page's look: one style sheet for light and dark, narrow and wide, on screen and on paper."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --panel: #f6f7f9; --ink: #1c2128; --dim: #5b6570; --line: #d9dee4;
  --one: #1f63b5; --two: #b4541a; --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --panel: #1c2127; --ink: #e4e8ec; --dim: #98a3ae;
  --line: #343c45; --one: #6cb0ff; --two: #f0a35e; --good: #5cc98f; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; max-width: 72rem; margin: 0 auto;
  padding: 1.2rem 1rem 4rem; background: var(--back); color: var(--ink); }
h1 { font-size: 1.6rem; margin: .4rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; } .dim { color: var(--dim); } .good { color: var(--good); }
.bad { color: var(--bad); } .one { color: var(--one); } .two { color: var(--two); } a { color: var(--one); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .6rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.tile { background: var(--panel); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: .85rem; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: .6rem .7rem .3rem; min-width: 0; }
figcaption { font-size: .9rem; display: flex; flex-wrap: wrap; gap: 0 .9rem; }
figcaption b { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--dim); } .grid { stroke: var(--line); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .bar { stroke-width: 1.4; }
.line.one, .dot.one, .bar.one { stroke: var(--one); }
.line.two, .dot.two, .bar.two { stroke: var(--two); } .dot { fill: var(--panel); stroke-width: 2; }
.line.wide { stroke-width: 4.5; opacity: .45; } .line.wide.dash { stroke-width: 3; }
.line.dash { stroke-dasharray: 5 4; stroke-width: 1.4; }
.scroll { overflow-x: auto; max-width: 100%; } table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 500; white-space: nowrap; } tr + tr > * { border-top: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { color: var(--dim); display: block; font-size: .82rem; }
.tree th { font-weight: 400; padding-right: 1.2rem; } .tree td { overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
.pair { background: var(--panel); border-radius: 8px; padding: .6rem .8rem; margin: .6rem 0; }
.pair .both { display: grid; gap: .4rem 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto; margin: .1rem 0 .4rem; }
.label { color: var(--dim); font-size: .82rem; } .forest { width: 13rem; height: 1.3rem; display: inline-block; }
.forest line { stroke: var(--dim); stroke-width: 1.6; } .forest .zero { stroke: var(--line); stroke-width: 1.2; }
.forest circle { fill: var(--ink); } .forest .sure { stroke: var(--one); } .forest circle.sure { fill: var(--one); }
@media print { details > * { display: block; } .text { max-height: none; } }
"""
