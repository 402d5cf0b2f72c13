// The server: its models, its answers, and what it says when it has none.

const KEY = "api-key";
const LOOK_MS = 5000; // longest wait for what takes no time
const ANSWER_MS = 130000; // and for an answer: a model may have to be loaded first

const WORDS = {
  blank: "The picture is blank: nothing stands out from its ground.",
  not_an_image: "That file is no picture that can be read.",
  too_many_pixels: "The picture has too many pixels.",
  too_large: "The file is too large.",
  too_many_files: "Too many pictures at once.",
  full: "The server keeps no more corrections.",
  busy: "The server is busy.",
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

/** Kept by the browser, if it lets us; a header can only hold plain characters. */
export const key = {
  value: "",
  get() {
    try {
      this.value ||= localStorage.getItem(KEY) ?? "";
    } catch {}
    return this.value;
  },
  set(text) {
    this.value = text.replace(/[^\x21-\x7e]/g, "");
    try {
      localStorage.setItem(KEY, this.value);
    } catch {}
  },
};

export const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** What a path gives as JSON, and whether it is an answer; throws Refused. */
async function fetched(path, { signal, limit = LOOK_MS, ...options } = {}) {
  const headers = { ...options.headers, ...(key.get() && { "X-API-Key": key.get() }) };
  const ends = AbortSignal.any([AbortSignal.timeout(limit), ...(signal ? [signal] : [])]);
  try {
    const response = await fetch(path, { ...options, headers, signal: ends, cache: "no-store" });
    return [response, await response.json()];
  } catch {
    throw new Refused("gone");
  }
}

async function ask(path, options) {
  const [response, body] = await fetched(path, options);
  if (response.ok) return body;
  const { code = "gone", message = response.statusText } = body.error ?? {};
  throw new Refused(code, message, 1000 * response.headers.get("Retry-After"));
}

/** Also says why there is no model. */
export async function ready() {
  const [, body] = await fetched("ready");
  if (!body.status) throw new Refused("gone");
  return body;
}

export const models = () => ask("models");
export const model = (name) => ask(`models/${encodeURIComponent(name)}`);

const named = (name) => (name ? `&model=${encodeURIComponent(name)}` : "");

const post = (path, body, signal, headers) =>
  ask(path, { method: "POST", body, headers, signal, limit: ANSWER_MS });

export const predict = (picture, name, signal) =>
  post(`predict?top=3&view=true${named(name)}`, picture, signal, {
    "Content-Type": "application/octet-stream",
  });

export function batch(files, name) {
  const body = new FormData();
  for (const file of files) body.append("files", file, file.name || "picture");
  return post(`predict/batch?top=3&view=true${named(name)}`, body);
}

export function feedback(picture, label, name) {
  const body = new FormData();
  body.append("file", picture, "picture");
  body.append("label", label);
  return post(`feedback?${named(name)}`, body);
}

/** One request at a time, always of what is there to be asked by then. */
export class Newest {
  /** send(signal) gives a promise, or null where there is nothing to ask; show() what came of it. */
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
    try {
      while (this.again) {
        this.again = false;
        const { age } = this;
        this.control = new AbortController();
        const answer = await this.send(this.control.signal)?.catch((error) => error);
        if (age !== this.age || !answer) continue;
        this.show(answer);
        if (answer.wait) {
          await pause(answer.wait);
          this.again = true;
        }
      }
    } finally {
      this.running = false;
    }
  }

  /** What is under way belongs to something that is gone: it ends, and will not be shown. */
  drop() {
    this.age += 1;
    this.control?.abort();
  }
}
