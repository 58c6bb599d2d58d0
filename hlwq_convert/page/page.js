"use strict";
// Draws the report from the JSON in #data. Texts of the file reach the page through textContent alone.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const count = (value) => value.toLocaleString("en-US");
const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function make(tag, parent, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  if (parent) parent.append(element);
  return element;
}

function bytes(value) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 999.95) return unit === "B" ? `${value} B` : `${value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(2)} TB`;
}

function million(value) {
  if (value >= 1e9) return `${(value / 1e9).toFixed(2)} billion`;
  return value >= 1e6 ? `${(value / 1e6).toFixed(1)} million` : count(value);
}

// --- header and provenance ---------------------------------------------------------------------

function definition(list, term, text) {
  const row = list.id === "figures" ? make("div", list) : list;
  make("dt", row, term);
  make("dd", row, text);
}

function drawHeader() {
  at("title").textContent = data.title;
  document.title = `${data.title}: hlwq report`;
  at("origin").textContent = data.origin;
  at("warnings").hidden = data.warnings.length === 0;
  for (const warning of data.warnings) make("li", at("warnings"), warning);
  const s = data.summary;
  definition(at("figures"), "File", bytes(data.file_bytes));
  definition(at("figures"), "Bits a weight", fixed(data.bpw, 3));
  definition(at("figures"), "Weights", million(data.weights));
  definition(at("figures"), "Mean SQNR", s.sqnr_db_mean === null ? "–" : `${s.sqnr_db_mean.toFixed(2)} dB`);
  definition(at("figures"), "Lowest cosine", fixed(s.cosine_min, 5));
  definition(at("figures"), "Quantized / raw", `${count(s.quantized)} / ${count(s.raw)}`);
}

function drawProvenance() {
  for (const [term, text] of data.provenance) definition(at("provenance"), term, text);
  for (const list of data.lists) {
    const details = make("details", at("lists"));
    details.open = list.rows.length <= 12;
    make("summary", details, `${list.title} (${count(list.rows.length + list.hidden)})`);
    const body = make("tbody", make("table", details));
    for (const [name, value] of list.rows) {
      const row = make("tr", body);
      make("td", row, name);
      make("td", row, typeof value === "number" ? bytes(value) : value, "number");
    }
    if (list.hidden) make("p", details, `and ${count(list.hidden)} more`, "note");
  }
}

// --- sizes -------------------------------------------------------------------------------------

const PARTS = ["scalar", "trellis", "raw", "shared", "assets"];
const partColour = (part) => `var(--${PARTS.includes(part) ? part : "other"})`;

function drawSizes() {
  const parts = Object.entries(data.summary.bytes_by_encoding).filter(([, size]) => size > 0);
  const percent = (size) => {
    const share = (100 * size) / data.file_bytes;
    return share < 0.05 ? "< 0.1 %" : `${share.toFixed(1)} %`;
  };
  at("size-bar").setAttribute("aria-label", parts.map(([part, size]) => `${part} ${percent(size)}`).join(", "));
  for (const [part, size] of parts) {
    const piece = make("span", at("size-bar"));
    piece.style.flexGrow = size / data.file_bytes;
    piece.style.background = partColour(part);
    const item = make("li", at("size-key"));
    make("i", item).style.background = partColour(part);
    item.append(`${part} `);
    make("em", item, `${bytes(size)}, ${percent(size)}`);
  }
  const largest = Math.max(...data.sizes.map((row) => row.bytes), 1);
  for (const row of data.sizes) {
    make("code", at("module-bars"), row.label).title = row.name;
    const words = make("em", at("module-bars"), `${bytes(row.bytes)}, ${percent(row.bytes)}`);
    if (row.bits !== null) make("span", words, `, ${row.bits.toFixed(2)} bits`, "wide");
    const bar = make("div", at("module-bars"));
    bar.style.width = `${(100 * row.bytes) / largest}%`;
    bar.style.background = partColour(row.part);
  }
}

// --- heat maps ---------------------------------------------------------------------------------

const ROW = 22;

