// The page: pictures come in, clicks become masks, masks go out as files.

import { InPageDecoder } from "./decoder.js";
import { showObjects } from "./list.js";
import * as server from "./server.js";
import { Stage } from "./stage.js";
import { confidence, History, isEmpty, shownMask, withPrompts } from "./state.js";

const $ = (selector) => document.querySelector(selector);
const EXTENSIONS = { png: "png", coco: "json", polygons: "json" };

const history = new History();
const stage = new Stage({
  point: (x, y, label) => {
    const { points, labels } = history.active;
    ask({ points: [...points, [x, y]], labels: [...labels, label] });
  },
  box: (box) => ask({ box }),
  crosshair: (x, y) => say(`Column ${x}, row ${y}`),
  tool: () => $("#tools input:checked").value,
});
const listActions = {
  select: (number) => edit(() => history.select(number)),
  remove: (number) => edit(() => history.remove(number), `Object ${number} removed.`),
  choose,
};
let picture = null; // {blob, name, image_id, width, height} of the picture that is shown
let unit = "iou"; // of the model's scores, or "log_odds"
let decoder = null; // the one in this page, once it has been asked for
let opening = 0; // how many pictures were opened: the last one counts
let pending = 0; // what is being waited for

// --- pictures -------------------------------------------------------------------------------------

async function open(source, name) {
  const turn = ++opening;
  await attempt("Encoding…", async () => {
    const [blob, sent] = await send(source);
    if (turn !== opening) return;
    if (picture) URL.revokeObjectURL(picture.address);
    picture = { ...sent, blob, name, address: URL.createObjectURL(blob) };
    history.clear();
    $("#empty").hidden = true;
    await stage.show(picture.address, picture);
    for (const id of ["#server-time", "#page-time"]) $(id).textContent = "–";
    $("#encoder-time").textContent = sent.cached ? "known already" : time(sent.milliseconds);
    update();
    stage.focus();
    say(`${name}, ${sent.width} by ${sent.height} pixels, is ready: click on an object.`);
  });
}

/** Have a picture encoded: what was sent, and the answer. */
async function send(blob) {
  if (["image/jpeg", "image/png"].includes(blob.type)) {
    try {
      return [blob, await server.sendImage(blob)];
    } catch (error) {
      // Another kind of file than its name says, or of 16 bits, which the browser may read.
      if (error.status !== 400) throw error;
    }
  }
  const png = await asPng(blob);
  return [png, await server.sendImage(png)];
}

async function asPng(blob) {
  let image;
  try {
    image = await createImageBitmap(blob);
  } catch {
    throw new Error("This is no picture that the browser can read.");
  }
  const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
  canvas.getContext("2d").drawImage(image, 0, 0);
  const png = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!png) throw new Error("This picture is too large for the browser; as JPEG or PNG it need not convert it.");
  return png;
}

async function openSample() {
  await attempt("Loading…", async () => {
    const response = await fetch("page/chelsea.jpg");
    await open(await response.blob(), "chelsea.jpg");
  });
}

function openFirst(transfer) {
  const file = [...(transfer?.files ?? [])].find((one) => one.type.startsWith("image/"));
  if (file) open(file, file.name);
  else if (transfer?.files.length) fail(new Error("This file is no picture."));
}

// --- clicks ---------------------------------------------------------------------------------------

/** Change the active object's prompts, and show what the model makes of them. */
async function ask(prompts) {
  const object = withPrompts(history.active, prompts);
  history.change(object);
  update();
  wait(1);
  try {
    await answer(object);
    const score = object.result.confidence[shownMask(object)];
    if (history.active === object) say(`Object ${object.number}: score ${score.toFixed(2)}.`);
    quiet();
  } catch (error) {
    history.withdraw(object);
    fail(error);
  }
  update();
  wait(-1);
}

/** Have an object decoded, here or on the server, and note how long it took. */
async function answer(object) {
  const inPage = $("#in-page").checked;
  const { blob, image_id: imageId } = picture;
  const start = performance.now();
  const decode = () => (inPage ? decoder : server).segment(imageId, object);
  const found = await decode().catch(async (error) => {
    if (error.status !== 404) throw error;
    // The server made room for other pictures.
    await server.sendImage(blob);
    return decode();
  });
  object.result = { ...found, confidence: found.scores.map((score) => confidence(score, unit)) };
  $(inPage ? "#page-time" : "#server-time").textContent = time(performance.now() - start);
}

async function switchDecoder() {
  const box = $("#in-page");
  await attempt("Loading the decoder…", async () => {
    try {
      if (box.checked) await (decoder ??= new InPageDecoder()).ready;
      const object = history.active;
      if (picture && !isEmpty(object)) await answer(object);
    } catch (error) {
      box.checked = false;
      decoder = null;
      throw error;
    }
    say(box.checked ? "Masks are decoded in this page." : "Masks are decoded on the server.");
  });
  update();
}

