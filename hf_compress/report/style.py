"""Style sheet and script of the page; both go into the file."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --surface: #f6f7f8; --ink: #1d2327; --muted: #59636b; --rule: #dce0e3; --grid: #e6e9eb;
  --accent: #17607a; --kept: #8cc6d6; --gone: #f3f5f6; --stage: #f3f5f7;
  --s0: #17607a; --s1: #b3421f; --s2: #4b6b1f; --s3: #7a3f9d; --s4: #8a5a00; --s5: #b0296b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181b; --surface: #1c2226; --ink: #e6eaec; --muted: #a3aeb5; --rule: #343d43; --grid: #2a3237;
    --accent: #7cc4dc; --kept: #1f6379; --gone: #1b2125; --stage: #1b2125;
    --s0: #7cc4dc; --s1: #f0957a; --s2: #a9cf74; --s3: #cfa3ea; --s4: #e5b85c; --s5: #f28fbd;
  }
}
@media print {
  :root {
    color-scheme: light;
    --page: #ffffff; --surface: #ffffff; --ink: #000000; --muted: #444444; --rule: #bbbbbb; --grid: #dddddd;
    --accent: #17607a; --kept: #8cc6d6; --gone: #f3f5f6; --stage: #f3f5f7;
    --s0: #17607a; --s1: #b3421f; --s2: #4b6b1f; --s3: #7a3f9d; --s4: #8a5a00; --s5: #b0296b;
  }
}
*, *::before, *::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
body > * { max-width: 1120px; margin-inline: auto; padding-inline: 16px; }
header { padding-top: 40px; }
h1 { font-size: clamp(1.5rem, 1.2rem + 1.6vw, 2.1rem); line-height: 1.2; font-weight: 650; margin: 0 0 8px;
  letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; line-height: 1.3; font-weight: 650; margin: 0 0 4px; }
h3 { font-size: 0.9rem; line-height: 1.35; font-weight: 600; margin: 0; }
p { margin: 0 0 12px; max-width: 72ch; }
a { color: var(--accent); }
.kicker { color: var(--muted); font-size: 0.85rem; margin: 0 0 6px; }
.lead { font-size: 1.05rem; }
.note, .hint { color: var(--muted); font-size: 0.875rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 0; padding: 10px 0 0;
  font-size: 0.875rem; border-top: 1px solid var(--rule); }
section { margin-top: 44px; }
footer { margin-top: 48px; padding-block: 14px 40px; color: var(--muted); font-size: 0.8rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  font-size: 0.8125rem; }
.facts { display: grid; grid-template-columns: repeat(2, 1fr); gap: 1px; margin: 21px 1px 25px; }
@media (min-width: 600px) { .facts { grid-template-columns: repeat(3, 1fr); } }
@media (min-width: 1000px) { .facts { grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); } }
.facts > div { box-shadow: 0 0 0 1px var(--rule); padding: 12px 14px; display: flex; flex-direction: column; }
.facts dt { color: var(--muted); font-size: 0.8rem; line-height: 1.35; }
.facts dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.3; letter-spacing: -0.01em; }
.facts dd + dd { font-size: 0.8rem; font-weight: 400; color: var(--muted); letter-spacing: 0; }
.scroll { overflow-x: auto; max-width: 100%; position: relative; background:
  linear-gradient(to left, var(--page) 30%, transparent) right / 40px 100% no-repeat local,
  linear-gradient(to left, var(--rule), transparent) right / 14px 100% no-repeat scroll; }
.scroll:focus-visible, pre:focus-visible, a:focus-visible, summary:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.875rem; line-height: 1.4; overflow-wrap: normal; }
caption { text-align: left; padding: 0 0 6px; }
caption code { color: var(--muted); }
th { font-weight: 600; text-align: left; vertical-align: bottom; }
tbody th { font-weight: 400; vertical-align: baseline; }
th, td { padding: 6px 12px; border-bottom: 1px solid var(--rule); }
td { text-align: right; white-space: nowrap; vertical-align: baseline; }
thead th { border-bottom-color: var(--muted); }
.main { margin-top: 10px; }
.wide { min-width: 100%; }
.main thead th { max-width: 14rem; white-space: nowrap; }
.main .number { text-align: right; }
.main th:first-child, .heat th:first-child { position: sticky; left: 0; background: var(--page); padding-left: 0;
  z-index: 1; }
.main tbody th { min-width: 5.5rem; max-width: 14rem; }
.wide tbody th { min-width: 7.5rem; }
@media (min-width: 600px) { .wide tbody th { white-space: nowrap; max-width: none; } }
.main .share { color: var(--muted); font-size: 0.8125rem; }
.main td.text { text-align: left; }
.maps { display: flex; flex-wrap: wrap; gap: 8px 56px; }
.heat { margin-top: 14px; border-collapse: separate; border-spacing: 2px; }
.heat th, .heat td { border: 0; padding: 5px 7px; font-size: 0.8125rem; }
.heat thead th { color: var(--muted); font-weight: 400; text-align: center; padding-block: 2px; }
.heat thead th:first-child, .heat tbody th { text-align: left; padding-right: 12px; white-space: nowrap; }
.heat tbody td { text-align: center; min-width: 2.6rem; background: var(--gone); }
.heat td[style] { background: color-mix(in srgb, var(--kept) var(--share), var(--gone)); }
.heat tbody td.sum, .heat thead th:last-child { text-align: left; background: none; padding-left: 10px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 28px 24px;
  margin-top: 16px; }
.panel { margin: 0; min-width: 0; break-inside: avoid; }
.chart { display: block; width: 100%; height: auto; margin-top: 6px; touch-action: pan-y; }
.chart text { font-size: 11px; fill: var(--muted); font-family: inherit; }
.chart .label { fill: var(--ink); }
.chart .point { fill: var(--ink); font-weight: 600; }
.chart .stage-number { font-size: 9px; }
.grid { stroke: var(--grid); stroke-width: 1; }
.axis { stroke: var(--muted); stroke-width: 1; }
.stage { fill: none; pointer-events: all; }
.stage.odd { fill: var(--stage); }
.boundary { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 1 3; }
.cursor { stroke: var(--ink); stroke-width: 1; }
.front { fill: none; stroke: var(--muted); stroke-width: 1; stroke-dasharray: 3 3; }
.line { fill: none; stroke: var(--c); stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: butt; }
.dot { fill: var(--c); }
.target { stroke: var(--c); stroke-width: 1.2; stroke-dasharray: 1 2.5; }
.mark path { fill: var(--c); stroke: var(--c); stroke-width: 1.6; }
.mark.beaten path { fill: var(--page); }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); }
.s3 { --c: var(--s3); } .s4 { --c: var(--s4); } .s5 { --c: var(--s5); }
.line.s1 { stroke-dasharray: 7 3; } .line.s2 { stroke-dasharray: 2.5 2; } .line.s3 { stroke-dasharray: 9 3 2 3; }
.line.s4 { stroke-dasharray: 4 4; } .line.s5 { stroke-dasharray: 12 2 2 2 2 2; }
.key { display: flex; flex-wrap: wrap; gap: 2px 20px; list-style: none; margin: 0; padding: 0; font-size: 0.875rem; }
.swatch { width: 24px; height: 12px; vertical-align: -1px; }
.readout { min-height: 1.4em; margin: 0; font-size: 0.78rem; line-height: 1.4; color: var(--ink); max-width: none; }
.legend { width: 100%; font-size: 0.78rem; }
.legend th, .legend td { padding: 2px 0 2px 10px; border-bottom-color: var(--grid); }
.legend th:first-child { padding-left: 30px; }
.legend .swatch { margin-left: -30px; margin-right: 6px; }
.legend thead th { color: var(--muted); font-weight: 400; border-bottom-color: var(--rule); }
.legend thead th:not(:first-child) { text-align: right; }
.legend td[colspan] { white-space: normal; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap;
  padding: 0; }
pre { background: var(--surface); border: 1px solid var(--rule); padding: 12px 14px; margin: 10px 0; overflow: auto;
  max-height: 26rem; line-height: 1.5; overflow-wrap: normal; }
.pairs { display: grid; grid-template-columns: fit-content(45%) 1fr; gap: 4px 20px; margin: 10px 0;
  font-size: 0.875rem; }
.pairs dt { color: var(--muted); }
.pairs dd { margin: 0; }
details { margin-top: 18px; }
summary { cursor: pointer; font-size: 0.875rem; color: var(--accent); }
ul.plain { margin: 10px 0; padding-left: 1.2em; font-size: 0.9375rem; max-width: 80ch; }
@media (max-width: 420px) {
  .legend th, .legend td { padding-left: 6px; }
  .legend { font-size: 0.72rem; }
}
@media print {
  body { font-size: 10.5pt; }
  body > * { max-width: none; padding-inline: 0; }
  nav, .readout { display: none; }
  .scroll, pre { overflow: visible; max-height: none; background: none; }
  .scroll { break-inside: avoid; }
  pre { white-space: pre-wrap; }
  .panels { grid-template-columns: repeat(2, 1fr); }
  .heat td { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2, h3, caption { break-after: avoid; }
}
"""

