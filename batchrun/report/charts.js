"use strict";
// The charts of a page, from the data in it. All show the same stretch of time: drag or keys zoom, a double click or 0
// shows all.
(() => {
  const data = document.getElementById("course");
  if (!data) return;
  const course = JSON.parse(data.textContent);
  const count = course.first.length;
  const [unit, length] = [["h", 3600], ["min", 60], ["s", 1], ["ms", 0.001]].find(
    ([name, size]) => course.total >= 3 * size || name === "ms",
  );
  // Where the steps took no time they are drawn one after the other.
  const [name, scale] = course.total > 0 ? [unit, length] : ["steps", 1];
  const ends = course.ends.map((end) => end / scale);
  // A column stands from one end to the next: the last one is there twice.
  const stepped = (values) => [...values, values[values.length - 1]];
  const color = (of) => () => getComputedStyle(document.documentElement).getPropertyValue(`--${of}`).trim();
  const number = (value) => (value == null ? "" : value.toLocaleString("en", { maximumFractionDigits: 1 }));
  const time = (value) => `${value.toLocaleString("en", { maximumSignificantDigits: 4 })} ${name}`;
  const steppedPath = uPlot.paths.stepped({ align: 1 });
  // The outline shows a peak that is narrower than a pixel.
  const area = (label, values, of) =>
    ({ label, values, width: 1, stroke: color(of), fill: color(of), paths: steppedPath, points: { show: false } });
  const line = (label, values, of, dash) =>
    ({ label, values, width: 1.5, stroke: color(of), dash, paths: steppedPath, points: { show: false } });

  const total = course.prefill.map((rows, at) => rows + course.decode[at]);
  const merged = course.steps.some((steps) => steps > 1);
  const kinds = {
    rows: {
      series: [
        area("prefill", total, "blue"),
        area("decode", course.decode, "orange"),
        ...(merged ? [line("most", course.rows, "text")] : []),
      ],
      said: (at) =>
        `${number(course.prefill[at])} prefill, ${number(course.decode[at])} decode` +
        (course.steps[at] > 1 ? `, ${number(course.rows[at])} rows at most` : ""),
    },
    pages: {
      series: [
        area("pages", course.pages, "teal"),
        ...(course.pool ? [line("pool", course.pages.map(() => course.pool), "bad", [6, 4])] : []),
      ],
      said: (at) => `${number(course.pages[at])} pages`,
    },
    requests: {
      series: [line("under way", course.running, "blue"), line("waiting", course.waiting, "violet")],
      said: (at) => `${number(course.running[at])} under way, ${number(course.waiting[at])} waiting`,
    },
  };
  const spanOf = (at) => {
    const first = course.first[at], last = first + course.steps[at] - 1;
    const steps = first === last ? `step ${number(first)}` : `steps ${number(first)} to ${number(last)}`;
    return course.total > 0 ? `${steps}, ${time(ends[at])} to ${time(ends[at + 1])}` : steps;
  };

  const hint = "Point at a place for its figures. Drag to zoom, double click to see all; keys: + − ← → 0.";
  const charts = [];
  const shown = () => [charts[0].scales.x.min, charts[0].scales.x.max];
  const show = (low, high) => {
    const whole = ends[count] - ends[0], width = Math.min(Math.max(high - low, whole * 1e-6), whole);
    const min = Math.min(Math.max(low, ends[0]), ends[count] - width);
    for (const chart of charts) chart.setScale("x", { min, max: min + width });
  };

  for (const place of document.querySelectorAll(".chart")) {
    const kind = kinds[place.dataset.chart];
    const said = document.createElement("p");
    said.className = "said";
    const rest = charts.length ? "" : hint;
    said.textContent = rest;
    const axis = { stroke: color("soft"), grid: { stroke: color("line"), width: 1 }, ticks: { show: false },
      font: "12px system-ui, sans-serif" };
    const room = () => Math.max(place.clientWidth, 200);
    place.replaceChildren();
    const chart = new uPlot(
      {
        width: room(),
        height: 200,
        legend: { show: false },
        cursor: { y: false, sync: { key: "course" }, points: { show: false } },
        select: { show: true, left: 0, top: 0, width: 0, height: 0 },
        scales: { x: { time: false }, y: { range: (_, low, high) => [0, Math.max(high * 1.05, 1)] } },
        axes: [
          { ...axis, size: 34, values: (_, ticks) => ticks.map((tick) => `${+tick.toPrecision(6)} ${name}`), space: 70 },
          { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? number(tick) : "")) },
        ],
        series: [{}, ...kind.series.map(({ values, ...series }) => series)],
        hooks: {
          setCursor: [
            (self) => {
              if (self.cursor.left == null || self.cursor.left < 0) return void (said.textContent = rest);
              const at = self.posToVal(self.cursor.left, "x");
              let low = 0, high = count - 1; // the last column that begins at or before the pointer
              while (low < high) {
                const middle = (low + high + 1) >> 1;
                if (ends[middle] <= at) low = middle;
                else high = middle - 1;
              }
              said.textContent = `${spanOf(low)}: ${kind.said(low)}`;
            },
          ],
        },
      },
      [ends, ...kind.series.map(({ values }) => stepped(values))],
      place,
    );
    charts.push(chart);
    place.after(said);
    new ResizeObserver(() => chart.setSize({ width: room(), height: 200 })).observe(place);
    place.addEventListener("keydown", (event) => {
      const [low, high] = shown(), quarter = (high - low) / 4;
      const moves = { "+": [low + quarter, high - quarter], "=": [low + quarter, high - quarter],
        "-": [low - 2 * quarter, high + 2 * quarter], ArrowLeft: [low - quarter, high - quarter],
        ArrowRight: [low + quarter, high + quarter], 0: [ends[0], ends[count]] };
      if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      show(...moves[event.key]);
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.redraw()));
})();
