/* The form: what the model can do fills it, what is typed leaves it as a request. */

import { ApiError, call, Offline } from "./api.js";
import { sameAgain } from "./curl.js";
import { button, byId, icon, make, put } from "./dom.js";

const MAX_SEED = 2 ** 31 - 1;
const PICTURES = { "image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WebP" };
const form = byId("form");
const field = (name) => form.elements.namedItem(name);
const random = (bound) => {
  const word = crypto.getRandomValues(new Uint32Array(1))[0];
  return Math.floor((word / 2 ** 32) * bound);
};
const hex = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

const frames = { first_frame: null, last_frame: null };
const drops = {};
let facts = {};
let maxPictureBytes = Infinity;
let countdown = null;
let attempt = { digest: "", key: "" };

/** One place for a picture: choose, drop or paste it, see it, take it away. */
function buildDrop(node, name, label) {
  const input = make("input", { type: "file", id: name, accept: Object.keys(PICTURES).join(","), className: "unseen" });
  const shown = make("img", { alt: "", hidden: true });
  const words = make("span", { className: "drop-words" }, icon("picture"), make("span", {}, label), make("small", {}, "drop or choose"));
  const area = make("label", { htmlFor: name, className: "drop-area" }, shown, words);
  const remove = button("close", "", { className: "quiet remove", "aria-label": `Remove the ${label.toLowerCase()}`, hidden: true });
  const set = (file) => {
    if (file && !(file.type in PICTURES)) {
      showError(`${file.name} is no ${Object.values(PICTURES).join(", ")} picture: save it as one of these.`);
      return;
    }
    if (file && file.size > maxPictureBytes) {
      showError(`${file.name} has ${Math.ceil(file.size / 1e6)} MB, the server takes ${Math.floor(maxPictureBytes / 1e6)}: save it smaller.`);
      return;
    }
    if (shown.src) URL.revokeObjectURL(shown.src);
    frames[name] = file;
    shown.hidden = remove.hidden = !file;
    words.hidden = Boolean(file);
    if (file) shown.src = URL.createObjectURL(file);
    else shown.removeAttribute("src");
    shown.alt = file ? `${label}: ${file.name}` : "";
    input.value = "";
    node.classList.toggle("filled", Boolean(file));
    byId("frames-note").hidden = facts.learned_first_frames !== false || !Object.values(frames).some(Boolean);
  };
  input.addEventListener("change", () => input.files[0] && set(input.files[0]));
  remove.addEventListener("click", () => (set(null), input.focus()));
  for (const kind of ["dragenter", "dragover"]) {
    node.addEventListener(kind, (event) => (event.preventDefault(), node.classList.add("over")));
  }
  for (const kind of ["dragleave", "drop"]) {
    node.addEventListener(kind, (event) => (event.preventDefault(), node.classList.remove("over")));
  }
  node.addEventListener("drop", (event) => event.dataTransfer.files[0] && set(event.dataTransfer.files[0]));
  node.append(input, area, remove);
  drops[name] = set;
}

/** What `GET /capabilities` says, put into choices, bounds and placeholders. */
export function applyFacts(told, limits) {
  facts = told;
  maxPictureBytes = limits.max_image_bytes;
  const kept = field("style").value;
  const titled = (name) => name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");
  field("style").replaceChildren(option("", "As prompted"), ...(told.styles ?? []).map((name) => option(name, titled(name))));
  field("style").value = kept;
  field("style").closest("div").hidden = !told.styles?.length; // a model of untagged captions knows none
  const bound = (name, least, most, usual) => {
    const input = field(name);
    if (least !== undefined) input.min = least;
    if (most !== undefined) input.max = most;
    if (usual !== undefined && usual !== null) input.placeholder = String(Math.round(usual * 100) / 100);
    if (least !== undefined && most !== undefined) input.title = `${least} to ${most}`;
  };
  bound("seconds", told.min_seconds, told.max_seconds, told.default_seconds);
  bound("steps", 1, told.max_steps, told.steps);
  bound("guidance_scale", 1, told.max_guidance_scale, told.guidance_scale);
  const rewrite = field("rewrite");
  rewrite.disabled = told.rewrites === false;
  if (rewrite.disabled) rewrite.checked = false;
  put(byId("rewrite-note"), rewrite.disabled ? "This server does not rewrite" : "In the words of the training captions");
  const levels = ["low", "normal", "high"];
  for (const radio of field("priority")) radio.disabled = levels.indexOf(radio.value) > levels.indexOf(limits.max_priority);
  const kinds = told.kinds ?? ["video", "image"];
  for (const radio of field("kind")) radio.disabled = !kinds.includes(radio.value);
  if (!kinds.includes(kind())) field("kind").value = kinds[0];
  showKind();
  const refine = field("refine");
  refine.disabled = !told.refiner;
  if (!told.refiner) refine.checked = false;
  put(byId("refine-note"), told.refiner ? "A second pass at the full size" : "This server has no refiner");
  fillSizes();
}