SCRIPT = """
for (const chart of document.querySelectorAll("svg[data-lines]")) {
  const curves = [...chart.querySelectorAll("g[data-x]")].map(g => ({
    name: g.dataset.name, x: g.dataset.x.split(" "), px: g.dataset.px.split(" ").map(Number), y: g.dataset.y.split(" ")
  }));
  const readout = chart.parentNode.querySelector(".readout"), cursor = chart.querySelector(".cursor");
  const nearest = (places, at) => places.reduce((best, each, i) =>
    Math.abs(each - at) < Math.abs(places[best] - at) ? i : best, 0);
  const show = event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse()).x;
    const found = curves.map(curve => ({ curve, i: nearest(curve.px, at) }));
    const place = found.reduce((a, b) =>
      Math.abs(b.curve.px[b.i] - at) < Math.abs(a.curve.px[a.i] - at) ? b : a);
    const px = place.curve.px[place.i], step = place.curve.x[place.i];
    const values = found.filter(each => each.curve.x[each.i] === step);
    readout.textContent = "step " + step + ": " + values.map(v => v.curve.name + " " + v.curve.y[v.i]).join(", ");
    cursor.setAttribute("x1", px);
    cursor.setAttribute("x2", px);
  };
  chart.addEventListener("pointermove", show);
  chart.addEventListener("pointerdown", show);
}
"""
