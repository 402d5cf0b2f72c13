// The page: sends the drawing or the chosen pictures to the server, and shows its answers.

import * as api from "./api.js";
import { Drawing } from "./draw.js";

const $ = (id) => document.getElementById(id);
const READY_POLL_MS = 5000; // between two polls of a server that is ready
const RETRY_MS = 1000; // and of one that is not
const STROKE_MS = 50; // between two requests during a stroke
const MAX_BARS = 10;
const MAX_PICTURES = 16; // of one request
const MAX_BYTES = 8e6; // of one request with several pictures

let classes = []; // of the described model
let described = ""; // the name of the model that the page describes
let answered = null; // the answer on the page, with its picture
let chosen = null; // the chosen picture, in place of the drawing

// --- requests ---

let sentAt = 0;
const newest = new api.Newest((signal) => {
  if (!chosen && drawing.empty) return null;
  sentAt = performance.now();
  const picture = chosen ?? drawing.png();
  return api.predict(picture, $("model").value, signal).then((answer) => ({ ...answer, picture }));
}, show);

const drawing = new Drawing($("canvas"), (done) => {
  $("words").setAttribute("aria-busy", String(!done)); // not read aloud during a stroke
  if (drawing.empty) {
    newest.drop();
    clearAnswer();
  } else if (done || performance.now() - sentAt > STROKE_MS) newest.ask();
});

/** Pictures that were chosen, dropped, pasted or photographed. */
function take(files) {
  const pictures = [...files];
  if (pictures.length > 1) takeMany(pictures);
  else if (pictures.length) choose(pictures[0]);
}

function choose(picture) {
  removePicture();
  newest.drop();
  drawing.clear();
  chosen = picture;
  drawing.off = true;
  $("picture").src = URL.createObjectURL(chosen);
  $("picture").hidden = false;
  clearAnswer();
  newest.ask();
}

function removePicture() {
  if (!chosen) return;
  URL.revokeObjectURL($("picture").src);
  $("picture").hidden = true;
  chosen = null;
  drawing.off = false;
}

// --- answers ---

/** "99.8%"; 100% and 0% only if they are exact. */
function percent(share) {
  if (share > 0.9995 && share < 1) return ">99.9%";
  if (share < 0.0005 && share > 0) return "<0.1%";
  return `${(100 * share).toFixed(share > 0 && share < 1 ? 1 : 0)}%`;
}

/** Whether the picture looks like no class, or no class is likely enough. */
function isUnsure({ uncertain, labels }) {
  return uncertain || labels?.length === 0;
}

function either(labels) {
  return labels.length > 4 ? `One of ${labels.length} classes` : labels.join(" or ");
}

function show(answer) {
  if (answer instanceof Error) {
    clearAnswer(handleError(answer));
    return;
  }
  answered = answer;
  state("ready");
  const { prediction, probability, probabilities, top, labels, view, model } = answer;
  const unsure = isUnsure(answer);
  $("class").textContent = prediction;
  $("class").classList.toggle("long", prediction.length > 2);
  $("class").classList.toggle("unsure", unsure);
  const others = top.slice(1).map(([name, share]) => `${name}\u00a0(${percent(share)})`);
  const several = labels?.length > 1 ? `${either(labels)}; most likely ` : "";
  const sure = unsure ? `Not sure; most like ${prediction}` : several + prediction;
  const then = others.length ? ` Then ${others.join(" and ")}.` : "";
  $("words").textContent = `${sure}, ${percent(probability)}.${then}`;
  const other = model === described ? "" : `, by ${model}`; // a canary, or a new model
  $("time").textContent = `${Math.round(performance.now() - sentAt)} ms${other}`;
  $("view").src = view;
  $("view").alt = "Your picture as the model sees it";
  bars(probabilities, prediction);
  $("right").hidden = !correcting || model !== described;
  if (other && model !== canary) poll();
}

/** Update the page for an error; returns its message. */
function handleError({ code, message }) {
  if (code === "busy") state("busy");
  if (code === "unauthorised") askKey();
  if (code === "gone") {
    state("gone");
    poll();
  }
  return message;
}

function clearAnswer(words = chosen || !drawing.empty ? "" : "Nothing drawn yet.") {
  answered = null;
  $("class").textContent = "–";
  $("class").classList.remove("unsure", "long");
  $("words").textContent = words;
  $("time").textContent = "\u00a0";
  $("view").removeAttribute("src");
  $("view").alt = "";
  $("right").hidden = true;
  bars({});
}