const option = (value, text) => make("option", { value }, text ?? value.replace("x", " × "));

/** The size that leaving it open means; "" where the server alone knows it. The base model's own sizes are not told. */
function usualSize() {
  const own = kind() === "image" ? facts.image_sizes : facts.sizes;
  const base = facts.refiner && !field("refine").checked;
  return !base && own?.[0] === facts.default_size ? (facts.default_size ?? "") : "";
}

/** The sizes that the server takes for this kind, with or without the refiner. */
function fillSizes() {
  const select = field("size_choice");
  const image = kind() === "image";
  const base = facts.refiner && !field("refine").checked;
  const most = image ? (base ? facts.max_base_image_pixels : facts.max_image_pixels) : base ? facts.max_base_pixels : facts.max_pixels;
  const pixels = (size) => size.split("x").reduce((width, height) => width * height);
  const usual = usualSize();
  const listed = ((image ? facts.image_sizes : facts.sizes) ?? []).filter((one) => one !== usual && pixels(one) <= most);
  const made = JSON.stringify([usual, listed]);
  if (select.dataset.made === made) return;
  select.dataset.made = made;
  const chosen = select.value;
  select.replaceChildren(option("", usual.replace("x", " × ") || "Default"), ...listed.map((one) => option(one)), option("custom", "Other …"));
  select.value = chosen === "custom" || listed.includes(chosen) ? chosen : "";
}

const kind = () => field("kind").value;
function showKind() {
  form.dataset.kind = kind();
  for (const node of form.querySelectorAll(".video-only")) node.hidden = kind() === "image";
}
function showSize() {
  byId("custom-size").hidden = field("size_choice").value !== "custom";
}
function showSeed() {
  byId("seed-clear").hidden = field("seed").value === "";
}

/** The request as typed; fields left empty are left out, so that the server's defaults hold. */
function typed() {
  const number = (name) => (field(name).value === "" ? null : Number(field(name).value));
  const size = field("size_choice").value;
  const image = kind() === "image";
  const fields = {
    prompt: field("prompt").value.trim(),
    negative_prompt: field("negative_prompt").value.trim() || null,
    kind: kind(),
    size: size === "custom" ? `${byId("width").value}x${byId("height").value}` : size || null,
    seconds: image ? null : number("seconds"),
    seed: number("seed"),
    style: field("style").value || null,
    rewrite: field("rewrite").checked,
    refine: facts.refiner ? field("refine").checked : null,
    steps: number("steps"),
    guidance_scale: number("guidance_scale"),
    priority: field("priority").value,
  };
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
}

const pictures = () => (kind() === "image" ? [] : Object.entries(frames).filter(([, file]) => file));

/** What the browser can tell without asking: the first input that is out of its bounds. */
function firstInvalid() {
  if (!field("prompt").value.trim()) return [field("prompt"), "Say in the prompt what to show."];
  for (const input of form.querySelectorAll("input[type=number]")) {
    if (input.closest("[hidden]")) continue;
    const name = form.querySelector(`label[for="${input.id}"]`).textContent;
    if (input.closest("#custom-size") && !input.value) return [input, `${name}: give a number, or choose a size of the list.`];
    if (!input.validity.valid) return [input, `${name}: ${input.validationMessage}`];
  }
  return null;
}

export function showError(text, { input = null, seconds = 0 } = {}) {
  clearInterval(countdown);
  const generate = byId("generate");
  const line = byId("form-error");
  for (const node of form.querySelectorAll("[aria-invalid]")) node.removeAttribute("aria-invalid");
  generate.disabled = false;
  put(generate, "Generate");
  line.hidden = !text;
  put(line, text);
  if (input) {
    const advanced = input.closest("details");
    if (advanced) advanced.open = true;
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }
  if (seconds > 0) {
    const until = performance.now() + 1000 * seconds;
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      generate.disabled = left > 0;
      put(generate, left > 0 ? `Try again in ${left} s` : "Generate");
      if (left <= 0) clearInterval(countdown);
    };
    countdown = setInterval(tick, 250);
    tick();
  }
}

