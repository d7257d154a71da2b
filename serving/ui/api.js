/* The server's API: JSON, errors as it words them, events read from a fetched stream, files as blobs.
   EventSource and <video src> cannot send the API key's header, so neither is used. */

const KEY = "waver.api-key";
const SILENCE_MS = 40_000; // the server sends at least a comment every 15 s
const BACKOFF_S = [0.5, 1, 2, 4, 8];

/** What the API refused. `retryAfter_s` where it says when to ask again. */
export class ApiError extends Error {
  constructor(status, { code = "", message = "", param = null } = {}, retryAfter_s = null) {
    super(message || `The server answered with status ${status}.`);
    Object.assign(this, { status, code, param, retryAfter_s });
  }
}

/** No answer at all. */
export class Offline extends Error {
  constructor() {
    super("The server does not answer. Start it, or check the connection; the page goes on by itself.");
  }
}

const listeners = new Set();
let offset_s = 0;

/** Called with true or false whenever the server is heard or not heard. */
export const onConnection = (listener) => listeners.add(listener);
/** The server's time, as near as its Date header tells it. */
export const serverNow = () => Date.now() / 1000 + offset_s;
export const getKey = () => sessionStorage.getItem(KEY) ?? "";
export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** The answer, whatever its status below 400; raises `ApiError` or `Offline`. */
export async function call(path, { method = "GET", headers = {}, body, signal, cache = "no-store" } = {}) {
  const key = getKey();
  let response;
  try {
    const all = key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
    response = await fetch(path, { method, headers: all, body, signal, cache, credentials: "omit" });
  } catch (error) {
    if (signal?.aborted) throw error;
    listeners.forEach((listener) => listener(false));
    throw new Offline();
  }
  listeners.forEach((listener) => listener(true));
  const date = Date.parse(response.headers.get("Date") ?? "") / 1000;
  if (Number.isFinite(date)) offset_s = Math.abs(date - Date.now() / 1000) > 3 ? date - Date.now() / 1000 : 0;
  if (response.ok) return response;
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    /* a proxy's page, perhaps: the status must do */
  }
  throw new ApiError(response.status, told, Number.isFinite(wait) ? wait : null);
}

export const getJson = async (path, options) => (await call(path, options)).json();

const sleep = (ms, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });

/** Messages of an event stream: {event, id, data}. */
async function* messages(response, heard) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    heard();
    text += value.replaceAll("\r", "");
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const message = { event: "message", id: null, data: [] };
      for (const line of part.split("\n")) {
        const [, field, content] = /^([a-z]*):? ?(.*)$/.exec(line) ?? [];
        if (field === "data") message.data.push(content);
        else if (field === "event" || field === "id") message[field] = content;
      }
      if (message.data.length) yield { ...message, data: message.data.join("\n") };
    }
  }
}

/** Ends a job that has not ended. (`DELETE /jobs/{id}` would delete one that was completed just before.) */
export async function cancelJob(id) {
  return (await call(`/jobs/${id}/cancel`, { method: "POST" })).json();
}

/** Every change of a job until it has ended. Broken streams are taken up again, with waits that grow. */
export async function follow(id, onJob, signal) {
  const over = (job) => !["queued", "in_progress"].includes(job.state);
  let last = null;
  let failures = 0;
  while (!signal.aborted) {
    const part = new AbortController();
    const stop = () => part.abort();
    signal.addEventListener("abort", stop, { once: true });
    let watchdog = setTimeout(stop, SILENCE_MS);
    const heard = () => (clearTimeout(watchdog), (watchdog = setTimeout(stop, SILENCE_MS)));
    try {
      const headers = last === null ? { Accept: "text/event-stream" } : { Accept: "text/event-stream", "Last-Event-ID": last };
      const response = await call(`/jobs/${id}/events`, { headers, signal: part.signal });
      for await (const message of response.body && response.status === 200 ? messages(response, heard) : []) {
        if (message.event === "deleted") throw new ApiError(404, { code: "not_found", message: "The job was deleted." });
        if (message.event !== "job") continue;
        last = message.id ?? last;
        failures = 0;
        const job = JSON.parse(message.data);
        if (signal.aborted) return;
        onJob(job);
        if (over(job)) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && error.status < 500 && error.status !== 429) throw error;
    } finally {
      clearTimeout(watchdog);
      signal.removeEventListener("abort", stop);
      part.abort();
    }
    await sleep(1000 * BACKOFF_S[Math.min(failures++, BACKOFF_S.length - 1)], signal);
    try {
      const job = signal.aborted ? null : await getJson(`/jobs/${id}`, { signal });
      if (job) onJob(job);
      if (job && over(job)) return;
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && error.status < 500 && error.status !== 429) throw error;
    }
  }
}

/** A file as a blob URL, which the caller revokes. */
export async function fileUrl(path, signal) {
  return URL.createObjectURL(await (await call(path, { signal })).blob());
}
