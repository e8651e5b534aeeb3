// What was asked for: objects with their prompts, and every earlier state for undo.
//
// States are replaced, never changed. Only an object's `result` arrives later.

// What masks of earlier states may take; three of 24 megapixels take 9 MB.
const MOST_BYTES = 256 << 20;
// The colours of sam3rt's overlays, which colour-blind people can tell apart too.
const COLOURS = ["#0084d6", "#f09400", "#cc5fa5", "#f0e442", "#56c4f0", "#d55400", "#009e73"];

/** An object without prompts. Points are [x, y], labels 1 or 0, a box [x0, y0, x1, y1], pixels. */
export function newObject(number) {
  const colour = COLOURS[(number - 1) % COLOURS.length];
  return { number, colour, points: [], labels: [], box: null, choice: null, result: null, earlier: null };
}

/** The object with other prompts. What was found before is shown until its own result is there. */
export function withPrompts(object, prompts) {
  return { ...object, ...prompts, choice: null, result: null, earlier: shownResult(object) };
}

export const isEmpty = (object) => object.points.length === 0 && object.box === null;
export const shownResult = (object) => object.result ?? object.earlier;

/** The index of the mask that is shown: the chosen one, else that of the best score. */
export function shownMask(object) {
  const scores = shownResult(object)?.scores ?? [];
  return object.choice ?? scores.indexOf(Math.max(...scores));
}

/** What the model thinks of a mask, within 0 and 1: of a score that is an IoU or its log-odds. */
export function confidence(score, unit) {
  return unit === "log_odds" ? 1 / (1 + Math.exp(-score)) : Math.min(Math.max(score, 0), 1);
}

/** What the masks take that only earlier states hold. */
function bytesOfEarlier(states) {
  const masksOf = (state) => state.objects.flatMap((object) => shownResult(object)?.masks ?? []);
  const masks = new Set(states.flatMap(masksOf));
  for (const mask of masksOf(states.at(-1))) masks.delete(mask);
  return [...masks].reduce((sum, mask) => sum + mask.byteLength, 0);
}

/** The current state, which is `{objects, active}` with the number of the active object. */
export class History {
  #states;
  #undone;

  constructor() {
    this.clear();
  }

  clear() {
    this.#states = [{ objects: [newObject(1)], active: 1 }];
    this.#undone = [];
  }

  get state() {
    return this.#states.at(-1);
  }

  get active() {
    return this.state.objects.find((object) => object.number === this.state.active);
  }

  get canUndo() {
    return this.#states.length > 1;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  /** Put a changed version in its object's place. */
  change(object) {
    const objects = this.state.objects.map((old) => (old.number === object.number ? object : old));
    this.#push({ ...this.state, objects });
  }

  /** Start another object, unless the active one is still empty. */
  next() {
    if (isEmpty(this.active)) return;
    const number = Math.max(...this.state.objects.map((object) => object.number)) + 1;
    this.#push({ objects: [...this.state.objects, newObject(number)], active: number });
  }

  select(number) {
    // Undo is for what was asked, not for where one looked.
    this.#states[this.#states.length - 1] = { ...this.state, active: number };
  }

  remove(number) {
    const left = this.state.objects.filter((object) => object.number !== number);
    const objects = left.length ? left : [newObject(1)];
    const active = number === this.state.active ? objects.at(-1).number : this.state.active;
    this.#push({ objects, active });
  }

  reset() {
    this.#push({ objects: [newObject(1)], active: 1 });
  }

  undo() {
    if (this.canUndo) this.#undone.push(this.#states.pop());
  }

  redo() {
    if (this.canRedo) this.#states.push(this.#undone.pop());
  }

  /** Forget every state that holds a version of an object which the model did not answer. */
  withdraw(object) {
    const isWithout = (state) => !state.objects.includes(object);
    this.#states = this.#states.filter(isWithout);
    this.#undone = this.#undone.filter(isWithout);
  }

  #push(state) {
    this.#states.push(state);
    this.#undone = [];
    while (bytesOfEarlier(this.#states) > MOST_BYTES) this.#states.shift();
  }
}
