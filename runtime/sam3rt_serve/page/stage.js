// The picture with masks and prompts over it; pointers and keys become clicks and boxes.

import { shownMask, shownResult } from "./state.js";

const ADD = "#16aa52";
const REMOVE = "#de2a34";
// How far a small picture is enlarged to fill the space, and how far one may look closer.
const MOST_ENLARGED = 32;
const MOST_ZOOM = 8;
// Of the canvas, and at most of a layer for each mask that is shown.
const MOST_PIXELS = 8 << 20;
// Shorter movements are clicks, CSS pixels.
const DRAG = { mouse: 4, pen: 6, touch: 10 };
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Stage {
  #element = document.querySelector("#stage");
  #picture = document.querySelector("#picture");
  #canvas = document.querySelector("#canvas");
  #space = document.querySelector("#space");
  #size = null; // of the picture, pixels
  #state = { objects: [] };
  #zoom = 1; // 1: the whole picture
  #ratio = 1; // pixels of the canvas in one of CSS
  #sharpening = 0; // a timer
  #layers = new Map(); // drawn masks, by mask: those that are shown
  #drag = null;
  #crosshair = null;
  #usesKeys = false; // rather than a pointer: the crosshair is shown
  #corner = null; // first corner of a box set by keys

  /**
   * @param {object} on - `point(x, y, label)`, `box([x0, y0, x1, y1])` and `crosshair(x, y)` are
   *   told what happens, in pixels of the picture; `tool()` says "add", "remove" or "box".
   */
  constructor(on) {
    this.on = on;
    new ResizeObserver(() => this.#fit()).observe(this.#space);
    const element = this.#element;
    element.addEventListener("pointerdown", (event) => this.#press(event));
    element.addEventListener("pointermove", (event) => this.#move(event));
    element.addEventListener("pointerup", (event) => this.#release(event));
    element.addEventListener("pointercancel", () => this.cancel());
    element.addEventListener("contextmenu", (event) => event.preventDefault());
    element.addEventListener("keydown", (event) => this.#key(event));
    // Touchpads tell of a pinch as of a wheel with Ctrl.
    const wheel = (event) => {
      if (!event.ctrlKey || !this.#size) return;
      event.preventDefault();
      this.zoom(this.#zoom * Math.exp(-event.deltaY / 200), [event.clientX, event.clientY]);
    };
    this.#space.addEventListener("wheel", wheel, { passive: false });
    for (const kind of ["focus", "blur"]) element.addEventListener(kind, () => this.draw());
  }

  /** Show a picture of a size `{width, height}`, by its address. */
  async show(address, size) {
    this.#picture.src = address;
    await this.#picture.decode();
    this.#size = size;
    this.#crosshair = [Math.floor(size.width / 2), Math.floor(size.height / 2)];
    this.#element.hidden = false;
    this.#space.style.setProperty("--ratio", `${size.width} / ${size.height}`);
    this.cancel();
    this.zoom(1);
    this.#sharpen();
  }

  /** Look closer, or less so. What is at a place of the window stays there, else in the middle. */
  zoom(wanted, at) {
    if (!this.#size) return;
    const view = this.#space.getBoundingClientRect();
    const [x, y] = at ?? [view.x + view.width / 2, view.y + view.height / 2];
    const before = this.#element.getBoundingClientRect();
    this.#zoom = Math.min(Math.max(wanted, 1), MOST_ZOOM);
    this.#fit();
    const after = this.#element.getBoundingClientRect();
    const scale = after.width / before.width;
    this.#space.scrollBy(after.x + (x - before.x) * scale - x, after.y + (y - before.y) * scale - y);
  }

  zoomBy(factor) {
    this.zoom(this.#zoom * factor);
    if (this.#usesKeys) this.#reveal();
  }

  update(state) {
    this.#state = state;
    this.draw();
  }

  /** Give up a box that was begun. */
  cancel() {
    this.#drag = this.#corner = null;
    this.draw();
  }

  focus() {
    this.#element.focus();
  }

  // --- pointers and keys -------------------------------------------------------------------------

  #at(event) {
    const frame = this.#element.getBoundingClientRect();
    const { width, height } = this.#size;
    const x = Math.floor(((event.clientX - frame.left) / frame.width) * width);
    const y = Math.floor(((event.clientY - frame.top) / frame.height) * height);
    return [clamp(x, width), clamp(y, height)];
  }

  #press(event) {
    if (!event.isPrimary || event.button > 2) return;
    this.#usesKeys = false;
    const removes = event.button === 2 || event.altKey;
    const touchScrolls = event.pointerType === "touch" && this.on.tool() !== "box";
    this.#drag = {
      start: this.#at(event),
      from: [event.clientX, event.clientY],
      label: removes || this.on.tool() === "remove" ? 0 : 1,
      mayBox: !removes && !touchScrolls,
      box: null,
    };
    this.#element.setPointerCapture(event.pointerId);
  }

  #move(event) {
    const drag = this.#drag;
    if (!drag || !event.isPrimary) return;
    const [x, y] = drag.from;
    const moved = Math.hypot(event.clientX - x, event.clientY - y) > DRAG[event.pointerType];
    if (!moved && !drag.box) return;
    if (!drag.mayBox) {
      this.#drag = null;
      return;
    }
    drag.box = corners(drag.start, this.#at(event));
    this.draw();
  }

  #release(event) {
    const drag = this.#drag;
    if (!drag || !event.isPrimary) return;
    this.cancel();
    if (drag.box) this.on.box(drag.box);
    else if (this.on.tool() !== "box" || drag.label === 0) this.on.point(...drag.start, drag.label);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = STEPS[event.key];
    const { width, height } = this.#size;
    if (step) {
      const length = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 40));
      const [x, y] = this.#crosshair;
      this.#crosshair = [clamp(x + step[0] * length, width), clamp(y + step[1] * length, height)];
      this.on.crosshair(...this.#crosshair);
      this.#reveal();
    } else if (event.key === "Enter") {
      this.on.point(...this.#crosshair, event.shiftKey ? 0 : 1);
    } else if (event.key.toLowerCase() === "b") {
      const first = this.#corner;
      this.#corner = first ? null : this.#crosshair;
      if (first) this.on.box(corners(first, this.#crosshair));
    } else {
      return;
    }
    this.#usesKeys = true;
    this.draw();
    event.preventDefault();
  }

  /** Bring the crosshair into the middle of what is seen of an enlarged picture. */
  #reveal() {
    if (this.#zoom === 1) return;
    // Not by the canvas, whose size comes later.
    const scale = this.#element.offsetWidth / this.#size.width;
    const [x, y] = this.#crosshair.map((at) => (at + 0.5) * scale);
    this.#space.scrollTo(x - this.#space.clientWidth / 2, y - this.#space.clientHeight / 2);
  }

  // --- drawing -----------------------------------------------------------------------------------

  /** Fit the picture into the space that there is, times the zoom. */
  #fit() {
    if (!this.#size) return;
    const { width, height } = this.#size;
    // Without the scroll bars, which come and go with the zoom.
    const { offsetWidth, offsetHeight } = this.#space;
    const scale = Math.min(offsetWidth / width, offsetHeight / height, MOST_ENLARGED) * this.#zoom;
    this.#element.style.width = `${Math.round(width * scale)}px`;
    this.#element.style.height = `${Math.round(height * scale)}px`;
    this.#space.classList.toggle("zoomed", this.#zoom > 1);
    // Until the zoom stays where it is, what was drawn is stretched.
    clearTimeout(this.#sharpening);
    this.#sharpening = setTimeout(() => this.#sharpen(), 100);
  }

  /** Fit the canvas to the screen's own pixels, as far as memory allows. */
  #sharpen() {
    const { offsetWidth, offsetHeight } = this.#element;
    this.#ratio = Math.min(devicePixelRatio, Math.sqrt(MOST_PIXELS / (offsetWidth * offsetHeight)));
    this.#canvas.width = Math.round(offsetWidth * this.#ratio);
    this.#canvas.height = Math.round(offsetHeight * this.#ratio);
    this.draw();
  }

  draw() {
    if (!this.#size) return;
    const context = this.#canvas.getContext("2d");
    const { width, height } = this.#canvas;
    context.clearRect(0, 0, width, height);
    const known = this.#layers;
    this.#layers = new Map();
    const { objects, active } = this.#state;
    // The active object comes last: on top.
    const order = [...objects].sort((a, b) => (a.number === active) - (b.number === active));
    for (const object of order) {
      const mask = shownResult(object)?.masks[shownMask(object)];
      if (!mask) continue;
      const layer = this.#layer(mask, object.colour, known.get(mask));
      this.#layers.set(mask, layer);
      context.drawImage(layer.image, layer.left, layer.top);
    }
    for (const object of order) {
      context.globalAlpha = object.number === active ? 1 : 0.75;
      if (object.box) this.#drawBox(context, object.box, object.colour);
      object.points.forEach((point, at) => this.#drawPoint(context, point, object.labels[at]));
    }
    context.globalAlpha = 1;
    if (this.#drag?.box) this.#drawBox(context, this.#drag.box, "#fff");
    if (this.#corner) this.#drawBox(context, corners(this.#corner, this.#crosshair), "#fff");
    if (this.#usesKeys && this.#element.matches(":focus")) this.#drawCrosshair(context);
  }

  /** A tinted mask with an outline, where it lies on the canvas: the one that is known, if it is. */
  #layer(mask, colour, known) {
    const { width, height } = this.#canvas;
    if (known?.width === width && known.height === height) return known;
    const [shape, [x0, y0, x1, y1]] = maskCanvas(mask, this.#size);
    const reach = 2 * this.#ratio;
    const [across, down] = [width / this.#size.width, height / this.#size.height];
    // Smoothing makes it wider by up to a pixel of the picture.
    const left = Math.max(Math.floor((x0 - 1) * across - reach), 0);
    const top = Math.max(Math.floor((y0 - 1) * down - reach), 0);
    const right = Math.min(Math.ceil((x1 + 1) * across + reach), width);
    const bottom = Math.min(Math.ceil((y1 + 1) * down + reach), height);
    const image = canvas(Math.max(right - left, 1), Math.max(bottom - top, 1));
    const context = image.getContext("2d");
    context.translate(-left, -top);
    // An outline: the mask moved all around, less the mask itself.
    for (let turn = 0; turn < 16; turn++) {
      const [x, y] = [Math.cos((turn * Math.PI) / 8) * reach, Math.sin((turn * Math.PI) / 8) * reach];
      context.drawImage(shape, x, y, width, height);
    }
    context.globalCompositeOperation = "destination-out";
    context.drawImage(shape, 0, 0, width, height);
    context.globalCompositeOperation = "source-over";
    context.globalAlpha = 0.38;
    context.drawImage(shape, 0, 0, width, height);
    context.globalAlpha = 1;
    context.globalCompositeOperation = "source-in";
    context.fillStyle = colour;
    context.fillRect(0, 0, width, height);
    return { image, left, top, width, height };
  }

  /** A picture's pixel, or with 0 its corner, on the canvas. */
  #place([x, y], middle = 0.5) {
    const scale = this.#canvas.width / this.#size.width;
    return [(x + middle) * scale, (y + middle) * scale];
  }

  #drawPoint(context, point, label) {
    const unit = this.#ratio;
    const [x, y] = this.#place(point);
    context.beginPath();
    context.arc(x, y, 8 * unit, 0, 2 * Math.PI);
    context.fillStyle = label ? ADD : REMOVE;
    context.fill();
    context.strokeStyle = "#fff";
    context.lineWidth = 2 * unit;
    context.stroke();
    context.beginPath();
    context.moveTo(x - 3.5 * unit, y);
    context.lineTo(x + 3.5 * unit, y);
    if (label) {
      context.moveTo(x, y - 3.5 * unit);
      context.lineTo(x, y + 3.5 * unit);
    }
    context.stroke();
  }

  #drawBox(context, [x0, y0, x1, y1], colour) {
    const [left, top] = this.#place([x0, y0]);
    const [right, bottom] = this.#place([x1, y1]);
    for (const [style, width] of [["#0009", 4], [colour, 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width * this.#ratio;
      context.strokeRect(left, top, right - left, bottom - top);
    }
  }

  #drawCrosshair(context) {
    const [x, y] = this.#place(this.#crosshair);
    const { width, height } = this.#canvas;
    for (const [style, thick] of [["#000a", 3], ["#fff", 1]]) {
      context.strokeStyle = style;
      context.lineWidth = thick * this.#ratio;
      context.beginPath();
      context.moveTo(0, y);
      context.lineTo(width, y);
      context.moveTo(x, 0);
      context.lineTo(x, height);
      context.stroke();
    }
  }
}

const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);

function corners([x0, y0], [x1, y1]) {
  return [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
}

function canvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

/** A mask as a canvas of the picture's size, opaque inside, else clear; and the box around it. */
function maskCanvas(mask, { width, height }) {
  const box = [width, height, 0, 0];
  const shape = canvas(width, height);
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const length = mask.length / height;
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      if (!(mask[y * length + (x >> 3)] & (128 >> (x & 7)))) continue;
      pixels[at] = 0xffffffff;
      box[0] = Math.min(box[0], x);
      box[1] = Math.min(box[1], y);
      box[2] = Math.max(box[2], x + 1);
      box[3] = y + 1;
    }
  }
  shape.getContext("2d").putImageData(image, 0, 0);
  return [shape, box];
}
