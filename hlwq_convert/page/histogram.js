// The histogram of one tensor before and after the rotation.

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
  const ticks = one.step !== null || one.levels.length > 64; // lines across the picture would hide the rest
  const reach = 4.5, left = 36, bottom = ticks ? 40 : 26, bins = one.before.length, step = (2 * data.reach) / bins;
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
    const odd = one.step !== null && Math.round(level / one.step) % 2 !== 0;
    const [from, to] = ticks ? [height - bottom + (odd ? 9 : 2), height - bottom + (odd ? 15 : 8)] : [4, height - bottom];
    draw(svg, "line", { x1: x(level), x2: x(level), y1: from, y2: to, stroke: "var(--level)", "stroke-opacity": ticks ? 1 : 0.55 });
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
  const lines = [["before", "", "before"], ["after", "", "after"], ["normal", "dash", "N(0, 1)"]];
  lines.push(["level", "rule", one.step === null
    ? `${one.levels.length} levels of the codebook`
    : `levels of the trellis, ${one.step.toPrecision(3)} apart: even and odd ones, of which its state allows one kind`]);
  for (const [name, kind, text] of lines) {
    const item = make("li", key), mark = make("i", item, undefined, kind);
    if (kind === "dash") mark.style.borderColor = `var(--${name})`;
    else mark.style.background = `var(--${name})`;
    item.append(text);
  }
  const [before, after] = one.kurtosis.map((value) => value.toFixed(2));
  const cut = highest > top ? " Bins that are higher than the picture are cut." : "";
  const divided = one.step === null ? "each block divided by its root mean square" : "each row divided by its scale";
  at("histogram-note").textContent =
    `Kurtosis ${before} before, ${after} after; 3 is normal. Density of ${count(one.coordinates)} coordinates of sampled blocks, ${divided}.${cut}`;
}

function listHistograms() {
  for (const one of data.histograms) make("option", at("histogram-select"), one.name);
  at("histogram-select").onchange = drawHistogram;
}
