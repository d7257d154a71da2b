/* The chosen job: where it stands, what it made, how to make it again. */

import { ApiError, call, cancelJob, fileUrl, getKey, Offline, serverNow } from "./api.js";
import { curlCommand } from "./curl.js";
import { badge, button, duration, ended, make, put, sizeOf } from "./dom.js";
import { createPlayer } from "./player.js";

// Widths of the bar: the two models take nearly all of the time.
const STAGES = { rewrite: 1, encode: 1, base: 5, upscale: 1, refine: 4, decode: 1.4 };
const STAGE_WORDS = { rewrite: "Rewrite", encode: "Encode", base: "Base", upscale: "Upscale", refine: "Refine", decode: "Decode" };

function stagesOf(job) {
  const refines = job.resolved?.refine ?? job.request.refine;
  const left = { rewrite: job.request.rewrite === false, upscale: refines === false, refine: refines === false };
  return Object.keys(STAGES).filter((name) => !left[name] || job.stage === name || job.stage_seconds?.[name] !== undefined);
}

/** The segmented bar; `update(job)` fills it. */
function createBar() {
  const segments = {};
  const list = make("ol", { className: "stages" });
  for (const [name, width] of Object.entries(STAGES)) {
    const fill = make("span", { className: "fill" });
    const steps = make("span", { className: "faint" });
    const node = make("li", { "data-stage": name }, make("span", { className: "track" }, fill), make("span", { className: "stage-words" }, make("span", {}, STAGE_WORDS[name]), steps));
    node.style.flexGrow = String(width);
    segments[name] = { node, fill, steps };
    list.append(node);
  }
  const update = (job) => {
    const shown = stagesOf(job);
    const at = shown.indexOf(job.stage);
    for (const [name, { node, fill, steps }] of Object.entries(segments)) {
      const place = shown.indexOf(name);
      const done = job.state === "completed" || job.state === "expired" || (at >= 0 && place < at);
      const now = place === at && at >= 0 && !done;
      node.hidden = place < 0;
      node.dataset.state = done ? "done" : now ? (ended(job) ? "stopped" : "now") : "todo";
      if (now) node.setAttribute("aria-current", "step");
      else node.removeAttribute("aria-current");
      fill.style.width = done ? "100%" : now && job.steps ? `${(100 * job.step) / job.steps}%` : "0";
      const took = job.stage_seconds?.[name];
      put(steps, now && job.steps > 1 ? `step ${job.step} of ${job.steps}` : done && took !== undefined ? duration(took) : "");
    }
  };
  return { node: list, update };
}

/** What to say of where it stands, in a line. */
function standing(job, now) {
  if (job.state === "queued") {
    if (job.queue_position === 0) return "Next in the queue";
    return job.queue_position > 0 ? `${job.queue_position} ${job.queue_position === 1 ? "job" : "jobs"} before it in the queue` : "Waiting in the queue";
  }
  if (job.state === "in_progress") {
    if (job.cancel_requested) return "Stops after this step";
    const again = job.attempt > 1 ? ` (attempt ${job.attempt})` : "";
    return `${STAGE_WORDS[job.stage] ?? "Starting"}${job.steps > 1 ? `, step ${job.step} of ${job.steps}` : ""}${again}`;
  }
  const took = job.started_at && job.finished_at ? ` after ${duration(job.finished_at - job.started_at)}` : "";
  const words = { completed: "Made", failed: "Failed", cancelled: "Cancelled", expired: "Made" }[job.state];
  return `${words}${job.state === "completed" || job.state === "expired" ? took.replace("after", "in") : took}`;
}