function mix(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(place), stops.length - 2);
  const parse = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
  const [a, b] = [parse(stops[i]), parse(stops[i + 1])];
  return `rgb(${a.map((x, k) => Math.round(x + (b[k] - x) * (place - i))).join(",")})`;
}

function drawMap(kind, digits, unit) {
  const map = data.maps, limits = map[kind];
  const stops = ["low", "mid", "high"].map((end) => colour(`${kind}-${end}`));
  const ramp = at(`${kind}-ramp`);
  ramp.replaceChildren();
  if (limits) {
    ramp.append(limits[0].toFixed(digits));
    make("i", ramp).style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
    ramp.append(limits[1].toFixed(digits));
  }
  const holder = at(`${kind}-map`);
  holder.replaceChildren();
  const labels = make("div", holder, undefined, "labels");
  for (const row of map.rows) make(row.cells ? "code" : "b", labels, row.label).title = row.label;
  const scroll = make("div", holder, undefined, "scroll");
  const canvas = make("canvas", scroll);
  const columns = map.layers.length;
  const width = Math.max(6, Math.min(30, Math.floor(scroll.clientWidth / Math.max(columns, 1))));
  const height = map.rows.length * ROW, ratio = window.devicePixelRatio || 1;
  canvas.style.width = `${width * columns}px`;
  canvas.style.height = `${height + 20}px`;
  canvas.width = width * columns * ratio;
  canvas.height = (height + 20) * ratio;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${unit} by module and layer; the table below has every number`);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const value = (cell) => cell[kind === "bits" ? 0 : 1], none = colour("none");
  map.rows.forEach((row, y) => {
    (row.cells || []).forEach((cell, x) => {
      if (cell === null) return;
      const found = value(cell);
      pen.fillStyle = found === null ? none : mix(stops, (found - limits[0]) / (limits[1] - limits[0]));
      pen.fillRect(x * width, y * ROW, width - 1, ROW - 1);
    });
  });
  pen.fillStyle = colour("soft");
  pen.font = "12px system-ui, sans-serif";
  pen.textBaseline = "top";
  pen.textAlign = "center";
  const step = Math.ceil(34 / width / 5) * 5 || 5;
  map.layers.forEach((layer, x) => {
    if (x % step) return;
    pen.fillText(String(layer), (x + 0.5) * width, height + 4);
  });
  const find = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / width), y = Math.floor((event.clientY - box.top) / ROW);
    const row = map.rows[y], cell = row && row.cells ? row.cells[x] : null;
    return cell ? { row, cell, layer: map.layers[x] } : null;
  };
  canvas.onpointermove = (event) => {
    const hit = find(event);
    if (!hit) return hideTip();
    const [bits, sqnr] = hit.cell;
    const words = bits === null ? "raw" : `${fixed(sqnr, 2)} dB, ${fixed(bits, 3)} bits a weight`;
    showTip(event, `layer ${hit.layer}, ${hit.row.label}: ${words}`);
  };
  canvas.onpointerleave = hideTip;
  canvas.onclick = (event) => {
    const hit = find(event);
    if (!hit) return;
    at("filter").value = hit.row.name.split("*")[0] + hit.layer + hit.row.name.split("*")[1];
    listTensors();
    at("tensor-title").scrollIntoView();
  };
}

function showTip(event, text) {
  const tip = at("tip");
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 10)}px`;
}

function hideTip() {
  at("tip").hidden = true;
}

function drawMaps() {
  at("map-note").textContent = data.maps.note;
  at("map-rest").textContent = data.maps.rest;
  for (const figure of at("maps").querySelectorAll("figure")) figure.hidden = data.maps.rows.length === 0;
  if (data.maps.rows.length === 0) return;
  drawMap("sqnr", 2, "SQNR");
  drawMap("bits", 2, "Bits");
}