function choose(index) {
  const object = history.active;
  if (!object.result || index >= object.result.scores.length) return;
  const score = object.result.confidence[index].toFixed(2);
  edit(() => history.change({ ...object, choice: index }), `Mask ${index + 1}, score ${score}.`);
}

function edit(action, said) {
  action();
  update();
  if (said) say(said);
}

const undo = () => edit(() => history.undo(), "Undone.");
const redo = () => edit(() => history.redo(), "Done again.");
const reset = () => edit(() => history.reset(), "All objects removed. Undo brings them back.");
const next = () => edit(() => history.next(), "Click on the next object.");

// --- files ----------------------------------------------------------------------------------------

const finished = () => history.state.objects.filter((object) => object.result);

async function download(format) {
  await attempt("Writing…", async () => {
    const objects = finished().map((object) => {
      const index = shownMask(object);
      const { masks, confidence: scores } = object.result;
      return { number: object.number, score: scores[index], mask: masks[index] };
    });
    const blob = await server.exportMasks(format, picture.name, picture, objects);
    const extension = blob.type === "application/zip" ? "zip" : EXTENSIONS[format];
    const stem = picture.name.replace(/\.[^.]*$/, "") || "picture";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${stem}-${format === "png" ? "mask" : format}.${extension}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    say(`${link.download} is being downloaded.`);
  });
}

// --- what people see and hear ---------------------------------------------------------------------

function update() {
  stage.update(history.state);
  showObjects(history.state, listActions);
  $("#undo").disabled = !history.canUndo;
  $("#redo").disabled = !history.canRedo;
  $("#next").disabled = !picture || isEmpty(history.active);
  $("#reset").disabled = history.state.objects.every(isEmpty);
  // A file would lack an object whose answer is still to come.
  const isWaiting = history.state.objects.some((object) => !isEmpty(object) && !object.result);
  for (const button of document.querySelectorAll("#downloads button")) button.disabled = isWaiting || !finished().length;
}

async function attempt(what, action) {
  $("#busy-text").textContent = what;
  $("#busy").hidden = false;
  wait(1);
  try {
    await action();
    quiet();
  } catch (error) {
    fail(error);
  }
  $("#busy").hidden = true;
  wait(-1);
}

function wait(change) {
  pending += change;
  $("#space").ariaBusy = String(pending > 0);
}

function say(text) {
  $("#status").textContent = text;
}

function fail(error) {
  $("#alert").textContent = error.message;
  $("#alert").hidden = false;
}

function quiet() {
  $("#alert").hidden = true;
}

const time = (milliseconds) =>
  milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;

// --- events ---------------------------------------------------------------------------------------

const KEYS = {
  ...{ z: undo, y: redo, n: next, r: reset, escape: () => stage.cancel() },
  ...{ "+": () => stage.zoomBy(1.5), "=": () => stage.zoomBy(1.5) },
  ...{ "-": () => stage.zoomBy(1 / 1.5), 0: () => stage.zoom(1) },
};

document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  const withControl = event.ctrlKey || event.metaKey;
  if (!picture || event.altKey || event.repeat || (withControl && !"zy".includes(key))) return;
  if (key === "z" && event.shiftKey) redo();
  else if (KEYS[key]) KEYS[key]();
  else if ("123".includes(key)) choose(Number(key) - 1);
  else return;
  event.preventDefault();
});
document.addEventListener("paste", (event) => openFirst(event.clipboardData));
for (const [kind, isOver] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("#space").classList.toggle("dropping", isOver);
    if (kind === "drop") openFirst(event.dataTransfer);
  });
}
$("#file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) open(file, file.name);
  event.target.value = ""; // so that the same file can be opened again
});
$("#sample").addEventListener("click", openSample);
$("#undo").addEventListener("click", undo);
$("#redo").addEventListener("click", redo);
$("#next").addEventListener("click", next);
$("#reset").addEventListener("click", reset);
$("#in-page").addEventListener("change", switchDecoder);
$("#tools").addEventListener("change", (event) => $("#stage").classList.toggle("box", event.target.value === "box"));
for (const button of document.querySelectorAll("#downloads button")) {
  button.addEventListener("click", () => download(button.dataset.format));
}

// Where there is room, nobody has to look for the keys.
$("#help").open = matchMedia("(min-width: 801px) and (min-height: 880px)").matches;
update();
try {
  const [model, facts] = await Promise.all([server.getModel(), server.getFacts()]);
  $("#model").textContent = `${model.name}, ${model.backend} ${model.precision} on ${model.device}`;
  unit = model.score_unit;
  for (const one of document.querySelectorAll(".in-page")) one.hidden = !facts.onnxruntime_web;
} catch (error) {
  fail(error);
}
wait(0);