/** The panel of one job. `actions`: reuse(job), removed(job), changed(job), announce(text). */
export function createJobView(first, actions) {
  let job = first;
  const life = new AbortController();
  const loaded = {};
  const head = make("div", { className: "job-head" });
  const place = make("span", { className: "standing" });
  const clock = make("span", { className: "faint clock" });
  const percent = make("span", { className: "percent" });
  const bar = createBar();
  const meter = make("div", { className: "meter", role: "progressbar", "aria-label": "Progress of the whole job", "aria-valuemin": 0, "aria-valuemax": 100 }, make("div", { className: "meter-line" }, percent, place, clock));
  const progress = make("div", { className: "progress" }, meter, bar.node);
  const notice = make("div", { className: "notice", hidden: true });
  const player = createPlayer();
  const prompt = make("h2", { className: "prompt" }, job.request.prompt);
  const rewritten = make("p", {});
  const rewriteNote = make("summary", {}, "Rewritten prompt");
  const rewrittenBox = make("details", { className: "rewritten", hidden: true }, rewriteNote, rewritten);
  const facts = make("dl", { className: "facts" });
  const problem = make("p", { className: "message bad", role: "alert", hidden: true });

  const cancel = button("close", "Cancel", { className: "quiet danger" });
  const download = button("download", "Download");
  const curl = button("terminal", "Copy as curl");
  const again = button("again", "Use again", { title: "Put these settings into the form" });
  const remove = button("bin", "Delete", { className: "quiet danger" });
  const node = make("article", { className: "job", "data-job": job.id }, make("div", { className: "job-top" }, head, make("div", { className: "actions" }, cancel, download, curl, again, remove)), prompt, progress, notice, player.node, problem, rewrittenBox, facts);

  const trouble = (error) => {
    if (life.signal.aborted) return;
    problem.hidden = false;
    put(problem, error.message);
  };
  const act = async (node_, work) => {
    node_.disabled = true;
    problem.hidden = true;
    try {
      await work();
    } catch (error) {
      trouble(error);
    } finally {
      node_.disabled = false;
    }
  };

  cancel.addEventListener("click", () => act(cancel, async () => actions.changed(await cancelJob(job.id))));
  again.addEventListener("click", () => actions.reuse(job));
  curl.addEventListener("click", () => act(curl, async () => {
    const command = curlCommand(job, location.origin, Boolean(getKey()));
    const words = curl.querySelector("span");
    try {
      await navigator.clipboard.writeText(command);
      put(words, "Copied");
      actions.announce("Command copied");
      setTimeout(() => put(words, "Copy as curl"), 2000);
    } catch {
      showCommand(command); // no clipboard without HTTPS or permission: let it be copied by hand
    }
  }));
  function showCommand(command) {
    const area = make("textarea", { className: "command", readOnly: true, rows: command.split("\n").length, value: command, "aria-label": "Command" });
    node.querySelector(".command")?.remove();
    problem.before(area);
    area.select();
  }
  download.addEventListener("click", () => act(download, async () => {
    const url = loaded.result ?? (await fileUrl(job.links.video, life.signal));
    const link = make("a", { href: url, download: `${job.id}.${job.request.kind === "image" ? "png" : "mp4"}` });
    link.click();
    if (url !== loaded.result) setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }));
  let sure = null;
  remove.addEventListener("click", () => {
    const words = remove.querySelector("span");
    if (sure === null) {
      put(words, "Really delete?");
      sure = setTimeout(() => ((sure = null), put(words, "Delete")), 4000);
      return;
    }
    clearTimeout(sure);
    sure = null;
    put(words, "Delete");
    act(remove, async () => {
      try {
        await call(`/jobs/${job.id}`, { method: "DELETE" });
      } catch (error) {
        if (!(error instanceof ApiError && error.status === 404)) throw error;
      }
      actions.removed(job);
    });
  });

  /** Fetches a file once for each attempt that made it, and shows it in its pane. */
  async function load(name, link, label, note) {
    const mark = `${link}#${job.attempt}`;
    if (!link || loaded[`${name}-mark`] === mark) return;
    loaded[`${name}-mark`] = mark;
    try {
      const url = await fileUrl(link, life.signal);
      if (life.signal.aborted) return URL.revokeObjectURL(url);
      loaded[name] = url;
      problem.hidden = true;
      player.show(name, { url, image: job.request.kind === "image", label, note });
    } catch (error) {
      loaded[`${name}-mark`] = null; // the next view of the job tries again
      if (error instanceof Offline) return;
      if (!(error instanceof ApiError && [404, 409, 410].includes(error.status) && !ended(job))) trouble(error);
    }
  }
  function showFiles() {
    const { resolved = {}, links = {} } = job;
    const refines = resolved.refine !== false;
    player.setFps(resolved.fps);
    player.shape(resolved.width_px, resolved.height_px);
    const size = (width, height) => (width && height ? `${width}×${height}` : "");
    const live = !ended(job);
    if (refines && links.preview && job.state !== "expired") load("base", links.preview, "Base", size(resolved.base_width_px, resolved.base_height_px));
    if (links.video && job.state === "completed") load("result", links.video, refines ? "Refined" : "Result", sizeOf(job));
    if (live) {
      const first = job.state === "queued" ? "Waits for its turn" : "Being made";
      if (refines) player.expect("base", "Base", first);
      player.expect("result", refines ? "Refined" : "Result", !refines ? first : links.preview ? "Being refined" : "Follows the base result");
    }
    if (!live && (job.state === "expired" || !links.preview || !refines)) player.hide("base");
    if (!live && (job.state === "expired" || !links.video)) player.hide("result");
  }

  function showFacts() {
    const { resolved = {}, request } = job;
    const image = request.kind === "image";
    const round = (value) => Math.round(value * 1000) / 1000;
    const steps = resolved.steps ? `${resolved.steps}${resolved.refine !== false && resolved.refiner_steps ? ` + ${resolved.refiner_steps} refining` : ""}` : request.steps;
    const when = (time) => new Date(time * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
    const rows = [
      ["Seed", resolved.seed ?? request.seed],
      ["Size", sizeOf(job)],
      ["Length", image || !resolved.frames ? null : `${round(resolved.frames / resolved.fps)} s, ${resolved.frames} frames at ${resolved.fps} fps`],
      ["Style", request.style],
      ["Steps", steps],
      ["Guidance", resolved.guidance_scale ?? request.guidance_scale],
      ["Negative", request.negative_prompt],
      ["Begins with", [request.first_frame && "a first frame", request.last_frame && "a last frame"].filter(Boolean).join(", ")],
      ["Priority", request.priority !== "normal" ? request.priority : null],
      ["Asked", when(job.created_at)],
      ["Kept until", job.expires_at && job.state === "completed" ? when(job.expires_at) : null],
      ["Job", job.id],
    ].filter(([, value]) => value !== null && value !== undefined && value !== "");
    const written = JSON.stringify(rows);
    if (facts.dataset.written === written) return;
    facts.dataset.written = written;
    facts.replaceChildren(...rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  }

  function showNotice() {
    const { error } = job;
    const texts = {
      failed: error ? [error.message, error.code] : ["The job failed and does not say why.", null],
      cancelled: ["The job was cancelled; it made no result.", null],
      expired: ["The files are deleted. “Use again” makes them anew, with the same seed.", null],
    };
    const [text, code] = texts[job.state] ?? [null, null];
    notice.hidden = !text;
    notice.dataset.state = job.state;
    if (text && notice.dataset.text !== text) {
      notice.dataset.text = text;
      notice.replaceChildren(make("p", {}, text), ...(code ? [make("code", {}, code)] : []));
    }
  }

  function tick() {
    const now = serverNow();
    let text = "";
    if (job.state === "queued") text = `waiting for ${duration(now - job.created_at)}`;
    if (job.state === "in_progress" && job.started_at) {
      const spent = now - job.started_at;
      text = duration(spent);
      if (job.progress > 0.08 && spent > 2 && job.attempt <= 1 && !job.cancel_requested) text += `, about ${duration((spent * (1 - job.progress)) / job.progress)} left`;
    }
    put(clock, text);
  }

  let said = "";
  function update(view) {
    job = view;
    const live = !ended(job);
    head.replaceChildren(badge(job));
    put(place, standing(job));
    const share = Math.floor(100 * job.progress);
    put(percent, live && job.state === "in_progress" ? `${share} %` : "");
    meter.setAttribute("aria-valuenow", String(share));
    meter.setAttribute("aria-valuetext", `${share} %, ${standing(job)}`);
    progress.dataset.state = job.state;
    bar.update(job);
    cancel.hidden = !live;
    cancel.disabled = Boolean(job.cancel_requested);
    remove.hidden = live;
    download.hidden = job.state !== "completed";
    const { prompt: finalPrompt } = job.resolved ?? {};
    const { rewritten_by: by, rewrite_fell_back: why } = job.resolved ?? {};
    rewrittenBox.hidden = !finalPrompt || (finalPrompt === job.request.prompt && !why);
    put(rewriteNote, why ? "The prompt was not rewritten" : by ? "Rewritten prompt" : "Prompt as the model got it");
    put(rewritten, why ? `${why}. Used: ${finalPrompt}` : (finalPrompt ?? ""));
    tick();
    showNotice();
    showFacts();
    showFiles();
    const stage = job.state === "in_progress" ? `${STAGE_WORDS[job.stage] ?? "Started"}` : standing(job);
    if (said && said !== stage) actions.announce(stage);
    said = stage;
  }
  const timer = setInterval(tick, 500);
  update(job);
  return {
    node, update, trouble,
    get job() {
      return job;
    },
    close() {
      life.abort();
      clearInterval(timer);
      clearTimeout(sure);
      player.close();
    },
  };
}