// --- histogram ---------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function draw(parent, tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function drawHistogram() {
  at("rotation-note").textContent = data.rotation;
  at("rotation-choice").hidden = data.histograms.length === 0;
  if (data.histograms.length === 0) return;
  const one = data.histograms[at("histogram-select").selectedIndex];
  const holder = at("histogram"), width = Math.max(280, holder.clientWidth), height = width < 500 ? 240 : 320;
  const reach = 4.5, left = 36, bottom = 26, bins = one.before.length, step = (2 * data.reach) / bins;
  const density = (counts) => counts.map((n) => n / (one.coordinates * step));
  const series = { before: density(one.before), after: density(one.after) };
  const centre = (i) => (i + 0.5) * step - data.reach;
  const inside = [...Array(bins).keys()].filter((i) => Math.abs(centre(i)) < reach);
  const highest = Math.max(0.4, ...inside.map((i) => Math.max(series.before[i], series.after[i])));
  const top = Math.min(highest, 1.2) * 1.06;
  const x = (value) => left + ((value + reach) / (2 * reach)) * (width - left - 4);
  const y = (value) => (height - bottom) * (1 - Math.min(value, top) / top);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Density of the coordinates of ${one.name} before and after the rotation`);
  for (const level of one.levels) {
    if (Math.abs(level) > reach) continue;
    draw(svg, "line", { x1: x(level), x2: x(level), y1: 4, y2: height - bottom, stroke: "var(--level)", "stroke-opacity": 0.55 });
  }
  const grid = top > 0.7 ? 0.2 : 0.1;
  for (let value = 0; value < top; value += grid) {
    draw(svg, "line", { x1: left, x2: width - 4, y1: y(value), y2: y(value), stroke: "var(--line)" });
    draw(svg, "text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(1));
  }
  for (let value = -4; value <= 4; value += width < 500 ? 2 : 1) {
    draw(svg, "text", { x: x(value), y: height - 6, "text-anchor": "middle" }, String(value).replace("-", "−"));
  }
  const steps = (values) => inside.map((i) => `${x(centre(i) - step / 2).toFixed(1)},${y(values[i]).toFixed(1)} ${x(centre(i) + step / 2).toFixed(1)},${y(values[i]).toFixed(1)}`).join(" ");
  const ends = [x(centre(inside[0]) - step / 2), x(centre(inside.at(-1)) + step / 2)];
  draw(svg, "polygon", {
    points: `${ends[0]},${y(0)} ${steps(series.before)} ${ends[1]},${y(0)}`, fill: "var(--before)", "fill-opacity": 0.22, stroke: "var(--before)", "stroke-width": 1.2,
  });
  draw(svg, "polyline", { points: steps(series.after), fill: "none", stroke: "var(--after)", "stroke-width": 2 });
  const normal = [];
  for (let value = -reach; value <= reach; value += 0.05) {
    normal.push(`${x(value).toFixed(1)},${y(Math.exp((-value * value) / 2) / Math.sqrt(2 * Math.PI)).toFixed(1)}`);
  }
  draw(svg, "polyline", { points: normal.join(" "), fill: "none", stroke: "var(--normal)", "stroke-width": 1.3, "stroke-dasharray": "5 4" });
  holder.replaceChildren(svg);
  const key = at("histogram-key");
  key.replaceChildren();
  const lines = [["before", "", "before"], ["after", "", "after"], ["normal", "dash", "N(0, 1)"], ["level", "rule", `${one.levels.length} levels of the codebook`]];
  for (const [name, kind, text] of lines) {
    const item = make("li", key), mark = make("i", item, undefined, kind);
    if (kind === "dash") mark.style.borderColor = `var(--${name})`;
    else mark.style.background = `var(--${name})`;
    item.append(text);
  }
  const [before, after] = one.kurtosis.map((value) => value.toFixed(2));
  const cut = highest > top ? " Bins that are higher than the picture are cut." : "";
  at("histogram-note").textContent =
    `Kurtosis ${before} before, ${after} after; 3 is normal. Density of ${count(one.coordinates)} coordinates of sampled blocks, each block divided by its root mean square.${cut}`;
}

function listHistograms() {
  for (const one of data.histograms) make("option", at("histogram-select"), one.name);
  at("histogram-select").onchange = drawHistogram;
}

// --- tensors -----------------------------------------------------------------------------------

const COLUMNS = [
  // title, column of the data, digits, class, whether the largest is the worst
  ["tensor", "name", null, "", false],
  ["shape", "shape", null, "wide", false],
  ["dtype", "dtype", null, "extra", false],
  ["encoding", "encoding", null, "wide", false],
  ["bits", "bits", 3, "number", true],
  ["bytes", "bytes", 0, "number wide", true],
  ["cosine", "cosine", 5, "number wide", false],
  ["SQNR dB", "sqnr", 2, "number", false],
  ["reason", "reason", null, "extra reason", false],
];
const PAGE = 50;
const names = data.tensors.name.map((name) => name.toLowerCase());
let sorted = { column: 7, down: false }, shown = PAGE, order = [];

function cellText(column, i) {
  const found = data.tensors[column[1]][i];
  if (column[2] === null) return data.texts[column[1]] ? data.texts[column[1]][found] : found;
  if (found === null) return "–";
  return column[2] === 0 ? count(found) : found.toFixed(column[2]);
}

function compare(a, b) {
  const column = COLUMNS[sorted.column];
  if (column[2] === null) {
    const [x, y] = [cellText(column, a), cellText(column, b)];
    return x === y ? a - b : (x < y ? -1 : 1) * (sorted.down ? -1 : 1);
  }
  const [x, y] = [data.tensors[column[1]][a], data.tensors[column[1]][b]];
  if (x === null || y === null) return (x === null) - (y === null) || a - b; // what was not measured comes last
  return (x - y) * (sorted.down ? -1 : 1) || a - b;
}

function listTensors() {
  const wanted = at("filter").value.toLowerCase();
  order = [];
  for (let i = 0; i < names.length; i++) if (names[i].includes(wanted)) order.push(i);
  if (sorted.column === 0) {
    if (sorted.down) order.reverse(); // the data is in natural order of names
  } else order.sort(compare);
  shown = PAGE;
  at("tensors").tBodies[0].replaceChildren();
  addRows(0);
}

function addRows(from) {
  const body = at("tensors").tBodies[0];
  for (const i of order.slice(from, shown)) {
    const row = make("tr", body);
    for (const column of COLUMNS) make("td", row, cellText(column, i), column[3]);
    row.lastChild.title = row.lastChild.textContent; // the reason may be cut
  }
  at("more").hidden = shown >= order.length;
  const of = order.length === names.length ? "" : `, of ${count(names.length)}`;
  at("count").textContent = `${count(Math.min(shown, order.length))} of ${count(order.length)}${of ? " found" + of : ""}`;
}

function headTable() {
  const head = at("tensors").tHead.rows[0];
  COLUMNS.forEach((column, index) => {
    const cell = make("th", head, undefined, column[3]), button = make("button", cell, column[0]);
    cell.scope = "col";
    button.type = "button";
    button.onclick = () => {
      sorted = sorted.column === index ? { column: index, down: !sorted.down } : { column: index, down: column[4] };
      markSorted();
      listTensors();
    };
  });
  markSorted();
}

function markSorted() {
  [...at("tensors").tHead.rows[0].cells].forEach((cell, index) => {
    const here = index === sorted.column;
    cell.setAttribute("aria-sort", here ? (sorted.down ? "descending" : "ascending") : "none");
    cell.firstChild.textContent = COLUMNS[index][0] + (here ? (sorted.down ? " ↓" : " ↑") : "");
  });
}

// --- all ---------------------------------------------------------------------------------------

let pending = 0;
function redraw() {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => {
    drawMaps();
    drawHistogram();
  });
}

drawHeader();
drawSizes();
listHistograms();
drawMaps();
drawHistogram();
headTable();
listTensors();
drawProvenance();
let typing = 0;
at("filter").oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(listTensors, 80);
};
at("more").onclick = () => {
  const from = shown;
  shown += 4 * PAGE;
  addRows(from);
};
window.addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
