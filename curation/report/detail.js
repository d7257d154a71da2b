/* The panel of one clip: its whole filmstrip, what each tier says of it and why, and its scores by stage. */
"use strict";

(function panel() {
  const { make, tierStyle, span, show, frame, seek, columnAt } = report;
  const { tiers, columns } = report.gallery;
  const detail = document.getElementById("detail");
  const chartOf = new Map(report.charts.map((chart) => [chart.name, chart]));
  let found = [];
  let open = -1;

  /** Where a value lies among all clips, in per cent, from the histogram's counts; null where there is none. */
  function standing(name, value) {
    const chart = chartOf.get(name);
    if (typeof value !== "number" || chart?.kind !== "number" || chart.kept.length < 2) return null;
    const at = (report.onAxis(chart, value) - chart.start) / chart.step;
    let below = 0;
    let all = 0;
    chart.kept.forEach((kept, bin) => {
      const here = kept + chart.rejected[bin];
      below += here * Math.min(1, Math.max(0, at - bin));
      all += here;
    });
    return all ? (100 * below) / all : null;
  }

  function scoreRow(column, value) {
    const place = standing(column.name, value);
    const unit = column.unit && value !== null ? make("small", {}, ` ${column.unit}`) : null;
    const text = typeof value === "string" && value.length > 28;
    return make("div", { className: `${column.error && value ? "alarm " : ""}${text ? "long" : ""}`.trim(), title: column.doc ? `${column.name}: ${column.doc}` : column.name },
      make("dt", {}, column.short),
      make("dd", { className: value === null ? "faint" : null }, show(value), unit,
        place === null ? null : make("i", { className: "place", style: `--place: ${place.toFixed(1)}%`, title: `higher than ${place.toFixed(0)} % of the clips` })));
  }

  function verdictRow(clip, tier, index) {
    const reason = clip.verdicts[index];
    const gate = reason ? tier.gates[reason] : null;
    const at = gate ? columnAt.get(gate.column) : undefined;
    const because = gate ? `${reason}: ${at === undefined || clip.values[at] === null ? "no value" : show(clip.values[at])}, asked ${gate.text}` : reason;
    return make("tr", { style: tierStyle(index) },
      make("th", { scope: "row" }, make("i", { className: "swatch" }), tier.name),
      make("td", {}, reason ? "rejected" : "kept"), make("td", {}, because || ""));
  }

  report.openDetail = function openDetail(clips, position) {
    const clip = clips[position];
    if (!clip) return;
    found = clips;
    open = position;
    const groups = new Map();
    columns.forEach((column, index) => {
      if (column.error && clip.values[index] === null) return; // no error is no news
      if (column.issue || column.name === "quality_high") return; // shown as chips above
      if (!groups.has(column.stage)) groups.set(column.stage, []);
      groups.get(column.stage).push(scoreRow(column, clip.values[index]));
    });
    const strip = make("div", { className: "strip" });
    for (let at = 0; at < (report.strips[clip.index] ? clip.frames : 0); at += 1) {
      const node = frame(clip, "still");
      seek(node, clip, at);
      strip.append(node);
    }
    const button = (text, label, action, disabled = false) => {
      const node = make("button", { type: "button", disabled, "aria-label": label }, text);
      node.addEventListener("click", action);
      return node;
    };
    const size = clip.width && clip.height ? `, ${clip.width} x ${clip.height}` : "";
    detail.replaceChildren(
      make("header", {}, make("div", {}, make("h2", { id: "detail-title" }, clip.name), make("p", {}, `${span(clip)}${size}`)),
        make("div", { className: "tools" },
          button("Previous", "Previous clip", () => move(-1), position === 0),
          button("Next", "Next clip", () => move(1), position === found.length - 1),
          button("Close", "Close details", () => detail.close()))),
      make("div", { className: "body", tabIndex: 0, role: "group", "aria-label": "Clip details" },
        strip.childElementCount ? strip : make("p", { className: "empty" }, "This clip has no thumbnail."),
        make("div", { className: "written" }, ...report.words(clip)),
        make("table", { className: "verdicts" }, make("tbody", {}, ...tiers.map((tier, index) => verdictRow(clip, tier, index)))),
        clip.reason ? make("p", { className: "whole" }, `No tier keeps this clip: ${clip.reason}${clip.stage ? ` (${clip.stage})` : ""}.`) : null,
        make("div", { className: "groups" }, ...[...groups].map(([stage, rows]) =>
          make("section", {}, make("h3", {}, stage || "other"), make("dl", {}, ...rows)))),
        make("dl", { className: "origin" }, make("dt", {}, "Clip"), make("dd", {}, clip.id), make("dt", {}, "Source"), make("dd", {}, clip.uri))));
    if (!detail.open) detail.showModal();
    detail.querySelector(".body").focus({ preventScroll: true });
  };

  const move = (step) => report.openDetail(found, open + step); // past either end nothing opens
  detail.addEventListener("click", (event) => event.target === detail && detail.close());
  detail.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") move(-1);
    else if (event.key === "ArrowRight") move(1);
  });
})();
