// The server's interface as this page uses it.

/** What the server refused, in its own words. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new ServerError("The server does not answer. Is “sam3rt demo” still running?", 0);
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new ServerError(problem.error ?? `The server answered ${response.status}.`, response.status);
}

const json = (value) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(value),
});

export const getModel = async () => (await call("v1/model")).json();
export const getFacts = async () => (await call("page/facts.json")).json();

/** Have a JPEG or PNG file encoded: `{image_id, height, width, cached, milliseconds}`. */
export async function sendImage(blob) {
  return (await call("v1/images", { method: "POST", headers: { "Content-Type": blob.type }, body: blob })).json();
}

/** The file of an image's embedding, an ArrayBuffer. */
export async function getEmbedding(imageId) {
  return (await call(`v1/images/${imageId}/embedding`)).arrayBuffer();
}

/** An object's three masks: `{masks, scores}`, masks one byte a pixel, 0 and 1. */
export async function segment(imageId, { points, labels, box }) {
  const question = { objects: [{ points, labels, box }], multimask: true, format: "bits" };
  const answer = await (await call(`v1/images/${imageId}/masks`, json(question))).json();
  const [object] = answer.objects;
  const pixels = answer.height * answer.width;
  return { masks: object.masks.map((bits) => unpack(bits, pixels)), scores: object.scores };
}

/** A file to download, made of masks of `{number, score, mask}` objects. */
export async function exportMasks(format, fileName, { height, width }, objects) {
  const packed = await Promise.all(
    objects.map(async ({ mask, ...object }) => ({ ...object, mask: await pack(mask) })),
  );
  const question = { format, file_name: fileName, height, width, objects: packed };
  return (await call("page/export", json(question))).blob();
}

// Eight pixels a byte, the highest bit first, as base64.

function unpack(text, pixels) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const mask = new Uint8Array(pixels);
  for (let at = 0; at < pixels; at++) mask[at] = (bytes[at >> 3] >> (7 - (at & 7))) & 1;
  return mask;
}

async function pack(mask) {
  const bytes = new Uint8Array(Math.ceil(mask.length / 8));
  for (let at = 0; at < mask.length; at++) bytes[at >> 3] |= mask[at] << (7 - (at & 7));
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.readAsDataURL(new Blob([bytes]));
  });
}
