"""The look of the report, light and dark, and the frame of its page."""

from __future__ import annotations

from string import Template

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #ffffff; --ink: #1c1e21; --soft: #55595f; --rule: #d9dadd;
  --accent: #a3431a; --line: #1b6ca8; --bar: #cfe1ef; --shade: #0003; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #131518; --card: #1c1f24; --ink: #eceef0; --soft: #a9b0b8; --rule: #363b42; --accent: #f0a070;
    --line: #7db8ea; --bar: #1f4060; --shade: #000c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: clamp(1.5rem, 5vw, 2rem); line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
section { padding-top: 1.4rem; margin-top: 2rem; border-top: 1px solid var(--rule); }
p { max-width: 46rem; margin: .4rem 0 .9rem; }
a { color: var(--line); }
small { font-size: .82em; color: var(--soft); font-weight: 400; }
.soft, .note, figcaption, footer { color: var(--soft); font-size: .9rem; }
.note { margin: .5rem 0 0; }
blockquote { margin: .2rem 0 1rem; padding-left: .9rem; border-left: 4px solid var(--accent); max-width: 46rem;
  overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0; padding: 0; list-style: none;
  font-size: .9rem; }
nav a { display: inline-block; padding: .15rem 0; }
code, pre { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem 1rem;
  margin: .6rem 0; overflow: auto; max-height: 26rem; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; padding: 0;
  margin: .8rem 0 1.4rem; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .8rem 1rem;
  color: var(--soft); font-size: .9rem; line-height: 1.4; }
.tiles b { display: block; font-size: clamp(1.1rem, 4.5vw, 1.5rem); line-height: 1.25; margin-bottom: .2rem;
  overflow-wrap: anywhere; color: var(--ink); }
