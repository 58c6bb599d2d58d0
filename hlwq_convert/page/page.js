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
