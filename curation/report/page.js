/* The page's data, the charts and the source table. gallery.js follows and shares `report`.
   Text from the run reaches the document through textContent only (and through `escape` where plotly wants markup). */
"use strict";

const report = {
  charts: JSON.parse(document.getElementById("data-charts").textContent),
  gallery: JSON.parse(document.getElementById("data-gallery").textContent),
  strips: JSON.parse(document.getElementById("data-strips").textContent),
  TIER_COLOURS: 8,
};

/** An element with properties, attributes (data-, aria-, style and such) and children; strings become text nodes. */
report.make = function make(tag, facts = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(facts)) {
    if (value === null || value === undefined) continue;
    if (name in node && name !== "style") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
};

/** Three significant digits, as summary.number writes them. */
report.number = function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 1e-4) return value.toExponential(1);
  return value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
};

/** A value in the units of its chart's axis: powers of ten on a logarithmic one. */
report.onAxis = (chart, value) => (chart.log ? (value > 0 ? Math.log10(value) : -Infinity) : value);

report.tierStyle = (index) => `--tier: var(--tier-${index % report.TIER_COLOURS})`;

(function charts() {
  const LINE = 15; // height of a threshold's label
  const MARGIN = { left: 38, right: 10, bottom: 24, top: 6 };
  const drawn = new Set();
  const pen = document.createElement("canvas").getContext("2d");
  const escape = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const short = (value) => (value >= 1e6 ? `${value / 1e6}M` : value >= 1000 ? `${value / 1000}k` : String(+value.toPrecision(3)));
  const tierColour = (index) => colour(`--tier-${index % report.TIER_COLOURS}`);

  /** Where each threshold's label stands: a flag at its line, raised until it clears the flags to its right. */
  function flags(chart, width) {
    const [low, high] = chart.axis;
    const names = report.gallery.tiers.map((tier) => tier.name);
    const placed = [];
    const marks = chart.marks.filter((mark) => typeof mark.value === "number");
    const spot = (mark) => Math.min(high, Math.max(low, report.onAxis(chart, mark.value)));
    for (const mark of [...marks].sort((a, b) => spot(b) - spot(a))) {
      const all = mark.tiers.length === names.length && names.length > 2;
      let words = all ? ["all tiers"] : mark.tiers.map((tier) => names[tier]);
      const where = report.onAxis(chart, mark.value);
      const ahead = where > high ? " →" : where < low ? " ←" : "";
      const end = ` ${mark.sign} ${mark.text}${ahead}`;
      pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
      const measure = () => pen.measureText(words.join(", ") + end).width + 10;
      if (measure() > width) words = [words[0], `+${words.length - 1}`];
      const size = Math.min(measure(), width);
      const at = ((spot(mark) - low) / (high - low)) * width;
      const left = at + size > width + MARGIN.right ? at - size : at;
      const start = Math.max(-MARGIN.left + 2, left);
      const clash = (level) => placed.some((p) => p.level === level && start < p.start + p.size && p.start < start + size);
      let level = 0;
      while (clash(level)) level += 1;
      const coloured = words.map((word, i) => {
        const ink = all || i >= mark.tiers.length ? colour("--ink") : tierColour(mark.tiers[i]);
        return `<span style="color:${ink}">${escape(word)}</span>`;
      });
      placed.push({ mark, at, start, size, level, text: coloured.join(", ") + escape(end) });
    }
    return placed;
  }

  function draw(node) {
    const chart = report.charts[Number(node.dataset.chart)];
    const width = node.clientWidth - MARGIN.left - MARGIN.right;
    const marks = flags(chart, width);
    const top = MARGIN.top + LINE * (1 + Math.max(-1, ...marks.map((mark) => mark.level)));
    const inner = node.clientHeight - MARGIN.bottom - top;
    const [low, high] = chart.axis;
    const left = chart.kept.map((_, i) => chart.start + i * chart.step);
    const range = (x) => chart.log ? `${report.number(10 ** x)} to ${report.number(10 ** (x + chart.step))}` : chart.whole
      ? (chart.step === 1 ? report.number(x + 0.5) : `${report.number(x + 0.5)} to ${report.number(x + chart.step - 0.5)}`)
      : `${report.number(x)} to ${report.number(x + chart.step)}`;
    const words = left.map((x, i) => [range(x), report.number(chart.kept[i]), report.number(chart.rejected[i])]);
    const bars = (counts, fill, hover) => ({
      type: "bar", x: left.map((x) => x + chart.step / 2), y: counts, width: chart.step, customdata: words,
      marker: { color: fill, line: { color: colour("--panel"), width: chart.kept.length > 1 ? 1 : 0 } },
      ...(hover ? { hovertemplate: "%{customdata[0]}<br>%{customdata[1]} kept, %{customdata[2]} rejected<extra></extra>" }
        : { hoverinfo: "skip" }),
    });
    const shapes = [];
    for (const { mark, at, level } of marks) {
      const height = inner + LINE * (level + 1) - 2;
      mark.tiers.forEach((tier, i) => { // a bound that tiers share is drawn in turns of their colours
        const share = mark.tiers.length;
        shapes.push({
          type: "line", xref: "paper", yref: "paper", x0: at / width, x1: at / width,
          y0: ((i / share) * height) / inner, y1: (((i + 1) / share) * height) / inner,
          line: { color: tierColour(tier), width: 2 },
        });
      });
    }
    const annotations = marks.map(({ start, level, text }) => ({
      xref: "paper", yref: "paper", x: start / width, y: 1 + (LINE * level) / inner, xanchor: "left", yanchor: "bottom",
      text, showarrow: false, align: "left", bgcolor: colour("--panel"), borderpad: 0, height: LINE - 1,
      xshift: 4, font: { size: 11, color: colour("--ink") },
    }));
    const pad = ((high - low) || 1) * 0.005;
    const axis = { color: colour("--muted"), gridcolor: colour("--line"), zeroline: false, fixedrange: true, tickfont: { size: 11 } };
    const ticks = [];
    for (let power = Math.floor(low); chart.log && power <= high; power += 1) {
      for (const digit of high - low < 3.2 ? [1, 2, 5] : [1]) ticks.push(digit * 10 ** power);
    }
    const tallest = Math.max(...chart.kept.map((kept, bin) => kept + chart.rejected[bin]));
    const inside = ticks.filter((tick) => Math.log10(tick) >= low && Math.log10(tick) <= high);
    const layout = {
      barmode: "stack", bargap: 0, showlegend: false, hovermode: "x", dragmode: false, shapes, annotations,
      margin: { l: MARGIN.left, r: MARGIN.right, b: MARGIN.bottom, t: top }, height: node.clientHeight,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: colour("--ink"), size: 12 },
      hoverlabel: { bgcolor: colour("--ink"), bordercolor: colour("--ink"), font: { color: colour("--panel"), size: 12 } },
      xaxis: { ...axis, range: [low - pad, high + pad], showgrid: false, nticks: 6, showline: true, linecolor: colour("--line"),
        ...(chart.log ? { tickvals: inside.map(Math.log10), ticktext: inside.map(short), tickangle: 0 } : {}),
        ...(chart.whole && high - low < 8 ? { dtick: 1 } : {}) },
      yaxis: { ...axis, nticks: 4, rangemode: "tozero", tickformat: "~s", ...(tallest < 4 ? { dtick: 1 } : {}) },
    };
    // The upper trace of the stack carries the hover, so that a bin has one box and not two.
    const traces = [bars(chart.kept, colour("--kept"), false), bars(chart.rejected, colour("--cut"), true)];
    window.Plotly.react(node, traces, layout, { displayModeBar: false, responsive: false });
    drawn.add(node);
  }

  const nodes = document.querySelectorAll("[data-chart]");
  let timer = 0;
  const redraw = () => {
    clearTimeout(timer);
    timer = setTimeout(() => drawn.forEach(draw), 120);
  };
  document.addEventListener("DOMContentLoaded", () => { // plotly is the last script: by now it has run
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    }, { rootMargin: "300px" });
    nodes.forEach((node) => seen.observe(node));
    window.addEventListener("resize", redraw);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  });
})();

(function sources() {
  const find = document.getElementById("find-source");
  const rows = [...document.getElementById("source-rows").rows];
  find.addEventListener("input", () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
})();