/** Posts what is typed. The same key goes with the same request until it is answered, so a second try makes no second job. */
async function submit(onJob, onRefused) {
  const wrong = firstInvalid();
  if (wrong) return showError(wrong[1], { input: wrong[0] });
  showError("");
  const fields = typed();
  const files = pictures();
  const digest = JSON.stringify([fields, files.map(([name, file]) => [name, file.name, file.size, file.lastModified])]);
  if (attempt.digest !== digest) attempt = { digest, key: hex() };
  const generate = byId("generate");
  generate.disabled = true;
  put(generate, "Sending …");
  const headers = { "Idempotency-Key": attempt.key };
  let body = JSON.stringify(fields);
  if (files.length) {
    body = new FormData();
    for (const [name, value] of Object.entries(fields)) body.append(name, String(value));
    for (const [name, file] of files) body.append(name, file, file.name);
  } else {
    headers["Content-Type"] = "application/json";
  }
  try {
    const response = await call("/generate", { method: "POST", headers, body });
    attempt = { digest: "", key: "" };
    showError("");
    onJob(await response.json());
  } catch (error) {
    if (error instanceof ApiError) {
      if (error.status < 500) attempt = { digest: "", key: "" };
      const name = { size: "size_choice" }[error.param] ?? error.param;
      const input = name && field(name) instanceof HTMLElement && !field(name).closest("[hidden]") ? field(name) : null;
      showError(error.message, { input, seconds: error.status === 429 ? (error.retryAfter_s ?? 5) : 0 });
      onRefused(error);
    } else if (error instanceof Offline) {
      showError(error.message);
    } else {
      showError("");
      throw error;
    }
  }
}

/** Puts a job's request back into the form, with the seed it had. Pictures are not kept by the page. */
export function reuse(job) {
  const again = sameAgain(job);
  const { request } = job;
  form.reset();
  Object.values(drops).forEach((set) => set(null));
  field("kind").value = request.kind ?? "video";
  field("priority").value = request.priority ?? "normal";
  field("prompt").value = request.prompt;
  field("negative_prompt").value = request.negative_prompt ?? "";
  field("seconds").value = request.seconds ?? "";
  field("seed").value = again.seed ?? "";
  field("style").value = request.style ?? "";
  field("steps").value = request.steps ?? "";
  field("guidance_scale").value = request.guidance_scale ?? "";
  field("rewrite").checked = request.rewrite !== false;
  field("refine").checked = Boolean(facts.refiner) && request.refine !== false;
  const [width, height] = (request.size ?? "").split("x");
  fillSizes();
  const listed = [...field("size_choice").options].some((one) => one.value === request.size);
  field("size_choice").value = request.size && request.size !== usualSize() ? (listed ? request.size : "custom") : "";
  byId("width").value = listed ? "" : (width ?? "");
  byId("height").value = listed ? "" : (height ?? "");
  form.querySelector("details").open = Boolean(request.steps || request.guidance_scale || request.negative_prompt);
  showKind(), showSize(), showSeed();
  const missing = ["first_frame", "last_frame"].filter((name) => request[name]);
  showError(missing.length ? "This job began or ended with a picture: choose it again." : "");
  field("prompt").focus();
}

export function startForm(onJob, onRefused) {
  const [first, last] = form.querySelectorAll(".drop");
  buildDrop(first, "first_frame", "First frame");
  buildDrop(last, "last_frame", "Last frame");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!byId("generate").disabled) submit(onJob, onRefused);
  });
  form.addEventListener("change", () => (showKind(), fillSizes(), showSize()));
  form.addEventListener("input", showSeed);
  field("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type in PICTURES);
    if (!file || kind() === "image") return;
    event.preventDefault();
    drops[frames.first_frame ? "last_frame" : "first_frame"](file);
  });
  const advanced = form.querySelector("details");
  advanced.addEventListener("toggle", () => advanced.open && advanced.scrollIntoView({ block: "nearest" }));
  byId("seed-draw").addEventListener("click", () => ((field("seed").value = random(MAX_SEED + 1)), showSeed()));
  byId("seed-clear").addEventListener("click", () => ((field("seed").value = ""), showSeed(), field("seed").focus()));
  showKind(), showSize(), showSeed();
}
