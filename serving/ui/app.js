/* The page: ties the form, the chosen job, the history and the server's state together. */

import { ApiError, call, follow, getJson, getKey, Offline, onConnection, setKey } from "./api.js";
import { button, byId, ended, make, put, STATE_WORDS } from "./dom.js";
import { applyFacts, reuse, showError, startForm } from "./form.js";
import { createHistory } from "./history.js";
import { createJobView } from "./job.js";

const LIST_EVERY_MS = 2500;
const IDLE_EVERY_MS = 10_000;
const EXAMPLE = "A medium-sized red disc moves to the left over a white background.";

let view = null;
let following = null;
let known = false; // the capabilities have been read
let online = true;

const announce = (text) => put(byId("live"), text);
const history_ = createHistory({ choose: (id) => choose(history_.jobs.get(id), true) });

function banner(text) {
  byId("offline").hidden = !text;
  put(byId("offline"), text);
}

/** Errors that are not the form's: a missing key opens the dialog, the rest goes into the banner. */
function report(error) {
  if (error instanceof ApiError && error.status === 401) askKey(error.message);
  else banner(error.message);
}

function changed(job) {
  const latest = history_.update(job);
  if (view?.job.id === job.id) view.update(latest);
  title();
}

function title() {
  const job = view?.job;
  const text = !job ? "" : job.state === "in_progress" ? `${Math.floor(100 * job.progress)} %` : STATE_WORDS[job.state];
  document.title = text ? `${text} · Waver` : "Waver";
}

function showEmpty() {
  const example = button("again", "Try an example");
  example.addEventListener("click", () => ((byId("prompt").value = EXAMPLE), byId("prompt").focus()));
  const mark = make("div", { className: "empty-art", "aria-hidden": "true" }, make("span", {}), make("span", {}), make("span", {}));
  byId("view").replaceChildren(make("div", { className: "empty" }, mark, make("h2", {}, "Nothing made yet"), make("p", { className: "faint" }, "Describe a scene and press Generate. The result, its progress and the base model's preview appear here."), example));
}

/** Shows a job and follows it; one stream at a time, since browsers allow a host few connections. */
function choose(job, byHand = false) {
  if (!job || view?.job.id === job.id) return;
  following?.abort();
  view?.close();
  view = createJobView(job, { reuse, changed, announce, removed });
  byId("view").replaceChildren(view.node);
  history_.choose(job.id);
  title();
  if (byHand && matchMedia("(max-width: 860px)").matches) byId("view").scrollIntoView({ block: "start" });
  if (ended(job)) return;
  const mine = new AbortController();
  following = mine;
  follow(job.id, changed, mine.signal).catch((error) => {
    if (error instanceof ApiError && error.status === 404) removed(job);
    else if (view?.job.id === job.id) view.trouble(error);
  });
}

function removed(job) {
  history_.remove(job.id);
  if (view?.job.id !== job.id) return;
  following?.abort();
  view.close();
  view = null;
  history_.choose(null);
  announce("Job deleted");
  title();
  const newest = [...history_.jobs.values()].sort((a, b) => b.created_at - a.created_at)[0];
  if (newest) choose(newest);
  else showEmpty();
  byId("view").focus();
}

async function facts() {
  const told = await getJson("/capabilities");
  applyFacts(told.model, told.limits);
  known = true;
  const names = [told.model.base, told.model.refiner].filter(Boolean);
  put(byId("model"), names.map((name) => name.split("@")[0]).join(" + "));
  byId("model").title = names.join(" + ");
}

/** Ready, loading, or away; asked for while it is not ready, and now and then afterwards. */
async function ready() {
  const line = byId("server");
  try {
    await call("/readyz");
    line.dataset.state = "ready";
    put(line, "Ready");
  } catch (error) {
    if (error instanceof ApiError && error.status === 503) {
      line.dataset.state = "wait";
      put(line, "Loading models; jobs wait");
      line.title = error.message;
    } else if (error instanceof ApiError) {
      line.dataset.state = "ready";
      put(line, "Online");
    } else {
      throw error;
    }
  }
}

onConnection((heard) => {
  if (heard === online) return;
  online = heard;
  const line = byId("server");
  banner(heard ? "" : new Offline().message);
  if (heard) {
    ready().catch(() => {});
    return;
  }
  line.dataset.state = "offline";
  put(line, "Offline");
});

let beats = 0;
async function beat() {
  if (byId("key").open) return beatAgain(LIST_EVERY_MS); // nothing can be asked before there is a key
  let wait = IDLE_EVERY_MS;
  try {
    if (!document.hidden || !online) {
      if (!known) await facts();
      const waiting = byId("server").dataset.state !== "ready";
      if (waiting || beats++ % 6 === 0) await ready();
      await history_.refresh();
      const first = [...history_.jobs.values()].sort((a, b) => b.created_at - a.created_at)[0];
      if (!view && first) choose(first);
      if (waiting) wait = LIST_EVERY_MS;
      refreshChosen();
      banner("");
    }
  } catch (error) {
    report(error);
    beatAgain(Math.max(LIST_EVERY_MS, 1000 * (error.retryAfter_s ?? 0)));
    return;
  }
  if (history_.busy()) wait = LIST_EVERY_MS;
  beatAgain(wait);
}
let timer = null;
function beatAgain(ms) {
  clearTimeout(timer);
  timer = setTimeout(beat, ms);
}

/** What the list knows better: an ended job may still expire while it is looked at. */
function refreshChosen() {
  const job = view && history_.jobs.get(view.job.id);
  if (job && (ended(job) || job.state !== view.job.state)) changed(job);
}

function askKey(message) {
  const dialog = byId("key");
  if (message) put(byId("key-note"), message);
  if (dialog.open) return; // what is being typed stays
  byId("key-value").value = getKey();
  dialog.showModal();
}
function showKey() {
  byId("key-open").classList.toggle("set", Boolean(getKey()));
  byId("key-open").setAttribute("aria-label", getKey() ? "API key (set)" : "API key");
}

byId("key-open").addEventListener("click", () => askKey(""));
// No button that submits: Enter would press the first of those.
byId("key-forget").addEventListener("click", () => byId("key").close("forget"));
byId("key").addEventListener("close", () => {
  const { returnValue } = byId("key");
  if (!returnValue) return;
  setKey(returnValue === "keep" ? byId("key-value").value.trim() : "");
  byId("key-value").value = "";
  byId("key").returnValue = "";
  showKey();
  showError("");
  // Another key sees other jobs.
  following?.abort();
  view?.close();
  view = null;
  history_.choose(null);
  history_.clear();
  showEmpty();
  known = false;
  beat();
});
byId("filter").addEventListener("change", () => history_.refilter().catch(report));
byId("more").addEventListener("click", () => history_.more().catch(report));

startForm((job) => {
  byId("filter").value = "";
  history_.update(job);
  choose(job, true);
  announce("Job accepted");
}, (error) => error.status === 401 && askKey(error.message));
showEmpty();
showKey();
beat();