/** A bar for each class, or for the most likely of many. */
function bars(shares, best) {
  const given = Object.keys(shares);
  const all = given.every((name) => classes.includes(name)) ? classes : given;
  let names = all;
  if (all.length > MAX_BARS) {
    const likely = [...all].sort((a, b) => (shares[b] ?? 0) - (shares[a] ?? 0));
    names = all.filter((name) => likely.slice(0, MAX_BARS).includes(name));
  }
  const rows = $("bars").children;
  while (rows.length > names.length) rows[0].remove();
  while (rows.length < names.length) {
    const bar = document.createElement("li");
    bar.append(...["name", "track", "share"].map((kind) => part("span", kind)));
    bar.children[1].append(part("i"));
    $("bars").append(bar);
  }
  names.forEach((name, i) => {
    const [label, track, share] = rows[i].children;
    label.textContent = name;
    track.firstChild.style.transform = `scaleX(${shares[name] ?? 0})`;
    share.textContent = name in shares ? percent(shares[name]) : "";
    rows[i].classList.toggle("best", name === best);
  });
}

function part(tag, kind = "") {
  return Object.assign(document.createElement(tag), { className: kind });
}

// --- several pictures ---

let uploads = 0;

async function takeMany(files) {
  const upload = ++uploads;
  let waiting = files.map((file) => ({ file, line: row(file) }));
  let most = MAX_PICTURES;
  $("rows").replaceChildren(...waiting.map(({ line }) => line));
  $("many").hidden = false;
  $("many").scrollIntoView({ block: "nearest" });
  while (waiting.length) {
    $("count").textContent = `${files.length - waiting.length} of ${files.length} answered`;
    const some = waiting.slice(0, countFitting(waiting, most));
    const reply = await api.batch(some.map(({ file }) => file), $("model").value).catch((e) => e);
    if (upload !== uploads) return; // other pictures were chosen meanwhile
    if (reply.code === "too_many_files" && some.length > 1) {
      most = some.length >> 1;
      continue;
    }
    const words = reply.results ? "" : handleError(reply);
    const again = some.filter(({ line }, i) => {
      const answer = reply.results?.[i] ?? { error: { code: reply.code, message: words } };
      const busy = answer.error?.code === "busy";
      if (!busy) fill(line, answer);
      return busy;
    });
    waiting = [...waiting.slice(some.length), ...again];
    if (again.length) await api.pause(reply.wait || RETRY_MS);
  }
  $("count").textContent = `${files.length} of ${files.length} answered`;
}

/** The number of pictures that fit into one request. */
function countFitting(pictures, most) {
  let bytes = 0;
  const n = pictures.slice(0, most).findIndex(({ file }) => (bytes += file.size) > MAX_BYTES);
  return n < 0 ? most : Math.max(1, n);
}

function row(file) {
  const line = document.createElement("tr");
  const cells = ["picture", "seen", "file", "prediction", "top"].map((kind) => part("td", kind));
  const url = URL.createObjectURL(file);
  const thumbnail = Object.assign(new Image(64, 64), { alt: "", src: url });
  thumbnail.onload = () => URL.revokeObjectURL(url);
  thumbnail.onerror = () => {
    URL.revokeObjectURL(url);
    thumbnail.remove();
  };
  cells[0].append(thumbnail);
  cells[2].textContent = file.name || "picture";
  cells[3].textContent = "…";
  line.append(...cells);
  return line;
}

function fill(line, answer) {
  const [, view, , prediction, top] = line.children;
  if (answer.error) {
    const { code, message } = answer.error;
    prediction.textContent = "–";
    top.textContent = new api.ApiError(code, message).message;
    line.className = "refused";
    return;
  }
  view.append(Object.assign(new Image(56, 56), { alt: "", src: answer.view }));
  const set = answer.labels?.length > 1 ? either(answer.labels) : answer.prediction;
  prediction.textContent = isUnsure(answer) ? `${answer.prediction} (not sure)` : set;
  top.textContent = answer.top.map(([name, share]) => `${name}\u00a0${percent(share)}`).join(", ");
}

// --- corrections ---

function labels() {
  const buttons = classes.map((name) => {
    const button = Object.assign(part("button"), { type: "button", textContent: name });
    button.addEventListener("click", () => correct(name));
    return button;
  });
  $("labels").replaceChildren(...buttons);
}

async function correct(label) {
  const wrong = answered;
  const reply = await api.feedback(wrong.picture, label, wrong.model).catch((error) => error);
  if (wrong !== answered) return;
  const kept = `Kept as ${label}. Thank you.`;
  $("words").textContent = reply instanceof Error ? handleError(reply) : kept;
}

// --- the server ---

const STATES = {
  ready: "ready",
  busy: "busy",
  unavailable: "no model yet",
  gone: "not reachable",
};
let timer = 0;
let polls = 0;
let current = "";
let canary = "";
let correcting = false; // whether the server keeps corrections
let sample = ""; // a note, while the current model is the sample
let listed = "";

