"use strict";
// All charts show the same stretch, from `low` to `high` of 0 to 1. Wheel and drag change it, a double click shows all.
const charts = [...document.querySelectorAll("svg.zoom")].map((svg) => {
  const plot = svg.querySelector(".plot"), box = plot.viewBox.baseVal;
  return { svg, plot, left: box.x, room: box.width, height: box.height, ticks: svg.querySelector(".ticks") };
});
const LEAST = 1e-5;
let low = 0, high = 1;

function show(from, to) {
  const width = Math.min(Math.max(to - from, LEAST), 1);
  low = Math.min(Math.max(from, 0), 1 - width);
  high = low + width;
  for (const chart of charts) {
    chart.plot.setAttribute("viewBox", [chart.left + low * chart.room, 0, width * chart.room, chart.height].join(" "));
    label(chart);
  }
}

// Round numbers below the stretch that is shown.
function label(chart) {
  const span = Number(chart.ticks.dataset.span), begin = low * span, end = high * span;
  const power = 10 ** Math.floor(Math.log10((end - begin) / 5));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power * 5 >= end - begin);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const template = chart.svg.querySelector("text"), floor = chart.ticks.nextElementSibling.getAttribute("y");
  chart.ticks.replaceChildren();
  for (let tick = Math.ceil(begin / step - 1e-9) * step; tick < end; tick += step) {
    const place = chart.left + (chart.room * (tick - begin)) / (end - begin);
    if (place > chart.left + chart.room - 60) break;
    const text = template.cloneNode();
    text.setAttribute("x", place);
    text.setAttribute("y", floor);
    text.setAttribute("text-anchor", "start");
    text.textContent = tick.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    chart.ticks.append(text);
  }
}

// Where in 0 to 1 the pointer is.
function place(chart, event) {
  const frame = chart.svg.getBoundingClientRect(), scale = frame.width / chart.svg.viewBox.baseVal.width;
  const across = (event.clientX - frame.left) / scale - chart.left;
  return low + (high - low) * Math.min(Math.max(across / chart.room, 0), 1);
}

for (const chart of charts) {
  const { svg, plot } = chart;
  const words = document.createElement("p");
  const hint = "Point at a column for its figures. Wheel or drag to zoom, double click to see all.";
  words.className = "note";
  words.textContent = hint;
  svg.after(words);
  for (const column of plot.querySelectorAll(".hit")) {
    column.dataset.words = column.textContent; // said below the chart from now on, and not in a box over it
    column.replaceChildren();
  }
  const marked = svg.querySelector(".hit").cloneNode();
  marked.setAttribute("class", "marked");
  let from = null;

  plot.addEventListener("pointermove", (event) => {
    const column = document.elementFromPoint(event.clientX, event.clientY);
    if (column && column.dataset.words) words.textContent = column.dataset.words;
    if (from === null) return;
    const to = place(chart, event);
    marked.setAttribute("x", chart.left + Math.min(from, to) * chart.room);
    marked.setAttribute("width", Math.abs(to - from) * chart.room);
  });
  plot.addEventListener("pointerleave", () => (words.textContent = hint));
  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    plot.setPointerCapture(event.pointerId);
    from = place(chart, event);
    marked.setAttribute("width", 0);
    plot.append(marked);
  });
  plot.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const to = place(chart, event), start = from;
    from = null;
    marked.remove();
    if (Math.abs(to - start) > 0.01 * (high - low)) show(Math.min(start, to), Math.max(start, to));
  });
  plot.addEventListener("pointercancel", () => {
    from = null;
    marked.remove();
  });
  plot.addEventListener("dblclick", () => show(0, 1));
  plot.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
        const by = ((event.deltaX || event.deltaY) / 1000) * (high - low);
        show(low + by, high + by);
        return;
      }
      const at = place(chart, event), factor = 2 ** (event.deltaY / 300);
      show(at - (at - low) * factor, at + (high - at) * factor);
    },
    { passive: false },
  );
}
