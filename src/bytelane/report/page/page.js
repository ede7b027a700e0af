"use strict";
// Everything shown comes from the JSON in #data, and only ever as text or as numbers in attributes.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const comparison = data.comparison;
const layers = data.layers;

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === "class") node.className = value;
    else if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}
function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function bytes(n) {
  for (const unit of ["B", "kB", "MB"]) {
    if (n < 1000) return `${unit === "B" ? n : n.toFixed(1)} ${unit}`;
    n /= 1000;
  }
  return `${n.toFixed(2)} GB`;
}
const number = (v, digits = 3) => (v === null || v === undefined ? "–" : Number(v.toPrecision(digits)).toString());
const percent = (v) => (v === null || v === undefined ? "–" : v === 0 ? "0" : v >= 5e-4 ? `${(100 * v).toFixed(2)} %` : v >= 1e-6 ? `${Math.round(v * 1e6)} ppm` : "< 1 ppm");
const decibels = (layer, v) => (!layer.measured ? "–" : v === null ? "equal" : v.toFixed(1));
const color = (bits) => `var(--b${bits >= 2 && bits <= 8 ? bits : "x"})`;

// ---- the tip that follows the pointer, and the focus, over anything with data-tip
function showTip(target, x, y) {
  const tip = $("tip");
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 12, innerWidth - box.width - 6))}px`;
  tip.style.top = `${y + box.height + 24 > innerHeight ? y - box.height - 10 : y + 16}px`;
}
document.addEventListener("pointermove", (event) => {
  const target = event.target.closest && event.target.closest("[data-tip]");
  if (target) showTip(target, event.clientX, event.clientY);
  else $("tip").hidden = true;
});
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});

// ---- heading, tiles, findings
document.title = `${data.title}: bytelane report`;
$("title").textContent = data.title;
$("subtitle").textContent = data.subtitle;
for (const [label, value, note] of data.tiles) {
  $("tiles").append(el("div", { class: "tile" }, el("span", { textContent: label }), el("b", { textContent: value }), el("span", { textContent: note })));
}
$("findings-card").hidden = !data.findings.length;
for (const finding of data.findings) $("findings").append(el("li", { textContent: finding }));

// ---- size by block and bits
function blockOf(name) {
  const found = name.match(/^(.*?\.\d+)\./);
  return found ? found[1] : name;
}
function sizes() {
  const blocks = new Map();
  for (const layer of layers) {
    const key = blockOf(layer.name);
    if (!blocks.has(key)) blocks.set(key, new Map());
    const parts = blocks.get(key);
    parts.set(layer.bits, (parts.get(layer.bits) || 0) + layer.bytes);
  }
  const entries = [...blocks].map(([name, parts]) => ({ name, parts: [...parts].sort((a, b) => a[0] - b[0]), total: [...parts.values()].reduce((a, b) => a + b, 0) }));
  const largest = Math.max(...entries.map((e) => e.total), 1);
  const width = 1080, height = 190, left = 62, bottom = 24;
  const step = (width - left) / Math.max(entries.length, 1), bar = Math.min(44, Math.max(2, step - Math.min(4, step * 0.25)));
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Stored bytes of each block, by bits" });
  for (const share of [0, 0.5, 1]) {
    const y = 10 + (1 - share) * (height - bottom - 10);
    svg.append(draw("line", { class: "axis", x1: left, x2: width, y1: y, y2: y }));
    const label = draw("text", { x: left - 8, y: y + 4, "text-anchor": "end" });
    label.textContent = share ? bytes(largest * share) : "0";
    svg.append(label);
  }
  const every = Math.ceil(entries.length / 20);
  entries.forEach((entry, i) => {
    let y = height - bottom;
    const group = draw("g", { tabindex: 0, role: "button", "data-tip": `${entry.name}\n${entry.parts.map(([b, n]) => `${b} bits: ${bytes(n)}`).join("\n")}`, style: "cursor:pointer" });
    for (const [bits, n] of entry.parts) {
      const h = (n / largest) * (height - bottom - 10);
      y -= h;
      group.append(draw("rect", { x: left + i * step + (step - bar) / 2, y, width: bar, height: Math.max(h, 0.5), fill: color(bits) }));
    }
    const choose = () => { $("filter").value = $("filter").value === entry.name ? "" : entry.name; render(); };
    group.addEventListener("click", choose);
    group.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(); });
    svg.append(group);
    if (i % every === 0) {
      const short = entry.name.match(/\.(\d+)$/);
      const label = draw("text", { x: left + (i + 0.5) * step, y: height - 8, "text-anchor": "middle" });
      label.textContent = short ? short[1] : entry.name.split(".").pop().slice(0, 12);
      svg.append(label);
    }
  });
  $("sizes").append(svg);
  const totals = new Map();
  for (const layer of layers) totals.set(layer.bits, (totals.get(layer.bits) || 0) + layer.bytes);
  for (const [bits, n] of [...totals].sort((a, b) => a[0] - b[0])) {
    $("legend").append(el("span", {}, el("i", { style: `background:${color(bits)}` }), `${bits} bits: ${bytes(n)}`));
    $("bits").append(el("option", { value: String(bits), textContent: `${bits}` }));
  }
}

// ---- quality along the order of execution
function quality() {
  const measured = layers.filter((l) => l.measured);
  if (!measured.length) return;
  $("quality-card").hidden = false;
  const sensitive = measured.some((l) => l.sensitivity !== null);
  $("quality-note").textContent = "Signal over noise against the reference, in dB, in the order of execution: higher is better."
    + (sensitive ? " Bars: how far the whole model moves when only this layer is quantized (KL, log scale)." : "");
  const width = 1080, height = 240, left = 44, bottom = 18, right = sensitive ? 52 : 6;
  const values = measured.flatMap((l) => [l.output.sqnr, l.alone]).filter((v) => v !== null);
  const top = Math.max(10, Math.ceil(Math.max(...values, 10) / 10) * 10), low = Math.min(0, Math.floor(Math.min(...values, 0) / 10) * 10);
  const x = (i) => left + ((i + 0.5) * (width - left - right)) / measured.length;
  const y = (v) => 8 + ((top - (v === null ? top : v)) / (top - low)) * (height - bottom - 8);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Signal over noise of each layer" });
  const ticks = (top - low) / 10 > 8 ? 20 : 10;
  for (let v = low; v <= top; v += ticks) {
    svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
    const label = draw("text", { x: left - 7, y: y(v) + 4, "text-anchor": "end" });
    label.textContent = `${v}`;
    svg.append(label);
  }
  if (sensitive) {
    const known = measured.map((l) => l.sensitivity).filter((v) => v > 0);
    const most = Math.log10(Math.max(...known)), least = Math.min(Math.log10(Math.min(...known)), most - 1);
    const bar = Math.max(1.5, ((width - left - right) / measured.length) * 0.6);
    measured.forEach((l, i) => {
      if (!(l.sensitivity > 0)) return;
      const h = ((Math.log10(l.sensitivity) - least) / (most - least)) * (height - bottom - 8);
      svg.append(draw("rect", { x: x(i) - bar / 2, y: height - bottom - h, width: bar, height: Math.max(h, 1), fill: "var(--warn)", opacity: 0.28 }));
    });
    for (const v of [most, least]) {
      const label = draw("text", { x: width - right + 6, y: v === most ? 16 : height - bottom });
      label.textContent = (10 ** v).toExponential(0);
      svg.append(label);
    }
  }
  const line = (pick, stroke) => draw("polyline", { points: measured.map((l, i) => `${x(i).toFixed(1)},${y(pick(l)).toFixed(1)}`).join(" "), fill: "none", stroke, "stroke-width": 1.4 });
  svg.append(line((l) => l.alone, "var(--a)"), line((l) => l.output.sqnr, "var(--b)"));
  measured.forEach((l, i) => {
    const w = (width - left - right) / measured.length;
    const hit = draw("rect", { x: x(i) - w / 2, y: 0, width: w, height, fill: "transparent", "data-tip": `${l.name}\noutput ${decibels(l, l.output.sqnr)} dB, alone ${decibels(l, l.alone)} dB` + (l.sensitivity === null ? "" : `\nKL alone ${number(l.sensitivity, 2)}`) });
    hit.addEventListener("click", () => { $("filter").value = l.name; render(); });
    svg.append(hit);
  });
  $("quality").append(svg);
  const key = (c, text) => el("span", {}, el("i", { style: `background:${c}` }), text);
  $("quality-legend").append(key("var(--b)", "output, with what it inherits"), key("var(--a)", "alone, on the reference's input"));
  if (sensitive) $("quality-legend").append(key("color-mix(in srgb, var(--warn) 40%, transparent)", "sensitivity"));
}

// ---- the table
const measuredAny = layers.some((l) => l.measured);
const sensitiveAny = layers.some((l) => l.sensitivity !== null && l.sensitivity !== undefined);
const clip = (side) => (side && side.b.clipped_low !== null ? side.b.clipped_low + side.b.clipped_high : null);
const used = (side) => (side && side.b.scale !== null ? Math.max(Math.abs(side.b.low), Math.abs(side.b.high)) / (127 * side.b.scale) : null);
const low = (v, warn, bad) => (v === null || v === undefined ? "" : v < bad ? "bad" : v < warn ? "warn" : "");
const high = (v, warn, bad) => (v === null || v === undefined ? "" : v > bad ? "bad" : v > warn ? "warn" : "");
const columns = [
  { key: "order", label: "#", value: (l) => l.order, show: (l) => String(l.order + 1), class: "wide" },
  { key: "name", label: "layer", value: (l) => l.name, show: (l) => l.name, class: "text name" },
  { key: "scheme", label: "scheme", value: (l) => l.scheme, show: (l) => l.scheme, class: "text", chip: true },
  { key: "shape", label: "out × in", value: (l) => l.shape[0] * l.shape[1], show: (l) => `${l.shape[0]} × ${l.shape[1]}`, class: "wide" },
  { key: "bytes", label: "size", value: (l) => l.bytes, show: (l) => bytes(l.bytes) },
  ...(measuredAny ? [
    { key: "out", label: "out dB", value: (l) => (l.measured ? l.output.sqnr ?? Infinity : null), show: (l) => decibels(l, l.measured ? l.output.sqnr : null), mark: (l) => (l.measured ? low(l.output.sqnr, 15, 8) : "") },
    { key: "alone", label: "alone dB", value: (l) => (l.measured ? l.alone ?? Infinity : null), show: (l) => decibels(l, l.alone), mark: (l) => (l.measured ? low(l.alone, 15, 10) : ""), class: "wide" },
    ...(sensitiveAny ? [{ key: "sensitivity", label: "KL alone", value: (l) => l.sensitivity ?? null, show: (l) => number(l.sensitivity, 2) }] : []),
    { key: "inclip", label: "in clipped", value: (l) => clip(l.input), show: (l) => percent(clip(l.input)), mark: (l) => high(clip(l.input), 1e-3, 1e-2), class: "wide" },
    { key: "inused", label: "in range", value: (l) => used(l.input), show: (l) => (used(l.input) === null ? "–" : `${Math.round(100 * used(l.input))} %`), mark: (l) => low(used(l.input), 0.25, 0.1), class: "wide" },
    { key: "outclip", label: "out clipped", value: (l) => clip(l.output), show: (l) => percent(clip(l.output)), mark: (l) => high(clip(l.output), 1e-3, 1e-2) },
    { key: "outused", label: "out range", value: (l) => used(l.output), show: (l) => (used(l.output) === null ? "–" : `${Math.round(100 * used(l.output))} %`), mark: (l) => low(used(l.output), 0.25, 0.1), class: "wide" },
  ] : [
    { key: "sin", label: "input scale", value: (l) => l.input_scale, show: (l) => (l.kind === "embedding" ? "–" : l.input_scale === null ? "float" : number(l.input_scale, 4)) },
    { key: "sout", label: "output scale", value: (l) => l.output_scale, show: (l) => (l.kind === "embedding" ? "–" : l.output_scale === null ? "float" : number(l.output_scale, 4)) },
  ]),
];
const state = { key: "order", up: true, open: null };
function suspect(l) { return columns.some((c) => c.mark && c.mark(l)); }
function shown() {
  const text = $("filter").value.trim().toLowerCase(), bits = $("bits").value, only = $("suspect").checked;
  const exact = layers.some((l) => blockOf(l.name).toLowerCase() === text);
  const matches = (l) => !text || (exact ? blockOf(l.name).toLowerCase() === text : `${l.name} ${l.scheme}`.toLowerCase().includes(text));
  const found = layers.filter((l) => matches(l) && (!bits || String(l.bits) === bits) && (!only || suspect(l)));
  const column = columns.find((c) => c.key === state.key), way = state.up ? 1 : -1;
  return found.sort((p, q) => {
    const a = column.value(p), b = column.value(q);
    if (a === null || b === null) return (a === null) - (b === null) || p.order - q.order; // the unknown comes last
    return (a < b ? -way : a > b ? way : 0) || p.order - q.order;
  });
}
function render() {
  const rows = shown(), body = $("body");
  body.replaceChildren();
  $("count").textContent = rows.length === layers.length ? `${rows.length} layers` : `${rows.length} of ${layers.length} layers`;
  for (const head of $("head").children) {
    head.setAttribute("aria-sort", head.dataset.key === state.key ? (state.up ? "ascending" : "descending") : "none");
  }
  for (const layer of rows) {
    const row = el("tr", { class: `layer${state.open === layer.name ? " open" : ""}`, tabIndex: 0, "aria-expanded": String(state.open === layer.name) });
    row.dataset.name = layer.name;
    for (const column of columns) {
      const cell = el("td", { class: `${column.class || ""} ${column.mark ? column.mark(layer) : ""}` });
      if (column.chip) cell.append(el("span", { class: "chip", textContent: column.show(layer), style: `background:color-mix(in srgb, ${color(layer.bits)} 24%, transparent)` }));
      else cell.textContent = column.show(layer);
      if (column.key === "name") cell.title = layer.name;
      row.append(cell);
    }
    const toggle = () => { state.open = state.open === layer.name ? null : layer.name; render(); const again = [...body.children].find((r) => r.dataset.name === layer.name); if (again) again.focus({ preventScroll: true }); };
    row.addEventListener("click", toggle);
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(); });
    body.append(row);
    if (state.open === layer.name) body.append(el("tr", { class: "detail" }, el("td", { colSpan: columns.length }, detail(layer))));
  }
}

// ---- one layer
function facts(pairs) {
  return el("dl", { class: "facts" }, ...pairs.flatMap(([term, value]) => [el("dt", { textContent: term }), el("dd", { textContent: value })]));
}
function rangeChart(side) {
  // The static range as a band, and what each model had in it (or beyond it) as a line.
  const limit = side.b.scale === null ? 0 : 127 * side.b.scale;
  const most = Math.max(limit, ...[side.a, side.b].flatMap((r) => [Math.abs(r.low), Math.abs(r.high)])) || 1;
  const width = 330, height = 58, x = (v) => 165 + (v / most) * 158;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Static range and observed ranges" });
  if (limit) svg.append(draw("rect", { x: x(-limit), y: 6, width: x(limit) - x(-limit), height: 34, fill: "var(--b)", opacity: 0.14, "data-tip": `static range ±${number(limit)}` }));
  svg.append(draw("line", { class: "axis", x1: x(0), x2: x(0), y1: 4, y2: 42 }));
  [[side.a, "var(--a)", 15, "A"], [side.b, "var(--b)", 31, "B"]].forEach(([run, stroke, y, name]) => {
    svg.append(draw("line", { x1: x(run.low), x2: Math.max(x(run.high), x(run.low) + 1), y1: y, y2: y, stroke, "stroke-width": 5, "stroke-linecap": "round", "data-tip": `${name}: ${number(run.low, 4)} to ${number(run.high, 4)}` }));
  });
  for (const [v, anchor] of [[-most, "start"], [0, "middle"], [most, "end"]]) {
    const label = draw("text", { x: x(v), y: 54, "text-anchor": anchor });
    label.textContent = number(v);
    svg.append(label);
  }
  return svg;
}
function histogram(counts, name) {
  const most = Math.max(...counts, 1), total = counts.reduce((a, b) => a + b, 0) || 1;
  const width = 330, height = 96, svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${name}: how often each code occurs` });
  const scale = (n) => (n ? Math.log10(1 + n) / Math.log10(1 + most) : 0) * 72;
  counts.forEach((n, i) => {
    if (!n) return;
    const end = i === 0 || i === 255;
    svg.append(draw("rect", { x: 5 + i * 1.25, y: 76 - scale(n), width: end ? 3 : 1.25, height: scale(n), fill: end ? "var(--bad)" : "var(--b)", "data-tip": `code ${i - 128}: ${n} times, ${percent(n / total)}` }));
  });
  svg.append(draw("line", { class: "axis", x1: 4, x2: 326, y1: 76.5, y2: 76.5 }));
  for (const [v, at] of [[-128, 5], [0, 165], [127, 325]]) {
    const label = draw("text", { x: at, y: 90, "text-anchor": v < 0 ? "start" : v ? "end" : "middle" });
    label.textContent = `${v}`;
    svg.append(label);
  }
  return svg;
}
function sidePanel(title, side, name) {
  const panel = el("div", {}, el("h3", { textContent: title }), rangeChart(side));
  const rows = [["SQNR", side.sqnr === null ? "equal" : `${side.sqnr.toFixed(1)} dB`], ["differing", percent(side.differing)]];
  if (side.largest_code !== null) rows.push(["largest step", `${side.largest_code} codes`]);
  rows.push(["B observed", `${number(side.b.low, 4)} to ${number(side.b.high, 4)}`]);
  if (side.b.scale !== null) {
    rows.push(["static range", `±${number(127 * side.b.scale, 4)} (scale ${number(side.b.scale, 4)})`]);
    if (side.b.clipped_low !== null) rows.push(["clipped", `${percent(side.b.clipped_low)} low, ${percent(side.b.clipped_high)} high`]);
  } else rows.push(["static range", "none: this side is in float"]);
  panel.append(facts(rows));
  if (side.b.histogram) panel.append(el("p", { class: "muted", textContent: "codes in B, log scale; the ends are red" }), histogram(side.b.histogram, name));
  return panel;
}
function detail(layer) {
  const box = el("div", { class: "sides" });
  const rows = [["layer", layer.name], ["kind", layer.kind], ["out × in", `${layer.shape[0]} × ${layer.shape[1]}`], ["stored", `${bytes(layer.bytes)} as ${layer.storage}, ${layer.granularity} scales`],
    ["weight scales", `${number(layer.weight_scale_range[0])} to ${number(layer.weight_scale_range[1])}, ${layer.weight_scale_dtype}`]];
  if (layer.kind === "linear") rows.push(["input scale", layer.input_scale === null ? "float" : number(layer.input_scale, 6)], ["output scale", layer.output_scale === null ? "float" : number(layer.output_scale, 6)], ["bias", layer.bias ? "yes" : "no"]);
  if (layer.measured) rows.push(["alone", layer.alone === null ? "equal" : `${layer.alone.toFixed(1)} dB`]);
  if (layer.sensitivity !== null && layer.sensitivity !== undefined) rows.push(["KL alone", `${number(layer.sensitivity)} nats a token`]);
  for (const kernel of layer.kernels) rows.push([`kernel, M = ${kernel.rows}`, kernel.kernel]);
  box.append(el("div", {}, el("h3", { textContent: "Layer" }), facts(rows)));
  if (layer.measured) box.append(sidePanel("Input", layer.input, "input"), sidePanel("Output", layer.output, "output"));
  return box;
}

// ---- begin
for (const column of columns) {
  const head = el("th", { class: column.class || "", scope: "col" }, el("button", { type: "button", textContent: column.label }));
  head.dataset.key = column.key;
  head.firstChild.addEventListener("click", () => {
    state.up = state.key === column.key ? !state.up : true;
    state.key = column.key;
    render();
  });
  $("head").append(head);
}
for (const id of ["filter", "bits", "suspect"]) $(id).addEventListener("input", render);
for (const [id, pairs] of [["speed", data.speed], ["rest", data.rest]]) $(id).replaceChildren(...facts(pairs).childNodes);
$("speed-card").hidden = !data.speed.length;
$("made").textContent = data.made;
sizes();
quality();
render();
