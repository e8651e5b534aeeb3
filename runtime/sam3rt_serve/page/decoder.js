// The decoder in this page: a worker with ONNX Runtime.

export class InPageDecoder {
  #worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  #waiting = new Map();
  #asked = 0;

  constructor() {
    this.#worker.onmessage = ({ data }) => {
      const { resolve, reject } = this.#waiting.get(data.id);
      this.#waiting.delete(data.id);
      const { error, status } = data; // the server's status, where it refused the embedding
      if (error) reject(Object.assign(new Error(`The decoder in this page failed: ${error}`), { status }));
      else resolve(data.answer);
    };
    this.#worker.onerror = (event) => {
      event.preventDefault();
      for (const { reject } of this.#waiting.values()) reject(new Error("The decoder could not be started in this page."));
      this.#waiting.clear();
    };
    /** Resolves once the graph is loaded. */
    this.ready = this.#call({});
  }

  /** An object's three masks, as the server gives them. */
  segment(imageId, { points, labels, box }) {
    return this.#call({ imageId, prompts: { points, labels, box } });
  }

  #call(question) {
    return new Promise((resolve, reject) => {
      const id = ++this.#asked;
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, ...question });
    });
  }
}
