// The server: its models, its answers, and what it says when it has none.

const KEY = "api-key";

const WORDS = {
  blank: "The picture is blank: nothing stands out from its ground.",
  not_an_image: "That file is no picture that can be read.",
  too_many_pixels: "The picture has too many pixels.",
  too_large: "The file is too large.",
  too_many_files: "Too many pictures at once.",
  busy: "The server is busy.",
  no_model: "The server has no model yet.",
  unknown_model: "That model is not there any more.",
  unauthorised: "The server wants an API key.",
  gone: "The server cannot be reached.",
};

/** An answer that is none: its code, words for a person, and how long to wait. */
export class Refused extends Error {
  constructor(code, message, wait = 0) {
    super(WORDS[code] ?? message);
    this.code = code;
    this.wait = wait;
  }
}

export const key = {
  get: () => localStorage.getItem(KEY) ?? "",
  set: (value) => localStorage.setItem(KEY, value),
};

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key.get() && { "X-API-Key": key.get() }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch {
    throw new Refused("gone");
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  if (path === "ready") return body;
  const { code = "gone", message = response.statusText } = body.error ?? {};
  throw new Refused(code, message, 1000 * response.headers.get("Retry-After"));
}

export const ready = () => ask("ready");
export const models = () => ask("models");
export const model = (name) => ask(`models/${encodeURIComponent(name)}`);

const query = (name) => `?top=3&view=true${name ? `&model=${encodeURIComponent(name)}` : ""}`;

export const predict = (picture, name) =>
  ask(`predict${query(name)}`, {
    method: "POST",
    body: picture,
    headers: { "Content-Type": "application/octet-stream" },
  });

export function batch(files, name) {
  const body = new FormData();
  for (const file of files) body.append("files", file, file.name || "picture");
  return ask(`predict/batch${query(name)}`, { method: "POST", body });
}

export function feedback(picture, label) {
  const body = new FormData();
  body.append("file", picture, "picture");
  body.append("label", label);
  return ask("feedback", { method: "POST", body });
}

/** One request at a time, always of what is there to be asked by then. */
export class Newest {
  /** send() gives a promise, or null where there is nothing to ask; show() gets what came of it. */
  constructor(send, show) {
    this.send = send;
    this.show = show;
    this.age = 0;
    this.again = this.running = false;
  }

  async ask() {
    this.again = true;
    if (this.running) return;
    this.running = true;
    while (this.again) {
      this.again = false;
      const age = this.age;
      const answer = await this.send()?.catch((error) => error);
      if (age !== this.age || !answer) continue;
      this.show(answer);
      if (answer.wait) {
        await new Promise((done) => setTimeout(done, answer.wait));
        this.again = true;
      }
    }
    this.running = false;
  }

  /** What is under way belongs to something that is gone: it will not be shown. */
  drop() {
    this.age += 1;
  }
}
