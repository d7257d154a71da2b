/* The jobs of this server, newest first: thumbnails, states, older ones on demand. */

import { ApiError, fileUrl, getJson, serverNow } from "./api.js";
import { ago, badge, byId, ended, icon, later, make, put, sizeOf } from "./dom.js";

const PAGE = 12;
const UNENDED = "/jobs?limit=100&state=queued&state=in_progress";

/** `actions`: choose(id). Rows live in `jobs`, by id. */
export function createHistory(actions) {
  const list = byId("jobs");
  const jobs = new Map();
  const cards = new Map();
  const pictures = new Map();
  const unended = new Map(); // id -> state, of all that wait or run, shown or not
  let chosen = null;
  let older = false;
  let last = null; // id of the oldest row of the pages read so far; rows that another filter brought may lie behind it

  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) picture(target.dataset.job);
    }
  }, { rootMargin: "200px" });

  async function picture(id) {
    const card = cards.get(id);
    const job = jobs.get(id);
    if (!card || pictures.has(id) || job?.state !== "completed") return;
    pictures.set(id, null);
    try {
      const url = await fileUrl(job.request.kind === "image" ? job.links.video : `/v1/videos/${id}/content?variant=thumbnail`);
      if (cards.get(id) !== card) return URL.revokeObjectURL(url);
      seen.unobserve(card.open);
      pictures.set(id, url);
      card.thumb.replaceChildren(make("img", { src: url, alt: "" }));
    } catch {
      if (cards.get(id) === card) pictures.delete(id); // it is watched on: when it comes into view again, so does its picture
    }
  }

  function card(job) {
    const thumb = make("span", { className: "thumb" }, icon(job.request.kind === "image" ? "picture" : "film"));
    const state = make("span", {});
    const facts = make("span", { className: "faint" });
    const fill = make("span", { className: "thin" }, make("span", {}));
    const open = make("button", { type: "button", className: "card", "data-job": job.id }, thumb, make("span", { className: "card-prompt" }, job.request.prompt), make("span", { className: "card-line" }, state, facts), fill);
    open.addEventListener("click", () => actions.choose(job.id));
    return { node: make("li", {}, open), open, thumb, state, facts, fill };
  }

  function update(told) {
    const job = later(jobs.get(told.id), told);
    jobs.set(job.id, job);
    if (ended(job)) unended.delete(job.id);
    else unended.set(job.id, job.state);
    const row = cards.get(job.id) ?? card(job);
    if (!cards.has(job.id)) cards.set(job.id, row);
    row.state.replaceChildren(badge(job));
    put(row.facts, [sizeOf(job), ago(job.created_at, serverNow())].filter(Boolean).join(" · "));
    row.fill.hidden = ended(job);
    row.fill.firstChild.style.width = `${100 * job.progress}%`;
    if (job.id === chosen) row.open.setAttribute("aria-current", "true");
    else row.open.removeAttribute("aria-current");
    if (job.state === "completed" && !pictures.has(job.id)) seen.observe(row.open);
    if (job.state === "expired" && pictures.get(job.id)) drop(job);
  }
  function drop(job) {
    if (pictures.get(job.id)) URL.revokeObjectURL(pictures.get(job.id));
    pictures.delete(job.id);
    cards.get(job.id)?.thumb.replaceChildren(icon(job.request.kind === "image" ? "picture" : "film"));
  }

  function place() {
    const wanted = byId("filter").value;
    const rows = [...jobs.values()].filter((job) => !wanted || job.state === wanted);
    rows.sort((a, b) => b.created_at - a.created_at || (a.id < b.id ? 1 : -1));
    rows.forEach((job, at) => {
      const { node } = cards.get(job.id);
      if (list.children[at] !== node) list.insertBefore(node, list.children[at] ?? null);
    });
    while (list.children.length > rows.length) list.lastChild.remove();
    byId("no-jobs").hidden = rows.length > 0;
    put(byId("no-jobs"), wanted ? "No job in this state." : "Jobs appear here, and stay until the server forgets them.");
    byId("more").hidden = !older;
    const count = (state) => [...unended.values()].filter((one) => one === state).length;
    const waiting = count("queued");
    const running = count("in_progress");
    put(byId("queue-line"), waiting + running ? [running && `${running} running`, waiting && `${waiting} queued`].filter(Boolean).join(", ") : "");
  }

  function remove(id) {
    const job = jobs.get(id);
    if (!job) return;
    drop(job);
    jobs.delete(id);
    unended.delete(id);
    seen.unobserve(cards.get(id).open);
    cards.get(id).node.remove();
    cards.delete(id);
    place();
  }

  async function page(after) {
    const state = byId("filter").value;
    const query = new URLSearchParams({ limit: String(PAGE), order: "desc", ...(after ? { after } : {}), ...(state ? { state } : {}) });
    return getJson(`/jobs?${query}`);
  }

  /** What waits and runs, as the server says: rows that no page shows any more would stay as they were seen last. */
  async function recount() {
    const { data, has_more: more } = await getJson(UNENDED);
    unended.clear();
    for (const job of data) {
      unended.set(job.id, job.state);
      if (jobs.has(job.id)) update(job);
    }
    const stale = more ? [] : [...jobs.values()].filter((job) => !ended(job) && !unended.has(job.id));
    for (const { id } of stale) {
      try {
        update(await getJson(`/jobs/${id}`));
      } catch (error) {
        if (!(error instanceof ApiError && error.status === 404)) throw error;
        if (id !== chosen) remove(id);
      }
    }
  }

  return {
    jobs,
    remove,
    busy: () => unended.size > 0,
    /** Takes a view in, and gives back the latest one there is. */
    update: (job) => (update(job), place(), jobs.get(job.id)),
    choose(id) {
      chosen = id;
      jobs.forEach(update);
    },
    /** The newest page; what is gone from it on the server goes here too. */
    async refresh() {
      const { data, has_more: more } = await page(null);
      const state = byId("filter").value;
      const ids = new Set(data.map((job) => job.id));
      const reaches = more ? data.at(-1).created_at : -Infinity;
      for (const job of [...jobs.values()]) {
        if (!ids.has(job.id) && job.created_at > reaches && (!state || job.state === state) && job.id !== chosen) remove(job.id);
      }
      if (jobs.size <= PAGE) older = more;
      if (jobs.size <= PAGE || last === null) last = data.at(-1)?.id ?? null;
      data.forEach(update);
      await recount();
      place();
    },
    async more() {
      const { data, has_more: further } = await page(last);
      older = further;
      last = data.at(-1)?.id ?? last;
      data.forEach(update);
      place();
    },
    /** The filter changed: whether there are older ones is to be found out anew. */
    async refilter() {
      older = false;
      place();
      const { data, has_more: further } = await page(null);
      older = further;
      last = data.at(-1)?.id ?? null;
      data.forEach(update);
      await recount();
      place();
    },
    clear() {
      [...jobs.keys()].forEach(remove);
      unended.clear();
      last = null;
      place();
    },
  };
}
