/* Elements, and numbers in words. Text reaches the document as text nodes only, never as markup. */

/** An element with properties, attributes (data-, aria-, role and such) and children; strings become text nodes. */
export function make(tag, facts = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(facts)) {
    if (value === null || value === undefined) continue;
    if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

/** One of the symbols of index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button with an icon; without `words` on it, `label` is its name. */
export function button(symbol, words, facts = {}) {
  return make("button", { type: "button", className: "quiet", ...facts }, symbol ? icon(symbol) : null, words ? make("span", {}, words) : null);
}

export const byId = (id) => document.getElementById(id);

/** Assigns only what differs, so that screen readers and the layout are left in peace. */
export function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  const whole = Math.max(0, seconds);
  if (whole < 10) return `${whole.toFixed(1)} s`;
  if (whole < 60) return `${Math.round(whole)} s`;
  const minutes = Math.floor(Math.round(whole) / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(whole) % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function ago(time, now) {
  const seconds = now - time;
  if (seconds < 45) return "just now";
  if (seconds < 3600) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h ago`;
  return new Date(time * 1000).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}

export const STATE_WORDS = {
  queued: "Queued", in_progress: "In progress", completed: "Completed", failed: "Failed", cancelled: "Cancelled", expired: "Expired",
};
export const ended = (job) => !["queued", "in_progress"].includes(job.state);

/** Which of two views of a job is the later one: answers overtake one another. */
export const later = (old, job) => (old && old.version > job.version ? old : job);

/** The badge of a state; a job that was asked to stop says so. */
export function badge(job) {
  const stopping = job.cancel_requested && !ended(job);
  return make("span", { className: "badge", "data-state": stopping ? "stopping" : job.state }, stopping ? "Cancelling" : STATE_WORDS[job.state] ?? job.state);
}

/** "144×96" of what was resolved, or what was asked for before that is known. */
export function sizeOf(job) {
  const { width_px: width, height_px: height } = job.resolved ?? {};
  return width && height ? `${width}×${height}` : (job.request.size ?? "").replace("x", "×");
}
