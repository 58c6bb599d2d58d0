// The heat maps: modules down, layers across.

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