function state(kind) {
  $("state").dataset.state = kind;
  $("state").textContent = STATES[kind] ?? kind;
}

/** Get the state of the server and its models, now and from then on. */
async function poll() {
  clearTimeout(timer);
  const number = ++polls;
  const was = $("state").dataset.state;
  let kind = "gone";
  try {
    const answer = await api.ready();
    if (number !== polls) return; // a later poll is in progress
    kind = answer.status;
    current = answer.model ?? "";
    canary = answer.canary;
    correcting = Boolean(answer.feedback);
    sample = answer.sample ?? "";
    if (kind === "ready") await list();
    else {
      described = "";
      about(answer.reason);
    }
  } catch (error) {
    if (!error.code) throw error;
    if (error.code === "gone") kind = "gone"; // other errors: the next poll tries again
  } finally {
    if (number === polls) {
      state(kind);
      if (kind === "ready" && was !== "ready") newest.ask();
      timer = setTimeout(poll, kind === "ready" ? READY_POLL_MS : RETRY_MS);
    }
  }
}

async function list() {
  const { models } = await api.models();
  const names = JSON.stringify([current, models]);
  if (names !== listed) {
    const kept = $("model").value;
    const options = models.map(
      ({ name, dataset, network }) => new Option(`${network}, ${dataset}, ${name}`, name),
    );
    $("model").replaceChildren(new Option(`the current one (${current})`, ""), ...options.reverse());
    $("model").value = models.some(({ name }) => name === kept) ? kept : "";
    listed = names;
  }
  await describe();
}

/** Describe the model that answers; after a change, send the picture again. */
async function describe() {
  const name = $("model").value || current;
  if (name === described) return;
  newest.drop();
  clearAnswer();
  const record = await api.model(name);
  if (name !== ($("model").value || current)) return; // another model was chosen meanwhile
  described = name;
  ({ classes } = record.dataset);
  about(sample && name === current ? `${summary(record)}. Note: ${sample}.` : summary(record));
  const digits = classes.every((name) => /^\d$/.test(name));
  const drawn = record.dataset.recipe === "digit";
  $("draw-title").textContent = digits ? "Draw a digit" : drawn ? "Draw a letter" : "Choose a picture";
  $("hint").textContent = drawn
    ? "or drop, paste, photograph or choose pictures"
    : "drop, paste or photograph one";
  $("known").hidden = classes.length <= MAX_BARS;
  $("known-title").textContent = `${classes.length} classes`;
  $("names").textContent = classes.join(", ");
  labels();
  bars({});
  newest.ask();
}

function summary({ dataset, model, created, metrics }) {
  const { errors, n, interval95: [low, high] = [] } = metrics.test;
  const between = low === undefined ? "" : ` (${(100 * low).toFixed(2)}% to ${(100 * high).toFixed(2)}%)`;
  const right = `${(100 * (1 - errors / n)).toFixed(2)}% right of ${n.toLocaleString("en")} test images${between}`;
  return `${model.name} on ${dataset.name}: ${right}, ${created.slice(0, 10)}`;
}

function about(text) {
  $("about").textContent = text;
}

function askKey() {
  $("key-field").hidden = false;
  if (!drawing.stroke) $("key").focus({ preventScroll: true });
}

// --- events ---

$("brush").addEventListener("input", () => (drawing.brush = Number($("brush").value)));
$("undo").addEventListener("click", () => act("undo"));
$("clear").addEventListener("click", () => act("clear"));
$("choose").addEventListener("click", () => $("files").click());
$("camera").addEventListener("click", () => $("photo").click());
for (const id of ["files", "photo"]) {
  $(id).addEventListener("change", () => {
    take($(id).files);
    $(id).value = "";
  });
}
$("picture").addEventListener("error", () => ($("picture").hidden = true));
$("model").addEventListener("change", () => {
  described = "";
  describe().catch((error) => clearAnswer(handleError(error)));
});
$("key-field").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key.set($("key").value);
  $("key-field").hidden = Boolean($("key").value);
  newest.drop(); // the request in progress has no key
  newest.ask();
});

function act(what) {
  newest.drop();
  removePicture();
  drawing[what]();
}

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input:not([type=range]), select")) return;
  const command = event.ctrlKey || event.metaKey;
  if (command && event.key === "z") act("undo");
  else if (command) return;
  else if (event.key === "Escape") act("clear");
  else if (["[", "]"].includes(event.key) && event.target.matches("#canvas, #brush")) {
    $("brush")[event.key === "]" ? "stepUp" : "stepDown"](2);
    drawing.brush = Number($("brush").value);
  } else return;
  event.preventDefault();
});
document.addEventListener("paste", (event) => take(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  take(event.dataTransfer.files);
});

poll();
