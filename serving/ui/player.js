/* Base and refined result side by side: two videos that keep one time, or two pictures, enlarged as one likes. */

import { button, icon, make, put } from "./dom.js";

const SMALL_PX = 400; // narrower than this is shown with hard pixels: blurring hides what the model drew
const ZOOMS = [["fit", "Fit"], ["1", "1×"], ["2", "2×"], ["4", "4×"], ["8", "8×"]];
const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** `show(name, {url, image, label, note})` with name "base" or "result"; `expect(name, words)` for one still to come. */
export function createPlayer() {
  const panes = {};
  for (const name of ["base", "result"]) {
    const frame = make("div", { className: "frame" });
    const label = make("strong", {});
    const note = make("span", { className: "faint" });
    panes[name] = { node: make("figure", { className: "pane", "data-pane": name, hidden: true }, make("figcaption", {}, label, note), frame), frame, label, note, media: null, url: null };
  }
  const play = button("pause", "", { className: "quiet round", "aria-label": "Pause" });
  const back = button("back", "", { "aria-label": "One frame back", title: "One frame back" });
  const next = button("next", "", { "aria-label": "One frame on", title: "One frame on" });
  const seek = make("input", { type: "range", className: "seek", min: 0, max: 1000, step: 1, value: 0, "aria-label": "Time" });
  const time = make("span", { className: "time" });
  const zoom = make("select", { "aria-label": "Zoom" }, ...ZOOMS.map(([value, words]) => make("option", { value }, words)));
  const wipe = make("input", { type: "checkbox" });
  const wipeAt = make("input", { type: "range", min: 0, max: 100, value: 50, className: "wipe-at", "aria-label": "Where the base result ends and the refined one begins", hidden: true });
  const wipeLine = make("label", { className: "check", hidden: true }, wipe, "Overlay");
  const motion = make("div", { className: "motion" }, back, play, next, seek, time);
  const bar = make("div", { className: "controls", hidden: true }, motion, make("div", { className: "looks" }, wipeLine, zoom));
  const stage = make("div", { className: "panes" }, panes.base.node, panes.result.node);
  const node = make("div", { className: "player" }, stage, wipeAt, bar);
  let fps = 24;
  let paused = calm.matches;

  const videos = () => Object.values(panes).map((pane) => pane.media).filter((media) => media instanceof HTMLVideoElement);
  const main = () => videos().at(-1);

  function showPlaying() {
    play.replaceChildren(icon(paused ? "play" : "pause"));
    play.setAttribute("aria-label", paused ? "Play" : "Pause");
    play.title = paused ? "Play" : "Pause";
  }
  /** One clock: the result's. The base follows it; neither loops by itself, so they begin each round together. */
  function align(at) {
    const lead = main();
    const target = at ?? lead?.currentTime ?? 0;
    for (const video of videos()) {
      if (Math.abs(video.currentTime - target) > (at === undefined ? 0.06 : 1e-4)) video.currentTime = Math.min(target, video.duration || target);
    }
  }
  function run() {
    showPlaying();
    for (const video of videos()) {
      if (paused) video.pause();
      else video.play().catch(() => {});
    }
  }
  const jump = (at) => {
    const length = main()?.duration || 0;
    align(Math.min(Math.max(at, 0), Math.max(0, length - 0.5 / fps)));
  };
  function tick() {
    const lead = main();
    if (node.isConnected && lead && lead.readyState >= 2) {
      if (!paused && lead.ended) {
        align(0);
        run();
      } else if (!paused && !lead.paused) {
        align();
      }
      if (document.activeElement !== seek || !paused) seek.value = String(Math.round((1000 * lead.currentTime) / (lead.duration || 1)));
      put(time, `${lead.currentTime.toFixed(1)} / ${(lead.duration || 0).toFixed(1)} s`);
      seek.setAttribute("aria-valuetext", `${lead.currentTime.toFixed(1)} seconds`);
    }
    requestAnimationFrame(tick);
  }

  function natural(media) {
    return media instanceof HTMLVideoElement ? [media.videoWidth, media.videoHeight] : [media?.naturalWidth ?? 0, media?.naturalHeight ?? 0];
  }
  /** Both panes have the displayed size of the larger result, so that what is compared is the picture, not its size. */
  function layout() {
    const sizes = Object.values(panes).map((pane) => natural(pane.media));
    const width = Math.max(...sizes.map(([one]) => one));
    const both = Boolean(panes.base.media && panes.result.media);
    const known = sizes.find(([one]) => one > 0);
    stage.classList.toggle("both", !panes.base.node.hidden && !panes.result.node.hidden);
    stage.classList.toggle("wipe", both && wipe.checked);
    stage.classList.toggle("pixelated", width > 0 && (width <= SMALL_PX || zoom.value === "8" || zoom.value === "4"));
    stage.classList.toggle("zoomed", zoom.value !== "fit");
    wipeLine.hidden = !both;
    wipeAt.hidden = !(both && wipe.checked);
    motion.hidden = videos().length === 0;
    bar.hidden = !panes.base.media && !panes.result.media;
    for (const pane of Object.values(panes)) {
      if (known) pane.frame.style.aspectRatio = `${known[0]} / ${known[1]}`;
      pane.frame.style.width = zoom.value === "fit" || !width ? "" : `${width * Number(zoom.value)}px`;
      if (known) pane.frame.style.setProperty("--ratio", String(known[0] / known[1]));
    }
    if (panes.result.media) panes.result.media.style.clipPath = both && wipe.checked ? `inset(0 0 0 ${wipeAt.value}%)` : "";
  }

  function empty(pane) {
    if (pane.url) URL.revokeObjectURL(pane.url);
    Object.assign(pane, { media: null, url: null });
    pane.frame.replaceChildren();
  }

  play.addEventListener("click", () => ((paused = !paused), run()));
  back.addEventListener("click", () => ((paused = true), run(), jump((main()?.currentTime ?? 0) - 1 / fps)));
  next.addEventListener("click", () => ((paused = true), run(), jump((main()?.currentTime ?? 0) + 1 / fps)));
  seek.addEventListener("input", () => jump((Number(seek.value) / 1000) * (main()?.duration || 0)));
  for (const input of [zoom, wipe, wipeAt]) input.addEventListener("input", layout);
  calm.addEventListener("change", () => calm.matches && ((paused = true), run()));
  requestAnimationFrame(tick);

  return {
    node,
    setFps: (value) => (fps = value || 24),
    shape: (width, height) => {
      if (!(width && height)) return;
      for (const pane of Object.values(panes)) {
        pane.frame.style.aspectRatio = `${width} / ${height}`;
        pane.frame.style.setProperty("--ratio", String(width / height));
      }
    },
    has: (name) => Boolean(panes[name].media),
    /** A pane whose file is still being made. */
    expect(name, label, words) {
      const pane = panes[name];
      if (pane.media) return;
      put(pane.label, label);
      pane.node.hidden = false;
      if (pane.frame.textContent !== words) pane.frame.replaceChildren(make("p", { className: "expected" }, words));
      layout();
    },
    show(name, { url, image, label, note }) {
      const pane = panes[name];
      empty(pane);
      const what = `${label}${note ? `, ${note}` : ""}`;
      const facts = image ? { src: url, alt: what } : { src: url, muted: true, playsInline: true, preload: "auto", "aria-label": what };
      const media = make(image ? "img" : "video", facts);
      media.addEventListener(image ? "load" : "loadedmetadata", layout);
      media.addEventListener("loadeddata", () => (align(main()?.currentTime ?? 0), run()));
      Object.assign(pane, { media, url });
      pane.frame.replaceChildren(media);
      put(pane.label, label);
      put(pane.note, note ?? "");
      pane.node.hidden = false;
      layout();
      showPlaying();
    },
    hide(name) {
      empty(panes[name]);
      panes[name].node.hidden = true;
      layout();
    },
    close: () => Object.values(panes).forEach(empty),
  };
}
