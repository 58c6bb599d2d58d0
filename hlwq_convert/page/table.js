// The table of tensors: sorted, filtered, some rows at a time.

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
