/* What was written about a clip and what the quality model says of it: parts of the panel that detail.js opens. */
"use strict";

(function words() {
  const { make, number } = report;
  const { columns, likely } = report.gallery;
  const issueAt = columns.flatMap((column, index) => (column.issue ? [[column.issue, index]] : []));
  const highAt = columns.findIndex((column) => column.name === "quality_high");
  const spoken = (issue) => issue.replaceAll("_", " ");
  const clock = (seconds) => `${seconds.toFixed(1)} s`;

  /** A titled part of the panel, or null where there is nothing to show. */
  function part(title, ...children) {
    const found = children.filter(Boolean);
    return found.length ? make("section", {}, make("h3", {}, title), ...found) : null;
  }

  /** Sub-actions one below the other, each with its stretch of the clip's length. */
  function timeline(clip) {
    const { actions } = clip.words;
    if (!actions) return null;
    const ends = actions.map(([, , end]) => end).filter((end) => end !== null);
    const length = clip.end !== null && clip.start !== null ? clip.end - clip.start : Math.max(0, ...ends);
    const place = (time) => (length > 0 ? Math.min(100, Math.max(0, (100 * time) / length)) : 0);
    return make("ol", { className: "timeline" }, ...actions.map(([text, start, end]) => {
      const known = start !== null && end !== null;
      const bar = known ? make("i", { style: `left: ${place(start)}%; width: ${Math.max(0.5, place(end) - place(start))}%` }) : null;
      return make("li", {}, make("span", { className: "what" }, text), make("span", { className: "stretch", "aria-hidden": "true" }, bar),
        make("span", { className: "when num" }, known ? `${start.toFixed(1)} to ${clock(end)}` : "–"));
    }));
  }

  /** The training caption, with what tagging added before and after the caption marked. */
  function training(clip) {
    const [before, middle, after] = clip.words.training || [];
    if (before === undefined) return null;
    const tag = (text) => (text.trim() ? make("mark", { title: "added by tagging" }, text) : null);
    return part("Training caption", make("p", { className: "prose" }, tag(before), middle ?? clip.words.caption, tag(after)));
  }

  function facts(clip) {
    const { camera, style, spatial, labels, review } = clip.words;
    const rows = [
      ["Action", labels && (labels[0] === "none" ? "no action of the taxonomy" : labels.join(" › "))],
      ["Camera", camera && spoken(camera)], ["Style", style],
      ["Spatial", spatial && make("ul", {}, ...spatial.map((text) => make("li", {}, text)))],
      ["Review", review && review !== "real" ? review : null],
    ].filter(([, value]) => value);
    return rows.length ? make("dl", { className: "facts-list" }, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])) : null;
  }

  /** Chips of the likely issues, and all probabilities on demand. */
  function quality(clip) {
    const known = issueAt.filter(([, index]) => clip.values[index] !== null);
    if (!known.length) return null;
    const found = known.filter(([, index]) => clip.values[index] >= likely);
    const high = highAt >= 0 ? clip.values[highAt] : null;
    const row = (name, value) => make("li", { className: value >= likely && name !== "high quality" ? "row likely" : "row" },
      make("span", { className: "label" }, name), make("span", { className: "track" }, make("i", { className: "kept", style: `width: ${100 * value}%` })),
      make("span", { className: "num" }, number(value)));
    return part("Quality",
      make("p", { className: "chips" }, ...found.map(([issue, index]) => make("span", { className: "chip issue" }, `${spoken(issue)} ${number(clip.values[index])}`)),
        found.length ? null : make("span", { className: "chip fine" }, "no issue"), high === null ? null : make("span", { className: "chip" }, `high quality ${number(high)}`)),
      make("details", { className: "more" }, make("summary", {}, `All ${known.length} probabilities`),
        make("ul", { className: "probabilities" }, ...known.map(([issue, index]) => row(spoken(issue), clip.values[index])), high === null ? null : row("high quality", high))));
  }

  /** Names of the issues that a clip likely has; null where it was not judged. */
  report.issuesOf = (clip) => {
    const known = issueAt.filter(([, index]) => clip.values[index] !== null);
    return known.length ? known.filter(([, index]) => clip.values[index] >= likely).map(([issue]) => issue) : null;
  };
  report.issueNames = issueAt.map(([issue]) => issue);
  report.spoken = spoken;

  /** Everything written about a clip, for the panel; an empty list where there is nothing. */
  report.words = (clip) => {
    const caption = clip.words.caption ?? clip.words.short;
    return [
      part("Caption", caption ? make("p", { className: "prose" }, caption) : null, facts(clip)),
      part("What happens, and when", timeline(clip)), training(clip), quality(clip),
    ].filter(Boolean);
  };
})();
