/* The gallery: filter, sort, page and play on hover. detail.js follows and opens one clip. */
"use strict";

(function gallery() {
  const { make, number, spoken, tierStyle } = report;
  const PATH = " › ";
  const { tiers, columns, clips, total } = report.gallery;
  const PAGE = 60;
  const STEP_MS = 170;
  const form = document.getElementById("filters");
  const cards = document.getElementById("cards");
  const pager = document.getElementById("pager");
  const NONE = ["none", "none", "none"].join(PATH);
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const columnAt = report.columnAt = new Map(columns.map((column, index) => [column.name, index]));
  const gated = tiers.flatMap((tier) => Object.values(tier.gates).map((gate) => gate.column));
  // Looks, text and motion tell clips apart; length and size are alike on most of them and come after.
  const telling = [...new Set(gated)].filter((name) => columns[columnAt.get(name)]?.number);
  const keyColumns = [...telling.filter((name) => /score$|area_ratio$|foreground_px$/.test(name)), ...telling];
  const errors = columns.flatMap((column, index) => (column.error ? [index] : []));
  const searched = columns.flatMap((column, index) => (column.number ? [] : [index]));
  let found = [];
  let page = 0;

  clips.forEach((clip, index) => {
    clip.index = index;
    clip.name = clip.uri.split("/").pop() || clip.id;
    clip.issues = report.issuesOf(clip);
    clip.path = (clip.words.labels || []).join(PATH);
    clip.text = [clip.id, clip.uri, clip.reason, clip.stage, ...clip.verdicts, ...searched.map((i) => clip.values[i]),
      ...(clip.issues || []).map(spoken), ...Object.values(clip.words).flat(2)]
      .filter((part) => typeof part === "string").join("\n").toLowerCase();
  });

  const time = (seconds) => {
    const minutes = Math.floor(seconds / 60);
    return minutes ? `${minutes}:${(seconds - 60 * minutes).toFixed(1).padStart(4, "0")}` : `${seconds.toFixed(1)} s`;
  };
  const span = (clip) => (clip.kind === "image" || clip.start === null || clip.end === null
    ? clip.kind || "clip" : `${time(clip.start)} to ${time(clip.end)}`);
  report.span = span;
  const show = report.show = (value) => (typeof value === "number" ? number(value) : value === null ? "–" : String(value));

  /* ---- filter and sort ---- */

  function fill(select, pairs, first) {
    const before = select.value;
    select.replaceChildren(make("option", { value: "" }, first), ...pairs.map(([value, text]) => make("option", { value }, text)));
    select.value = before;
    if (select.selectedIndex < 0) select.value = "";
  }

  function count(values) {
    const counts = new Map();
    for (const value of values) if (value) counts.set(value, (counts.get(value) || 0) + 1);
    return [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
  }

  const reasonsOf = (clip, tier) => (tier === "" ? [...new Set([...clip.verdicts, clip.reason])] : [clip.verdicts[tier]]);

  function fillReasons() {
    const reasons = count(clips.flatMap((clip) => reasonsOf(clip, form.tier.value)));
    fill(form.reason, reasons.map(([reason, n]) => [reason, `${reason} (${n})`]), "All");
  }

  /** Every class of the first two levels that occurs; deeper ones are chosen from the chart of actions. */
  function fillLabels() {
    const paths = count(clips.flatMap((clip) => {
      const labels = clip.path === NONE ? ["none"] : clip.words.labels || [];
      return labels.slice(0, 2).map((_, depth) => labels.slice(0, depth + 1).join(PATH));
    }));
    const first = paths.filter(([path]) => !path.includes(PATH)).sort((a, b) => (a[0] === "none") - (b[0] === "none"));
    fill(form.action_label, first.flatMap(([top, n]) => [[top === "none" ? NONE : top, `${top === "none" ? "no action" : top} (${n})`],
      ...paths.filter(([path]) => path.startsWith(top + PATH)).map(([path, m]) => [path, `\u2003${path.slice(top.length + PATH.length)} (${m})`])]), "All");
  }

  function fillIssues() {
    const having = (test) => clips.filter((clip) => clip.issues && test(clip.issues)).length;
    fill(form.issue, [["any", `any issue (${having((all) => all.length)})`], ["clean", `none of them (${having((all) => !all.length)})`],
      ...report.issueNames.map((issue) => [issue, `${spoken(issue)} (${having((all) => all.includes(issue))})`])], "All");
  }

  function hasIssue(clip, wanted) {
    if (!clip.issues) return false;
    return wanted === "any" ? clip.issues.length > 0 : wanted === "clean" ? !clip.issues.length : clip.issues.includes(wanted);
  }

  function fillForm() {
    fill(form.tier, tiers.map((tier, index) => [String(index), tier.name]), "Any");
    const names = new Map(clips.map((clip) => [clip.source, clip.name]));
    fill(form.source, count(clips.map((clip) => clip.source)).map(([id, n]) => [id, `${names.get(id)} (${n})`]), "All");
    fill(form.sort, [], "File and time");
    for (const stage of new Set(columns.map((column) => column.stage))) {
      const options = columns.filter((column) => column.number && column.stage === stage)
        .map((column) => make("option", { value: column.name }, column.name));
      if (options.length) form.sort.append(make("optgroup", { label: stage || "other" }, ...options));
    }
    fillReasons();
    fillLabels();
    fillIssues();
  }

  function passes(clip) {
    const tier = form.tier.value;
    const kept = tier === "" ? clip.reason === null : clip.verdicts[tier] === null;
    if (form.verdict.value && (form.verdict.value === "kept") !== kept) return false;
    if (form.verdict.value === "lost" && tier !== "" && clip.verdicts[tiers[tier].parent]) return false; // lost before
    if (form.issue.value && !hasIssue(clip, form.issue.value)) return false;
    if (form.action_label.value && !(clip.path + PATH).startsWith(form.action_label.value + PATH)) return false;
    if (form.reason.value && !reasonsOf(clip, tier).includes(form.reason.value)) return false;
    if (form.source.value && clip.source !== form.source.value) return false;
    if (form.kind.value && clip.kind !== form.kind.value) return false;
    return form.text.value.toLowerCase().split(/\s+/).every((word) => clip.text.includes(word));
  }

  function compare(a, b) {
    const at = columnAt.get(form.sort.value);
    const turn = form.order.value === "down" ? -1 : 1;
    if (at !== undefined) {
      const [x, y] = [a.values[at], b.values[at]];
      if (x === null || y === null) return (x === null) - (y === null); // what was not measured comes last, either way
      if (x !== y) return turn * (x - y);
    }
    return turn * (a.uri < b.uri ? -1 : a.uri > b.uri ? 1 : (a.start || 0) - (b.start || 0)) || a.index - b.index;
  }

  function refresh() {
    found = clips.filter(passes).sort(compare);
    page = 0;
    render();
  }

  /* ---- cards ---- */

  /** One frame of a filmstrip; `at` picks which by moving the strip behind a window of one frame. */
  function frame(clip, className) {
    const strip = report.strips[clip.index];
    if (!strip) return make("span", { className: `${className} blank` }, "no thumbnail");
    const node = make("span", { className, style: `--shape: ${strip.shape}` });
    node.style.backgroundImage = `url("data:image/jpeg;base64,${strip.jpeg}")`;
    node.style.backgroundSize = `${clip.frames * 100}% 100%`;
    seek(node, clip, Math.floor(clip.frames / 2));
    return node;
  }

  function seek(node, clip, at) {
    node.style.backgroundPosition = `${clip.frames > 1 ? (100 * at) / (clip.frames - 1) : 0}% 0`;
  }
  Object.assign(report, { frame, seek });

  function play(card, clip) {
    const node = card.querySelector(".frame");
    const tick = card.querySelector(".progress");
    let timer = 0;
    let at = 0;
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      seek(node, clip, Math.floor(clip.frames / 2));
      tick.style.width = "0";
    };
    const start = () => {
      if (timer || clip.frames < 2 || calm.matches || node.classList.contains("blank")) return;
      at = 0;
      const step = () => {
        seek(node, clip, at);
        tick.style.width = `${(100 * (at + 1)) / clip.frames}%`;
        at = (at + 1) % clip.frames;
      };
      step();
      timer = setInterval(step, STEP_MS);
    };
    card.addEventListener("pointerenter", start);
    card.addEventListener("pointerleave", stop);
    card.addEventListener("focus", () => card.matches(":focus-visible") && start());
    card.addEventListener("blur", stop);
  }

  /** The first tier that rejects and its gate: what a reader wants to know first. */
  function firstRejection(clip) {
    const tier = form.tier.value !== "" && clip.verdicts[form.tier.value] ? Number(form.tier.value) : clip.verdicts.findIndex(Boolean);
    return tier < 0 ? null : { tier, reason: clip.verdicts[tier], gate: tiers[tier].gates[clip.verdicts[tier]] };
  }

  function chips(clip) {
    return tiers.map((tier, index) => make("span", {
      className: clip.verdicts[index] ? "chip cut" : "chip kept", style: tierStyle(index),
      title: clip.verdicts[index] ? `${tier.name}: rejected by ${clip.verdicts[index]}` : `${tier.name}: kept`,
    }, tier.name));
  }

  function unit(name, clip) {
    const at = columnAt.get(name);
    const short = columns[at].unit.length < 8 && !columns[at].unit.includes(" "); // "1 to 10" is a range, not a unit
    return short && columns[at].unit && clip.values[at] !== null ? make("small", {}, ` ${columns[at].unit}`) : null;
  }

  function card(clip) {
    const cut = firstRejection(clip);
    const names = [...new Set([form.sort.value, cut?.gate?.column, ...keyColumns])].filter((name) => columnAt.has(name)).slice(0, 3);
    const scores = names.map((name) => make("span", { className: name === cut?.gate?.column ? "score why" : "score", title: name },
      make("span", {}, columns[columnAt.get(name)].short), make("b", {}, show(clip.values[columnAt.get(name)]), unit(name, clip))));
    const why = clip.reason ?? cut?.reason ?? null;
    const failed = errors.some((index) => clip.values[index]);
    const verdict = make("span", { className: clip.reason ? "reason-line cut" : "reason-line" },
      why === null ? "kept by every tier" : clip.reason ? `rejected: ${why}` : `${tiers[cut.tier].name} rejects: ${why}`);
    const { short, caption, labels } = clip.words;
    const told = short ?? caption ?? "";
    const label = labels && (labels[0] === "none" ? "no action" : labels.at(-1) === "none" ? labels[0] : labels.at(-1));
    const node = make("button", { type: "button", className: "card", "data-clip": clip.id,
      "aria-label": `${clip.name}, ${span(clip)}, ${told ? `${told.slice(0, 160)} ` : ""}${verdict.textContent}. Open details.` },
      make("span", { className: "screen" }, frame(clip, "frame"), make("i", { className: "progress" }),
        make("span", { className: "span" }, span(clip)), failed ? make("span", { className: "failed" }, "error") : null),
      make("span", { className: "file", title: clip.uri }, clip.name),
      told ? make("span", { className: "told", title: told.slice(0, 600) }, told.slice(0, 240)) : null,
      label ? make("span", { className: "label-line", title: clip.path }, label) : null, verdict,
      make("span", { className: "chips" }, ...chips(clip)), make("span", { className: "scores" }, ...scores));
    node.addEventListener("click", () => report.openDetail(found, found.indexOf(clip)));
    play(node, clip);
    return make("li", {}, node);
  }

  function render() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    const shown = found.slice(page * PAGE, (page + 1) * PAGE);
    cards.replaceChildren(...shown.map(card));
    pager.hidden = pages < 2;
    document.getElementById("page-number").textContent = `Page ${page + 1} of ${pages}`;
    pager.querySelector("[data-step='-1']").disabled = page === 0;
    pager.querySelector("[data-step='1']").disabled = page === pages - 1;
    const sampled = clips.length < total ? ` of the sample of ${number(clips.length)}` : clips.length ? ` of ${number(clips.length)}` : "";
    const hint = found.length || !clips.length ? "" : clips.length < total ? " None in this sample." : " Loosen or clear the filters.";
    document.getElementById("found").textContent = `${number(found.length)}${sampled} ${found.length === 1 && !sampled ? "clip" : "clips"}.${hint}`;
  }

  /* ---- events ---- */

  /** Select a value even if it is not offered, for no clip of the sample has it: an empty gallery is honest, an ignored
      filter is not. */
  function choose(select, value) {
    if (![...select.options].some((option) => option.value === value)) {
      const n = select === form.action_label ? clips.filter((clip) => (clip.path + PATH).startsWith(value + PATH)).length : 0;
      select.append(make("option", { value }, `${value} (${n})`));
    }
    select.value = value;
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-reason], [data-verdict], [data-source], [data-issue], [data-label]");
    if (!link) return;
    for (const field of form.querySelectorAll("select")) field.selectedIndex = 0;
    form.text.value = "";
    form.tier.value = link.dataset.tier ?? "";
    form.verdict.value = link.dataset.verdict ?? "";
    fillReasons();
    choose(form.reason, link.dataset.reason ?? "");
    choose(form.source, link.dataset.source ?? "");
    choose(form.issue, link.dataset.issue ?? "");
    choose(form.action_label, link.dataset.label === "none" ? NONE : link.dataset.label ?? "");
    refresh();
    document.getElementById("gallery").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth" });
    form.reason.focus({ preventScroll: true });
  });
  form.addEventListener("input", (event) => {
    if (event.target === form.tier) fillReasons();
    refresh();
  });
  form.addEventListener("reset", () => setTimeout(() => { fillReasons(); refresh(); }));
  form.addEventListener("submit", (event) => event.preventDefault());
  pager.addEventListener("click", (event) => {
    const step = Number(event.target.dataset.step || 0);
    if (!step) return;
    page += step;
    render();
    document.getElementById("filters").scrollIntoView();
    cards.querySelector("button")?.focus({ preventScroll: true });
  });
  fillForm();
  refresh();
})();
