// From low-resolution logits to a mask of the picture's size, as sam3rt.masks does it.

const FILL = 10; // the logit of a filled pixel

/** Fill background components (8-connected) of at most so many pixels, in place. */
export function fillHoles(logits, [height, width], mostArea) {
  if (mostArea <= 0) return;
  const seen = Uint8Array.from(logits, (value) => value > 0);
  for (let start = 0; start < seen.length; start++) {
    if (seen[start]) continue;
    const hole = [start];
    seen[start] = 1;
    for (let done = 0; done < hole.length; done++) {
      const [row, column] = [Math.floor(hole[done] / width), hole[done] % width];
      for (let y = Math.max(row - 1, 0); y <= Math.min(row + 1, height - 1); y++) {
        for (let x = Math.max(column - 1, 0); x <= Math.min(column + 1, width - 1); x++) {
          const at = y * width + x;
          if (!seen[at]) hole.push(at);
          seen[at] = 1;
        }
      }
    }
    if (hole.length <= mostArea) for (const at of hole) logits[at] = FILL;
  }
}

/**
 * Resize logits to the picture's size, bilinear without antialiasing, and threshold them: a mask as
 * the server's, with eight pixels a byte.
 *
 * Columns are interpolated first, then rows.
 */
export function upsample(logits, [height, width], { originalSize, inputSize }, manifest) {
  const axis = (at, inputs) =>
    manifest.masks.upsampling === "unpad"
      ? composed(bilinear(inputs, manifest.image.size[at]), bilinear(inputSize[at], originalSize[at]))
      : bilinear(inputs, originalSize[at]);
  const [outputHeight, outputWidth] = originalSize;
  const wide = mixColumns(logits, height, width, axis(1, width));
  const length = Math.ceil(outputWidth / 8);
  const mask = new Uint8Array(outputHeight * length);
  const sums = new Float32Array(outputWidth);
  axis(0, height).forEach((taken, y) => {
    sums.fill(0);
    for (const [from, weight] of taken) {
      const row = wide.subarray(from * outputWidth, (from + 1) * outputWidth);
      for (let x = 0; x < outputWidth; x++) sums[x] += row[x] * weight;
    }
    for (let x = 0; x < outputWidth; x++) {
      if (sums[x] > 0) mask[y * length + (x >> 3)] |= 128 >> (x & 7);
    }
  });
  return mask;
}

function mixColumns(logits, height, width, columns) {
  const wide = new Float32Array(height * columns.length);
  columns.forEach((taken, x) => {
    for (const [from, weight] of taken) {
      for (let y = 0; y < height; y++) wide[y * columns.length + x] += logits[y * width + from] * weight;
    }
  });
  return wide;
}

/** What each output takes of which inputs, [input, weight] pairs: half-pixel centres, clamped. */
function bilinear(inputs, outputs) {
  const step = Math.fround(inputs / outputs);
  return Array.from({ length: outputs }, (_, at) => {
    // Rounded where PyTorch rounds.
    const centre = Math.max(Math.fround(step * (at + 0.5) - 0.5), 0);
    const lower = Math.min(Math.floor(centre), inputs - 1);
    const fraction = centre - lower;
    return lower === inputs - 1 || fraction === 0 ? [[lower, 1]] : [[lower, 1 - fraction], [lower + 1, fraction]];
  });
}

/** One resize after another; the second may take a part of what the first gives. */
function composed(first, second) {
  return second.map((taken) => {
    const weights = new Map();
    for (const [middle, share] of taken) {
      for (const [from, weight] of first[middle]) weights.set(from, (weights.get(from) ?? 0) + share * weight);
    }
    return [...weights];
  });
}
