// The page: what was drawn or chosen goes to the server, and its answer is shown.

import * as api from "./api.js";
import { Drawing } from "./draw.js";

const $ = (id) => document.getElementById(id);
const ALIVE_MS = 5000; // between two looks at a server that is ready
const GONE_MS = 1000; // and at one that is not
const MOST_BARS = 10;
const AT_ONCE = 16; // pictures in one request

let record = null; // of the model that answers
let chosen = null; // the one picture that was chosen, in place of the drawing
let correcting = false; // whether the server keeps corrections

// --- what is asked ---

const drawing = new Drawing($("canvas"), (done) => {
  if (chosen) forget();
  if (drawing.empty) newest.drop();
  if (drawing.empty) nothing();
  else newest.ask(done);
});

let asked = 0;
const newest = new api.Newest(() => {
  if (!chosen && drawing.empty) return null;
  asked = performance.now();
  const picture = chosen ? Promise.resolve(chosen) : drawing.png();
  return picture.then((bytes) => api.predict(bytes, $("model").value));
}, show);

/** Pictures that were chosen, dropped, pasted or taken. */
async function take(files) {
  const pictures = [...files];
  if (!pictures.length) return;
  newest.drop();
  if (pictures.length === 1) {
    drawing.clear();
    [chosen] = pictures;
    $("picture").src = URL.createObjectURL(chosen);
    $("picture").hidden = false;
    newest.ask();
    return;
  }
  $("rows").replaceChildren();
  $("many").hidden = false;
  $("many").scrollIntoView({ behavior: "smooth", block: "nearest" });
  for (let i = 0; i < pictures.length; i += AT_ONCE) {
    const part = pictures.slice(i, i + AT_ONCE);
    const rows = part.map((file) => $("rows").appendChild(row(file)));
    const found = await api.batch(part, $("model").value).catch((error) => error);
    rows.forEach((each, j) => fill(each, found.results?.[j] ?? { error: found }));
  }
}

function forget() {
  if (!chosen) return;
  URL.revokeObjectURL($("picture").src);
  $("picture").hidden = true;
  chosen = null;
}

// --- what is answered ---

/** "99.8%"; neither 100% nor 0% for what is only nearly so. */
function percent(share) {
  if (share > 0.9995 && share < 1) return ">99.9%";
  if (share < 0.0005 && share > 0) return "<0.1%";
  return `${(100 * share).toFixed(share > 0 && share < 1 ? 1 : 0)}%`;
}

function show(answer) {
  if (answer instanceof Error) {
    nothing(answer.message);
    if (answer.code === "gone") look();
    if (answer.code === "unauthorised") askKey();
    return;
  }
  const { prediction, probability, probabilities, top, uncertain, view } = answer;
  $("class").textContent = prediction;
  $("class").classList.toggle("long", prediction.length > 2);
  $("class").classList.toggle("unsure", uncertain);
  const others = top.slice(1).map(([name, share]) => `${name} (${percent(share)})`);
  const sure = uncertain ? `Not sure; most like ${prediction}` : prediction;
  $("words").textContent = `${sure}, ${percent(probability)}. Then ${others.join(" and ")}.`;
  $("time").textContent = `${Math.round(performance.now() - asked)} ms`;
  $("view").src = view;
  $("view").alt = "Your picture as the model sees it";
  bars(probabilities, prediction);
  $("right").hidden = !correcting;
}

function nothing(words = chosen || !drawing.empty ? "" : "Nothing drawn yet.") {
  $("class").textContent = "–";
  $("class").classList.remove("unsure", "long");
  $("words").textContent = words;
  $("time").textContent = "\u00a0";
  $("view").removeAttribute("src");
  $("view").alt = "";
  $("right").hidden = true;
  bars({});
}

