// Runs a bundle's decoder by ONNX Runtime, by the rules of its manifest (bundle.json).

import * as ort from "./onnxruntime/ort.wasm.bundle.min.mjs";

import { fillHoles, upsample } from "./masks.js";
import { getEmbedding, getFacts } from "./server.js";

ort.env.wasm.wasmPaths = { wasm: new URL("./onnxruntime/ort-wasm-simd-threaded.wasm", import.meta.url).href };

let manifest = null;
let session = null;
let embedding = null; // {imageId, maps, originalSize, inputSize}

async function load() {
  ({ manifest } = await getFacts());
  const { model, external_data: external } = manifest.decoder;
  session = await ort.InferenceSession.create(new URL(`./decoder/${model.file}`, import.meta.url).href, {
    executionProviders: ["wasm"],
    externalData: external.map(({ file }) => ({
      path: file,
      data: new URL(`./decoder/${file}`, import.meta.url).href,
    })),
  });
}

async function segment(imageId, prompts) {
  if (embedding?.imageId !== imageId) embedding = { imageId, ...readEmbedding(await getEmbedding(imageId)) };
  const outputs = await session.run({ ...embedding.maps, ...packPrompts(prompts) }, ["pred_masks", "iou_scores"]);
  const { data, dims } = outputs.pred_masks;
  const [height, width] = dims.slice(-2);
  const scores = [...outputs.iou_scores.data];
  const masks = scores.map((_, index) => {
    const logits = data.slice(index * height * width, (index + 1) * height * width);
    fillHoles(logits, [height, width], manifest.masks.max_hole_area);
    return upsample(logits, [height, width], embedding, manifest);
  });
  return { masks, scores };
}

const loaded = load();
// One message after the other: a session runs once at a time.
let last = loaded.catch(() => {});
self.onmessage = ({ data: { id, imageId, prompts } }) => {
  last = last.then(async () => {
    try {
      await loaded;
      const answer = imageId && (await segment(imageId, prompts));
      self.postMessage({ id, answer }, (answer?.masks ?? []).map((mask) => mask.buffer));
    } catch (error) {
      self.postMessage({ id, error: String(error?.message ?? error), status: error?.status });
    }
  });
};

/** Feature maps and sizes of a safetensors file. */
function readEmbedding(buffer) {
  const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, start - 8)));
  const { __metadata__: about, ...entries } = header;
  if (about.fingerprint !== manifest.fingerprint) throw new Error("the embedding belongs to another model");
  const maps = {};
  for (const [name, { shape, data_offsets: [from, to] }] of Object.entries(entries)) {
    maps[name] = new ort.Tensor("float32", new Float32Array(buffer.slice(start + from, start + to)), shape);
  }
  const size = (text) => text.split(" ").map(Number);
  return { maps, originalSize: size(about.original_size), inputSize: size(about.input_size) };
}

/** An object's prompts as the decoder takes them: labelled points in pixels of the encoder's input. */
function packPrompts({ points, labels, box }) {
  const rules = manifest.prompts;
  const [height, width] = embedding.originalSize;
  const [inputHeight, inputWidth] = embedding.inputSize;
  const toInput = ([x, y]) => [
    Math.fround(Math.fround(x) / width) * inputWidth,
    Math.fround(Math.fround(y) / height) * inputHeight,
  ];
  let coords = points.map(toInput);
  let codes = [...labels];
  if (box) {
    const ends = [box.slice(0, 2), box.slice(2)].map(toInput);
    const isFirst = rules.box_position === "before_points";
    coords = isFirst ? [...ends, ...coords] : [...coords, ...ends];
    codes = isFirst ? [2, 3, ...codes] : [...codes, 2, 3];
  }
  if (rules.padding_point === "always" || !box) {
    coords.push([0, 0]);
    codes.push(-1);
  }
  const [maskHeight, maskWidth] = rules.mask_size;
  return {
    input_points: new ort.Tensor("float32", Float32Array.from(coords.flat()), [1, 1, coords.length, 2]),
    input_labels: new ort.Tensor("int64", BigInt64Array.from(codes, BigInt), [1, 1, codes.length]),
    input_masks: new ort.Tensor("float32", new Float32Array(maskHeight * maskWidth), [1, 1, maskHeight, maskWidth]),
    has_input_masks: new ort.Tensor("float32", new Float32Array(1), [1]),
  };
}
