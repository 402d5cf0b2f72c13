// Strokes on a canvas. The server gets them black on white, in any colour scheme of the page.

const SIDE = 280; // units of a drawing
const SENT = 224; // pixels of the picture that is sent: the longest side that the server uses

export class Drawing {
  /** Calls changed(done) as strokes grow; done is false during a stroke. */
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed;
    this.strokes = [];
    this.removed = []; // by Clear, for Undo
    this.brush = 22;
    this.stroke = null;
    this.off = false; // whether drawing is disabled
    this.frame = 0; // the requested animation frame
    this.sent = Object.assign(document.createElement("canvas"), { width: SENT, height: SENT });
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, (event) => this.end(event));
    }
    new ResizeObserver(() => this.fit()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.show());
  }

  get empty() {
    return this.strokes.length === 0;
  }

  begin(event) {
    if (event.button !== 0 || this.stroke || this.off) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.canvas.focus({ preventScroll: true }); // for its keyboard shortcuts
    this.stroke = { pointer: event.pointerId, points: [] };
    this.strokes.push(this.stroke);
    this.removed = [];
    this.add(event);
    this.show();
    this.changed(false);
  }

  move(event) {
    if (event.pointerId !== this.stroke?.pointer) return;
    const steps = event.getCoalescedEvents?.() ?? [];
    for (const step of steps.length ? steps : [event]) this.add(step);
    this.frame ||= requestAnimationFrame(() => this.show());
    this.changed(false);
  }

  end(event) {
    if (event.pointerId !== this.stroke?.pointer) return;
    this.stroke = null;
    this.show();
    this.changed(true);
  }

  add(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = SIDE / box.width;
    // The pressure of a mouse is always 0.5, of fingers mostly 0 or 1: only a pen's is used.
    const pressure = event.pointerType === "pen" ? 0.5 + event.pressure : 1;
    this.stroke.points.push({
      x: (event.clientX - box.left) * scale,
      y: (event.clientY - box.top) * scale,
      width: this.brush * pressure,
    });
  }

  undo() {
    if (this.empty) this.strokes = this.removed;
    else this.strokes = this.strokes.slice(0, -1);
    this.removed = [];
    this.show();
    this.changed(true);
  }

  clear() {
    if (!this.empty) this.removed = this.strokes;
    this.strokes = [];
    this.stroke = null;
    this.show();
    this.changed(true);
  }

  fit() {
    const side = Math.round(this.canvas.clientWidth * devicePixelRatio);
    if (side && side !== this.canvas.width) {
      this.canvas.width = this.canvas.height = side;
      this.show();
    }
  }

  show() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { canvas } = this;
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, canvas.width, canvas.height);
    paint(pen, this.strokes, canvas.width / SIDE, getComputedStyle(canvas).color);
  }

  /** The drawing as a PNG, black on white; at once, because toBlob waits for an idle browser. */
  png() {
    const pen = this.sent.getContext("2d", { willReadFrequently: true });
    pen.fillStyle = "white";
    pen.fillRect(0, 0, SENT, SENT);
    paint(pen, this.strokes, SENT / SIDE, "black");
    const [, letters] = this.sent.toDataURL("image/png").split(",");
    const bytes = Uint8Array.from(atob(letters), (letter) => letter.charCodeAt(0));
    return new Blob([bytes], { type: "image/png" });
  }
}

function paint(pen, strokes, scale, colour) {
  pen.save();
  pen.scale(scale, scale);
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = pen.fillStyle = colour;
  for (const { points } of strokes) line(pen, points);
  pen.restore();
}

/** Curves through the midpoints, each as wide as the pen at its points. */
function line(pen, points) {
  const [first] = points;
  if (points.length < 3) {
    const last = points.at(-1);
    pen.lineWidth = first.width;
    pen.beginPath();
    pen.moveTo(first.x, first.y);
    pen.lineTo(last.x + 0.01, last.y);
    pen.stroke();
    return;
  }
  let from = first;
  let { width } = first;
  const start = () => {
    pen.lineWidth = width;
    pen.beginPath();
    pen.moveTo(from.x, from.y);
  };
  start();
  for (let i = 1; i < points.length; i++) {
    if (points[i].width !== width) {
      pen.stroke();
      ({ width } = points[i]);
      start();
    }
    const by = points[i - 1];
    from = i === points.length - 1 ? points[i] : middle(by, points[i]);
    pen.quadraticCurveTo(by.x, by.y, from.x, from.y);
  }
  pen.stroke();
}

const middle = (a, b) => ({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 });
