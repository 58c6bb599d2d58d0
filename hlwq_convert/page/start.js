// Draw everything, and draw again what depends on width and colours.

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