dl { margin: 0; max-width: 58rem; }
dl div { display: grid; grid-template-columns: 8.5rem 1fr; gap: 0 1rem; padding: .45rem 0; }
dl div + div { border-top: 1px solid var(--rule); }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
.caution dt { color: var(--accent); }
.beside { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; }
.beside > * { min-width: 0; max-width: 100%; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
.small { grid-template-columns: repeat(auto-fill, minmax(min(14rem, 100%), 1fr)); margin: .6rem 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .7rem;
  min-width: 0; }
figcaption { margin-bottom: .5rem; }
figcaption code, figcaption b { color: var(--ink); }
.small figcaption { font-size: .82rem; line-height: 1.4; }
.chart { width: 100%; height: auto; display: block; font-size: 12px; fill: var(--ink); }
.small .chart { font-size: 11px; }
.chart .frame { fill: none; stroke: var(--rule); }
.chart .grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.chart .one { fill: none; stroke: var(--line); stroke-opacity: .55; stroke-width: 1.3; }
.chart .mean { fill: none; stroke: var(--accent); stroke-width: 3; }
.chart .fit, .chart .poor { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-dasharray: 6 4; }
.chart .poor { stroke: var(--soft); stroke-opacity: .7; stroke-width: 1.2; stroke-dasharray: 2 4; }
.charts:not(.small) .fit { stroke: var(--ink); }
.chart .base { fill: none; stroke: var(--soft); stroke-width: 1; }
.chart .dots { fill: var(--line); }
.scroll { overflow-x: auto; max-width: 100%; margin: .5rem 0;
  background: linear-gradient(90deg, var(--paper) 50%, transparent) 0 0 / 3rem 100% local,
    linear-gradient(-90deg, var(--paper) 50%, transparent) 100% 0 / 3rem 100% local,
    radial-gradient(farthest-side at 0 50%, var(--shade), transparent) 0 0 / .8rem 100% scroll,
    radial-gradient(farthest-side at 100% 50%, var(--shade), transparent) 100% 0 / .8rem 100% scroll;
  background-repeat: no-repeat; }
details .scroll { background: none; }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem; width: max-content; }
caption { text-align: left; color: var(--soft); white-space: nowrap; padding: 0 0 .3rem; }
th { text-align: left; font-weight: 600; padding: .3rem .6rem .3rem 0; white-space: nowrap; }
th code { display: inline-block; max-width: min(22rem, 36vw); white-space: normal; overflow-wrap: anywhere;
  font-weight: 400; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
td { padding: .3rem .6rem; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tbody th[scope=row] { position: sticky; left: 0; background: var(--paper); }
.cells { border-spacing: 2px; }
.cells td { text-align: center; min-width: 3.2rem; border-radius: .2rem; padding: .25rem .3rem; }
.cells thead th + th, .cells thead tr + tr th { text-align: center; padding: .1rem .3rem; }
.cells.many td { min-width: 2.1rem; padding: .2rem .15rem; font-size: .78rem; }
.cells thead th[scope=colgroup] { text-align: left; }
.cells abbr { text-decoration: none; }
.cells .mark { margin: 0; }
.plain thead th + th { text-align: right; padding: .3rem .6rem; }
.plain td small { display: inline-block; min-width: 6.8rem; text-align: left; padding-left: .3rem; }
.plain th, .plain td { border-bottom: 1px solid var(--rule); }
.apart th[scope=rowgroup] { padding-top: .9rem; font-weight: 500; }
.apart, .apart th { color: var(--soft); }
.bar { display: block; min-width: 8.5rem; padding: 0 .3rem; border-radius: .2rem;
  background: linear-gradient(90deg, var(--bar) calc(var(--part) * .6), transparent 0); }
.words { width: auto; margin-top: .4rem; }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.words td, .words th { border-bottom: 1px solid var(--rule); vertical-align: top; background: none; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.1rem; padding: 0; margin: .5rem 0 .8rem; list-style: none;
  font-size: .9rem; }
.key { display: inline-block; width: 1.8rem; margin-right: .4rem; vertical-align: middle;
  border-top: 2px solid var(--line); }
.key.mean { border-top: 4px solid var(--accent); }
.key.fit { border-top: 2px dashed var(--accent); }
.key.poor { border-top: 2px dotted var(--soft); }
.key.base { border-top: 1px solid var(--soft); }
.key.even { border-top: 2px dashed var(--ink); }
.key.dot { width: .5rem; height: .5rem; border: 0; border-radius: 50%; background: var(--line); }
.mark { display: inline-block; min-width: 2rem; text-align: center; border-radius: .2rem; color: #fff;
  padding: 0 .35rem; margin-right: .45rem; font-weight: 500; }
.scales { display: flex; flex-wrap: wrap; gap: .2rem 2rem; }
.scale { display: flex; align-items: flex-start; gap: .7rem; font-size: .85rem; margin: .5rem 0; }
.scale b { font-weight: 500; line-height: 1.1; }
.scale i { display: grid; grid-template-columns: 1fr auto 1fr;
  width: min(15rem, 52vw);
  font-style: normal; color: var(--soft); line-height: 1.4; }
.scale span:last-child { text-align: right; }
.ramp { grid-column: 1 / -1; height: .9rem; border-radius: .2rem; }
details { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; margin: .6rem 0;
  padding: .5rem .9rem; --paper: var(--card); }
summary { cursor: pointer; font-weight: 600; }
summary small { margin-left: .8rem; }
a:focus-visible, summary:focus-visible, pre:focus-visible, .scroll:focus-visible { outline: 3px solid var(--accent);
  outline-offset: 2px; }
.maps th { padding: .2rem .5rem .2rem 0; }
.maps thead th { padding: .2rem; max-width: 6.1rem; white-space: normal; font-size: .8rem; line-height: 1.25; }
.maps small { display: block; line-height: 1.3; }
.maps td { padding: .2rem; text-align: left; vertical-align: top; }
.maps img { width: 5.7rem; height: 5.7rem; image-rendering: pixelated; display: block; border-radius: .2rem; }
footer { margin-top: 2.5rem; }
@media (max-width: 40rem) {
  body { padding: 1.2rem 1rem 3rem; }
  dl div { grid-template-columns: 1fr; }
  .tiles li { padding: .7rem .8rem; }
  .charts:not(.small) .chart { font-size: 14px; }
  th code { font-size: .75rem; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: .8rem; --paper: #fff; }
  nav { display: none; }
  pre { white-space: pre-wrap; max-height: none; overflow: visible; overflow-wrap: anywhere; }
  .scroll { overflow: visible; background: none; }
  h2, h3, caption, summary, thead { break-after: avoid; }
  section > p, .legend, .scale, .scales { break-after: avoid; }
  figure, .tiles, dl div, table, tr, .scale, .note { break-inside: avoid; }
}
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>$header</header>
<main>
$main
</main>
<footer>All figures are in report.json, beside this page. Colored cells and pictures say more when pointed at.</footer>
</body>
</html>
""")
