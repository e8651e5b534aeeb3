// The picture with masks and prompts over it; pointers and keys become clicks and boxes.

import { shownMask, shownResult } from "./state.js";

const ADD = "#16aa52";
const REMOVE = "#de2a34";
const MOST_ENLARGED = 3;
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
  #layers = new WeakMap(); // drawn masks, by mask
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
    this.#fit();
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

  // --- drawing -----------------------------------------------------------------------------------

  /** Fit the picture into the space that there is, and the canvas to the screen's own pixels. */
  #fit() {
    if (!this.#size) return;
    const { width, height } = this.#size;
    const { clientWidth, clientHeight } = this.#space;
    const scale = Math.min(clientWidth / width, clientHeight / height, MOST_ENLARGED);
    const shown = [Math.round(width * scale), Math.round(height * scale)];
    [this.#element.style.width, this.#element.style.height] = shown.map((side) => `${side}px`);
    [this.#canvas.width, this.#canvas.height] = shown.map((side) => Math.round(side * devicePixelRatio));
    this.draw();
  }

  draw() {
    if (!this.#size) return;
    const context = this.#canvas.getContext("2d");
    const { width, height } = this.#canvas;
    context.clearRect(0, 0, width, height);
    const { objects, active } = this.#state;
    // The active object comes last: on top.
    const order = [...objects].sort((a, b) => (a.number === active) - (b.number === active));
    for (const object of order) {
      const mask = shownResult(object)?.masks[shownMask(object)];
      if (mask) context.drawImage(this.#layer(mask, object.colour), 0, 0);
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

  /** A tinted mask with an outline, of the canvas' size. */
  #layer(mask, colour) {
    const { width, height } = this.#canvas;
    const known = this.#layers.get(mask);
    if (known?.width === width && known.height === height) return known;
    const shape = maskCanvas(mask, this.#size);
    const layer = canvas(width, height);
    const context = layer.getContext("2d");
    // An outline: the mask moved all around, less the mask itself.
    const reach = 2 * devicePixelRatio;
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
    this.#layers.set(mask, layer);
    return layer;
  }

  /** A picture's pixel, or with 0 its corner, on the canvas. */
  #place([x, y], middle = 0.5) {
    const scale = this.#canvas.width / this.#size.width;
    return [(x + middle) * scale, (y + middle) * scale];
  }

  #drawPoint(context, point, label) {
    const unit = devicePixelRatio;
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
      context.lineWidth = width * devicePixelRatio;
      context.strokeRect(left, top, right - left, bottom - top);
    }
  }

  #drawCrosshair(context) {
    const [x, y] = this.#place(this.#crosshair);
    const { width, height } = this.#canvas;
    for (const [style, thick] of [["#000a", 3], ["#fff", 1]]) {
      context.strokeStyle = style;
      context.lineWidth = thick * devicePixelRatio;
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

/** A mask as a canvas of the picture's size: opaque inside, transparent outside. */
function maskCanvas(mask, { width, height }) {
  const shape = canvas(width, height);
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let at = 0; at < mask.length; at++) pixels[at] = mask[at] ? 0xffffffff : 0;
  shape.getContext("2d").putImageData(image, 0, 0);
  return shape;
}
