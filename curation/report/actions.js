/* The distribution of action labels in one view (all clips, or a tier), as found and, where the tier is balanced, as drawn. */
"use strict";

(function actions() {
  const { make, number } = report;
  const data = JSON.parse(document.getElementById("data-actions").textContent);
  if (!data) return;
  const form = document.getElementById("action-view");
  const box = document.getElementById("action-bars");
  const opened = new Set(); // by path: a class that is open stays open when the view changes
  const PATH = " › ";

  const percent = (part, whole) => {
    const share = whole ? (100 * part) / whole : 0;
    if (share > 0 && share < 0.1) return "< 0.1 %";
    return `${share >= 10 || !share ? share.toFixed(0) : share.toFixed(1)} %`;
  };

  /** Bars and numbers of one node. Of a balanced tier: the share as found above, the share as drawn below. */
  function measures(node, view, scale) {
    const found = node.n[view] / (data.total.n[view] || 1);
    const drawn = data.views[view].weighted ? node.w[view] / (data.total.w[view] || 1) : null;
    // Many labels summed up have no bar: it would dwarf those that it stands below.
    const bar = (share, kind) => (node.rest ? null : make("i", { className: kind, style: `width: ${(100 * share) / scale}%` }));
    const shares = drawn === null ? percent(found, 1) : `${percent(found, 1)} → ${percent(drawn, 1)}`;
    return [
      make("span", { className: "track" }, bar(found, drawn === null ? "kept" : "cut"), drawn === null ? null : bar(drawn, "kept")),
      make("span", { className: "num" }, number(node.n[view])),
      make("span", { className: "num faint shares", "aria-label": drawn === null ? null : `${percent(found, 1)} as found, ${percent(drawn, 1)} as drawn` }, shares),
    ];
  }

  const present = (nodes, view) => nodes.filter((node) => node.n[view] > 0).sort((a, b) => (a.rest || 0) - (b.rest || 0) || b.n[view] - a.n[view]);

  function show(path) {
    return make("button", { type: "button", className: "reason", "data-label": path,
      "data-tier": form.view.value === "0" ? "" : String(data.views[form.view.value].tier),
      "data-verdict": form.view.value === "0" ? "" : "kept", title: "Show these clips in the gallery" });
  }

  function leaf(node, path, view, scale) {
    const link = node.rest ? make("span", { className: "faint" }, node.name) : show(path);
    if (!node.rest) link.textContent = node.name;
    return make("li", { className: "row" }, make("span", { className: "label" }, link), ...measures(node, view, scale));
  }

  function branch(node, above, view, scale) {
    const path = above ? above + PATH + node.name : node.name;
    const all = show(path);
    all.textContent = `Show the clips of ${node.name}`;
    const children = present(node.children, view);
    const inner = Math.max(...children.filter((child) => !child.rest).map((child) => Math.max(child.n[view] / (data.total.n[view] || 1),
      data.views[view].weighted ? child.w[view] / (data.total.w[view] || 1) : 0)), 1e-9);
    const details = make("details", { open: opened.has(path) },
      make("summary", { className: "row" }, make("span", { className: "label" }, node.name), ...measures(node, view, scale)),
      make("ul", {}, ...children.map((child) => (child.children ? branch(child, path, view, inner) : leaf(child, path + PATH + child.name, view, inner))),
        make("li", { className: "show-all" }, all)));
    details.addEventListener("toggle", () => (details.open ? opened.add(path) : opened.delete(path)));
    return make("li", {}, details);
  }

  function plainRows(title, rows, view) {
    return make("section", {}, make("h4", {}, title), make("ul", {}, ...rows.map(([name, node, scale, path]) => {
      const link = path ? show(path) : make("span", {});
      link.textContent = name;
      return make("li", { className: "row" }, make("span", { className: "label" }, link), ...measures(node, view, scale));
    })));
  }

  function draw() {
    const view = Number(form.view.value);
    const { weighted } = data.views[view];
    const total = data.total.n[view];
    const share = (node) => Math.max(node.n[view] / (total || 1), weighted ? node.w[view] / (data.total.w[view] || 1) : 0);
    const classes = present(data.classes, view);
    const scale = Math.max(...classes.map(share), 1e-9);
    const parts = [];
    if (classes.length) parts.push(make("ul", { className: "classes" }, ...classes.map((node) => branch(node, "", view, scale))));
    else parts.push(make("p", { className: "empty" }, "No clip here has an action."));
    const datasets = data.datasets[view] || [];
    if (data.none.n[view]) {
      parts.push(plainRows("Apart", [["no action of the taxonomy", data.none, Math.max(scale, share(data.none)), data.none.name]], view));
    }
    if (datasets.length) {
      // The rows of a collection are counted in this view only.
      const rows = datasets.map((row) => ({ name: row.name, n: { [view]: row.n }, w: { [view]: row.w } }));
      const most = Math.max(...rows.map(share));
      parts.push(plainRows("Collections, balanced as well", rows.map((row) => [row.name, row, most, null]), view));
    }
    box.replaceChildren(...parts);
    const lost = data.unlabelled[view];
    const words = `${number(total)} labelled ${total === 1 ? "clip" : "clips"}${lost ? `, ${number(lost)} without a label` : ""}.`;
    const key = (kind, text) => make("span", { className: "key" }, make("i", { className: `dot ${kind}` }), text);
    document.getElementById("action-key").replaceChildren(words, " ",
      ...(weighted ? [key("cut", "share as found"), key("kept", "share as drawn, with weights")] : [key("kept", "share of the labelled clips")]));
  }

  data.views.forEach((view, index) => form.view.append(make("option", { value: String(index) }, view.name + (view.weighted ? " (balanced)" : ""))));
  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  draw();
})();
