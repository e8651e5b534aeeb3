// The decoder in this page: a worker with ONNX Runtime, and embeddings that the server sent.

import { getEmbedding, getFacts } from "./server.js";

export class InPageDecoder {
  #worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  #waiting = new Map();
  #asked = 0;
  #imageId = null;
  #queue = Promise.resolve();

  constructor() {
    this.#worker.onmessage = ({ data }) => {
      const { resolve, reject } = this.#waiting.get(data.id);
      this.#waiting.delete(data.id);
      if (data.error) reject(new Error(`The decoder in this page failed: ${data.error}`));
      else resolve(data.answer);
    };
    this.#worker.onerror = (event) => {
      event.preventDefault();
      for (const { reject } of this.#waiting.values()) reject(new Error("The decoder could not be started in this page."));
      this.#waiting.clear();
    };
    /** Resolves once the graph is loaded. */
    this.ready = getFacts().then(({ manifest }) => this.#call("load", { manifest }));
  }

  /** An object's three masks, as the server gives them. */
  segment(picture, { points, labels, box }) {
    const answer = this.#queue.then(async () => {
      await this.ready;
      if (this.#imageId !== picture.image_id) {
        const embedding = await getEmbedding(picture.image_id);
        await this.#call("take", { embedding }, [embedding]);
        this.#imageId = picture.image_id;
      }
      return this.#call("segment", { points, labels, box });
    });
    this.#queue = answer.catch(() => {});
    return answer;
  }

  #call(action, content, transfer = []) {
    return new Promise((resolve, reject) => {
      const id = ++this.#asked;
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, action, content }, transfer);
    });
  }
}
