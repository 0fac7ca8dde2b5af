"use strict";
// Draws the charts, moves their labels apart, and opens the row that a point stands for.

// Places of a label about its point, in its own widths and heights; the first is where plotly put it.
const PLACES = [[0, 0], [0.62, 0.85], [-0.62, 0.85], [0, 1.75], [0.5, 0.1], [-0.5, 0.1], [0.5, 1.6], [-0.5, 1.6]];

function overlaps(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

function shrunk(box, by) {
  return { left: box.left + by, right: box.right - by, top: box.top + by, bottom: box.bottom - by };
}

// A label takes the first place where it covers neither label nor marker and stays inside; without one it is hidden.
function placeLabels(chart) {
  const frame = chart.querySelector(".nsewdrag").getBoundingClientRect();
  const inside = { left: frame.left - 4, right: frame.right + 14, top: frame.top - 12, bottom: frame.bottom };
  const taken = [...chart.querySelectorAll(".scatterlayer .points path.point")].map(
    (point) => shrunk(point.getBoundingClientRect(), 2));
  for (const label of chart.querySelectorAll(".scatterlayer .text text")) {
    label.style.translate = "";
    label.style.visibility = "";
    const box = label.getBoundingClientRect();
    let found = false;
    for (const [right, down] of PLACES) {
      const x = right * box.width + Math.sign(right) * 4;
      const y = down * box.height;
      const moved = { left: box.left + x, right: box.right + x, top: box.top + y + 1, bottom: box.bottom + y - 1 };
      found = moved.left >= inside.left && moved.right <= inside.right && moved.top >= inside.top &&
        moved.bottom <= inside.bottom && !taken.some((other) => overlaps(moved, other));
      if (found) {
        label.style.translate = `${x}px ${y}px`;
        taken.push(moved);
        break;
      }
    }
    if (!found) label.style.visibility = "hidden";
  }
}

function openRow() {
  const row = document.getElementById(location.hash.slice(1));
  if (row instanceof HTMLDetailsElement) {
    row.open = true;
    row.scrollIntoView();
  }
}

// An entry of the legend hides and shows every trace that names it.
function toggle(chart, trace) {
  const hidden = (chart.hiddenKeys ??= new Set());
  const key = trace.meta[0];
  if (!hidden.delete(key)) hidden.add(key);
  const visible = chart.data.map((one) => ((one.meta ?? []).some((name) => hidden.has(name)) ? "legendonly" : true));
  Plotly.restyle(chart, { visible });
  return false; // plotly's own answer to the click
}

function draw(chart) {
  const figure = JSON.parse(document.getElementById(`${chart.id}-figure`).textContent);
  const options = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  Plotly.newPlot(chart, figure.data, figure.layout, options).then(() => {
    placeLabels(chart);
    chart.on("plotly_afterplot", () => placeLabels(chart));
    chart.on("plotly_legendclick", (event) => toggle(chart, event.data[event.curveNumber]));
    chart.on("plotly_legenddoubleclick", () => false);
    chart.on("plotly_click", (event) => {
      const number = event.points[0].customdata;
      if (number) location.hash = `row-${number}`;
    });
  });
}

document.querySelectorAll(".chart").forEach(draw);
window.addEventListener("hashchange", openRow);
openRow();