/** A bar for each class, or for the likeliest where there are many. */
function bars(shares, best) {
  const all = record?.dataset.classes ?? Object.keys(shares);
  let names = all;
  if (all.length > MOST_BARS) {
    const likely = [...all].sort((a, b) => (shares[b] ?? 0) - (shares[a] ?? 0));
    names = all.filter((name) => likely.slice(0, MOST_BARS).includes(name));
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

function row(file) {
  const line = document.createElement("tr");
  const cells = ["picture", "seen", "file", "prediction", "top"].map((kind) => part("td", kind));
  const thumbnail = Object.assign(new Image(64, 64), { alt: "", src: URL.createObjectURL(file) });
  thumbnail.onload = () => URL.revokeObjectURL(thumbnail.src);
  thumbnail.onerror = () => thumbnail.remove();
  cells[0].append(thumbnail);
  cells[2].textContent = file.name || "picture";
  cells[3].textContent = "…";
  line.append(...cells);
  return line;
}

function fill(line, answer) {
  const [, seen, , prediction, top] = line.children;
  if (answer.error) {
    const { code, message } = answer.error;
    prediction.textContent = "–";
    top.textContent = new api.Refused(code, message).message;
    line.className = "refused";
    return;
  }
  seen.append(Object.assign(new Image(56, 56), { alt: "", src: answer.view }));
  prediction.textContent = answer.prediction + (answer.uncertain ? " (not sure)" : "");
  top.textContent = answer.top.map(([name, share]) => `${name} ${percent(share)}`).join(", ");
}

// --- putting right ---

function labels(classes) {
  const buttons = classes.map((name) => {
    const button = Object.assign(part("button"), { type: "button", textContent: name });
    button.addEventListener("click", () => correct(name));
    return button;
  });
  $("labels").replaceChildren(...buttons);
}

async function correct(label) {
  const picture = chosen ?? (await drawing.png());
  const found = await api.feedback(picture, label).catch((error) => error);
  $("words").textContent = found instanceof Error ? found.message : `Kept as ${label}. Thank you.`;
}

// --- the server ---

const STATES = { ready: "ready", unavailable: "no model yet", gone: "not reachable" };
let timer = 0;
let seen = "";

async function look() {
  clearTimeout(timer);
  const found = await api.ready().catch(() => ({ status: "gone" }));
  const was = $("state").dataset.state;
  $("state").dataset.state = found.status;
  $("state").textContent = STATES[found.status] ?? found.status;
  $("state").title = found.reason ?? "";
  correcting = Boolean(found.feedback);
  if (found.status === "ready" && (was !== "ready" || seen !== found.model)) {
    seen = found.model;
    await list();
    if (was !== "ready") newest.ask();
  }
  timer = setTimeout(look, found.status === "ready" ? ALIVE_MS : GONE_MS);
}

async function list() {
  const { current, models } = await api.models();
  const kept = $("model").value;
  const options = models.map(
    ({ name, dataset, network }) => new Option(`${network}, ${dataset}, ${name}`, name),
  );
  const first = new Option(current ? `the current one (${current})` : "the current one", "");
  $("model").replaceChildren(first, ...options.reverse());
  $("model").value = models.some(({ name }) => name === kept) ? kept : "";
  await describe();
}

async function describe() {
  const name = $("model").value || seen;
  record = await api.model(name).catch(() => null);
  if (!record) return;
  const { dataset, model, created, metrics } = record;
  const { errors, n, interval95: [low, high] = [] } = metrics.test;
  const between = low === undefined ? "" : ` (${(100 * low).toFixed(2)}% to ${(100 * high).toFixed(2)}%)`;
  const right = `${(100 * (1 - errors / n)).toFixed(2)}% right of ${n} test images${between}`;
  $("about").textContent = `${model.name} on ${dataset.name}: ${right}, ${created.slice(0, 10)}`;
  const digits = dataset.classes.every((each) => /^\d$/.test(each));
  const drawn = dataset.recipe === "digit";
  $("draw-title").textContent = digits ? "Draw a digit" : drawn ? "Draw a letter" : "Choose a picture";
  const known = dataset.classes.join(", ");
  $("hint").textContent = digits
    ? "or drop, paste, photograph or choose pictures"
    : `This model knows ${known}.${drawn ? "" : " A photo will do better than a drawing."}`;
  labels(dataset.classes);
  bars({});
}

function askKey() {
  $("key-field").hidden = false;
  $("key").focus();
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
$("model").addEventListener("change", async () => {
  newest.drop();
  await describe();
  newest.ask();
});
$("key-field").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key.set($("key").value);
  $("key-field").hidden = Boolean($("key").value);
  newest.ask();
});

function act(what) {
  newest.drop();
  forget();
  drawing[what]();
}

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input:not([type=range]), select")) return;
  const command = event.ctrlKey || event.metaKey;
  if (command && event.key.toLowerCase() === "z") act("undo");
  else if (command || event.altKey) return;
  else if (event.key === "Escape") act("clear");
  else if (event.key === "[" || event.key === "]") {
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

bars({});
look();
