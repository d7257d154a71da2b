/* A job as a command line that makes the same file again. */

import { sizeOf } from "./dom.js";

const quote = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;

/** The fields of the request with everything resolved that the result depends on. A rewritten prompt is given as it was
    used: a language model might word it otherwise the next time. It has the words of the style in it already. */
export function sameAgain(job) {
  const { request, resolved = {} } = job;
  const image = request.kind === "image";
  const settled = request.rewrite !== false && Boolean(resolved.prompt);
  const fields = {
    prompt: settled ? resolved.prompt : request.prompt,
    negative_prompt: request.negative_prompt || null,
    kind: image ? "image" : null,
    size: sizeOf(job).replace("×", "x") || null,
    seconds: image ? null : request.seconds, // what was resolved is rounded to whole frames: asked again, it could fall out of bounds
    seed: resolved.seed ?? request.seed,
    style: settled ? null : request.style,
    rewrite: settled || request.rewrite === false ? false : null,
    refine: resolved.refine ?? request.refine,
    steps: resolved.steps ?? request.steps,
    guidance_scale: resolved.guidance_scale ?? request.guidance_scale,
  };
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null && value !== undefined && value !== ""));
}

/** The command. The key is never written into it: the shell takes it from WAVER_API_KEY. */
export function curlCommand(job, origin, withKey) {
  const image = job.request.kind === "image";
  const frames = ["first_frame", "last_frame"].filter((name) => job.request[name]);
  const fields = { ...sameAgain(job), wait: true };
  const parts = [`curl --fail-with-body ${quote(`${origin}/generate`)}`];
  if (withKey) parts.push(`-H "Authorization: Bearer $WAVER_API_KEY"`);
  if (frames.length) {
    // --form-string: a prompt that begins with @ or < is not taken for a file's name
    parts.push(...Object.entries(fields).map(([name, value]) => `--form-string ${quote(`${name}=${value}`)}`));
    parts.push(...frames.map((name) => `-F ${quote(`${name}=@${name}.png`)}`));
  } else {
    parts.push(`-H 'Content-Type: application/json'`, `-d ${quote(JSON.stringify(fields))}`);
  }
  parts.push(`-o ${job.id}.${image ? "png" : "mp4"}`);
  return parts.join(" \\\n  ");
}
