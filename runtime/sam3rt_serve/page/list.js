// The list of objects, with the masks of the active one to choose from.

import { isEmpty, shownMask, shownResult } from "./state.js";

const list = document.querySelector("#objects");

/**
 * Show a state's objects.
 * @param {object} state - see History.
 * @param {object} on - `select(number)`, `remove(number)` and `choose(index)`.
 */
export function showObjects(state, on) {
  // Buttons are made anew: the keyboard's focus goes to the one in the same place.
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  list.replaceChildren(...state.objects.map((object) => row(object, object.number === state.active, on)));
  if (focused) (list.querySelector(`[data-key="${focused}"]`) ?? list.querySelector(".active .select")).focus();
}

function row(object, isActive, on) {
  const name = `Object ${object.number}`;
  const result = shownResult(object);
  const said = isEmpty(object) ? "click on it" : result ? result.confidence[shownMask(object)].toFixed(2) : "…";
  const swatch = element("span", { className: "swatch" });
  swatch.style.setProperty("--colour", object.colour);
  const select = button("select", `select-${object.number}`, () => on.select(object.number));
  select.append(swatch, element("span", {}, name), element("span", { className: "score" }, said));
  select.setAttribute("aria-pressed", isActive);
  const remove = button("remove", `remove-${object.number}`, () => on.remove(object.number));
  remove.append("✕");
  remove.setAttribute("aria-label", `Remove ${name.toLowerCase()}`);
  remove.title = `Remove ${name.toLowerCase()}`;
  const item = element("li", { className: isActive ? "active" : "" }, element("div", { className: "object" }, select, remove));
  if (isActive && object.result) item.append(choices(object, on));
  return item;
}

function choices(object, on) {
  const shown = shownMask(object);
  const buttons = object.result.confidence.map((score, index) => {
    const choice = button("", `choice-${index}`, () => on.choose(index));
    choice.append(element("b", {}, `${index + 1}`), score.toFixed(2));
    choice.setAttribute("aria-label", `Mask ${index + 1}, score ${score.toFixed(2)}`);
    choice.setAttribute("aria-pressed", index === shown);
    choice.title = `Mask ${index + 1} (key ${index + 1})`;
    return choice;
  });
  const group = element("div", { className: "choices", role: "group" }, "Mask", ...buttons);
  group.setAttribute("aria-label", "Which mask");
  return group;
}

function button(className, key, action) {
  const made = element("button", { type: "button", className });
  made.dataset.key = key;
  made.addEventListener("click", action);
  return made;
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
