// Requests to the server, and its errors in words.

const KEY = "api-key";
const TIMEOUT_MS = 5000; // of a request that takes no time
const ANSWER_TIMEOUT_MS = 130000; // of a POST: a model may have to be loaded first

const WORDS = {
  blank: "The picture is blank: nothing stands out from the background.",
  not_an_image: "That file cannot be read as a picture.",
  too_many_pixels: "The picture has too many pixels.",
  too_large: "The file is too large.",
  too_many_files: "Too many pictures at once.",
  full: "The server cannot store more corrections.",
  not_kept: "The server could not store the correction.",
  busy: "The server is busy.",
  unknown_model: "That model no longer exists.",
  unauthorised: "The server needs an API key.",
  gone: "The server cannot be reached.",
};

/** An error: its code, a message for people, and the ms to wait before a retry. */
export class ApiError extends Error {
  constructor(code, message, wait = 0) {
    super(WORDS[code] ?? message);
    this.code = code;
    this.wait = wait;
  }
}

/** The API key, in localStorage if that is allowed; a header can hold plain characters only. */
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

/** The response of a path and its JSON; throws ApiError. */
async function fetched(path, { signal, limit = TIMEOUT_MS, ...options } = {}) {
  const headers = { ...options.headers, ...(key.get() && { "X-API-Key": key.get() }) };
  const ends = AbortSignal.any([AbortSignal.timeout(limit), ...(signal ? [signal] : [])]);
  try {
    const response = await fetch(path, { ...options, headers, signal: ends, cache: "no-store" });
    return [response, await response.json()];
  } catch {
    throw new ApiError("gone");
  }
}

async function ask(path, options) {
  const [response, body] = await fetched(path, options);
  if (response.ok) return body;
  const { code = "gone", message = response.statusText } = body.error ?? {};
  throw new ApiError(code, message, 1000 * response.headers.get("Retry-After"));
}

/** The answer of /ready, also with status 503: it has the reason. */
export async function ready() {
  const [, body] = await fetched("ready");
  if (!body.status) throw new ApiError("gone");
  return body;
}

export const models = () => ask("models");
export const model = (name) => ask(`models/${encodeURIComponent(name)}`);

const named = (name) => (name ? `&model=${encodeURIComponent(name)}` : "");

const post = (path, body, signal, headers) =>
  ask(path, { method: "POST", body, headers, signal, limit: ANSWER_TIMEOUT_MS });

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

/** One request at a time, always for the newest drawing or picture. */
export class Newest {
  /** send(signal) returns a promise, or null with nothing to send; show() gets its result. */
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

  /** Abort the request in progress; its result is not shown. */
  drop() {
    this.age += 1;
    this.control?.abort();
  }
}
