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
    response = await fetch(new URL(`../${path}`, import.meta.url), options);
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

/**
 * An object's three masks: `{masks, scores}`. A mask's rows have eight pixels a byte, the highest
 * bit first, and begin with a byte each.
 */
export async function segment(imageId, { points, labels, box }) {
  const question = { objects: [{ points, labels, box }], multimask: true, format: "png" };
  const { objects, height } = await (await call(`v1/images/${imageId}/masks`, json(question))).json();
  const [{ masks, scores }] = objects;
  return { masks: await Promise.all(masks.map((text) => rowsOf(text, height))), scores };
}

/** The rows of a PNG file as the server writes it: one chunk of them, from byte 41 on, no filters. */
async function rowsOf(text, height) {
  const file = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const inflated = new Blob([file.subarray(41, -16)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const filtered = new Uint8Array(await new Response(inflated).arrayBuffer());
  const length = filtered.length / height - 1;
  const rows = new Uint8Array(height * length);
  for (let y = 0; y < height; y++) rows.set(filtered.subarray(y * (length + 1) + 1, (y + 1) * (length + 1)), y * length);
  return rows;
}

/** A file to download, made of masks of `{number, score, mask}` objects. */
export async function exportMasks(format, fileName, { height, width }, objects) {
  const packed = await Promise.all(
    objects.map(async ({ mask, ...object }) => ({ ...object, mask: await base64(mask) })),
  );
  const question = { format, file_name: fileName, height, width, objects: packed };
  return (await call("page/export", json(question))).blob();
}

function base64(bytes) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.readAsDataURL(new Blob([bytes]));
  });
}
