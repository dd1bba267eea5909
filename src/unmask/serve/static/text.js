// The text with its words, and which of them are masked. Places in the text count characters as Python does.

import { post } from "./api.js";
import { el } from "./dom.js";
import { t } from "./words.js";

export const MASK = "[MASK]";
export const MAX_CHARACTERS = 10_000;

export class MaskedText {
  text = "";
  masks = new Set(); // numbers of words
  #points = []; // characters, where a string has two units for some
  #tokenized = new Map(); // model -> {tokens, words}
  #model = ""; // whose words are shown

  get words() {
    return this.#tokenized.get(this.#model)?.words ?? [];
  }

  get tokens() {
    return this.#tokenized.get(this.#model)?.tokens ?? [];
  }

  get hasMasks() {
    return this.masks.size > 0 || this.words.some((word) => word.is_mask);
  }

  slice(first, last) {
    return this.#points.slice(first, last).join("");
  }

  wordText(index) {
    return this.slice(this.words[index].first, this.words[index].last);
  }

  /** Read a text with each model. Masks stay on the words before and after a change. */
  async read(text, models, signal) {
    const answers = text
      ? await Promise.all(models.map((model) => post("/tokenize", { texts: [text], model }, signal)))
      : models.map(() => ({ results: [{ tokens: [], words: [] }] }));
    const before = this.words.map((_, index) => this.wordText(index));
    this.text = text;
    this.#points = Array.from(text);
    this.#model = models[0];
    this.#tokenized = new Map(models.map((model, number) => [model, answers[number].results[0]]));
    const after = this.words.map((_, index) => this.wordText(index));
    if (before.length) this.masks = movedMasks(this.masks, before, after);
    this.masks = new Set([...this.masks].filter((index) => index < after.length && !this.words[index].is_mask));
  }

  /** Forget the text, and mask these words of the next one. */
  restart(masks) {
    this.text = "";
    this.#points = [];
    this.#tokenized.clear();
    this.masks = new Set(masks);
  }

  /** Return the masks for a model in the order of the text: first, last, word, and the ids of the tokens they replace. */
  slots(model) {
    const { tokens, words } = this.#tokenized.get(model);
    const slots = [...this.masks].map((index) => {
      const { first, last } = this.words[index];
      const ids = tokens.filter((token) => token.first < last && token.last > first).map((token) => token.id);
      return { first, last, word: this.wordText(index), ids };
    });
    const typed = words.filter((word) => word.is_mask);
    slots.push(...typed.map(({ first, last }) => ({ first, last, word: MASK, ids: [] })));
    return slots.sort((a, b) => a.first - b.first);
  }

  /** Return the text with masks: as many for each word as it has tokens, or one. */
  prompt(model, { oneEach = false } = {}) {
    let at = 0;
    let prompt = "";
    for (const { first, last, ids } of this.slots(model)) {
      prompt += this.slice(at, first) + MASK.repeat(oneEach ? 1 : Math.max(1, ids.length));
      at = last;
    }
    return prompt + this.slice(at);
  }

  /** Return the text with another word at a place. */
  replaced(index, word) {
    const { first, last } = this.words[index];
    return this.slice(0, first) + word + this.slice(last);
  }
}

/** Return the masks on the words that a change of the text left, at its beginning and its end. */
function movedMasks(masks, before, after) {
  let head = 0;
  while (head < Math.min(before.length, after.length) && before[head] === after[head]) head += 1;
  let tail = 0;
  const most = Math.min(before.length, after.length) - head;
  while (tail < most && before[before.length - 1 - tail] === after[after.length - 1 - tail]) tail += 1;
  const moved = [...masks].map((index) => {
    if (index < head) return index;
    return index >= before.length - tail ? index + after.length - before.length : -1;
  });
  return new Set(moved.filter((index) => index >= 0));
}

/** The words as buttons that mask them. One of them is reached by Tab, the others by the arrow keys. */
export class WordBar {
  #buttons = [];

  constructor(node, text, onChange) {
    this.node = node;
    this.text = text;
    this.onChange = onChange;
    node.addEventListener("keydown", (event) => this.#move(event));
    node.addEventListener("focusin", (event) => this.#makeCurrent(event.target));
  }

  render() {
    this.node.setAttribute("aria-label", t("words"));
    const parts = [];
    let at = 0;
    this.#buttons = [];
    this.text.words.forEach((word, index) => {
      parts.push(this.text.slice(at, word.first));
      at = word.last;
      if (word.is_mask) {
        parts.push(el("span", { className: "word typed" }, MASK));
        return;
      }
      const button = el("button", { type: "button", className: word.is_unknown ? "word unknown" : "word", tabIndex: -1 });
      button.textContent = this.text.wordText(index);
      button.addEventListener("click", () => this.#toggle(button, index));
      this.#buttons.push(button);
      this.#show(button, index);
      parts.push(button);
    });
    this.node.replaceChildren(...parts);
    if (this.#buttons.length) this.#buttons[0].tabIndex = 0;
  }

  #toggle(button, index) {
    if (!this.text.masks.delete(index)) this.text.masks.add(index);
    this.#show(button, index);
    this.onChange();
  }

  #show(button, index) {
    const word = this.text.wordText(index);
    const isMasked = this.text.masks.has(index);
    button.setAttribute("aria-pressed", String(isMasked));
    if (isMasked) button.setAttribute("aria-label", t("masked", { word }));
    else if (this.text.words[index].is_unknown) button.setAttribute("aria-label", t("unknownWord", { word }));
    else button.removeAttribute("aria-label");
  }

  #makeCurrent(button) {
    for (const one of this.#buttons) one.tabIndex = one === button ? 0 : -1;
  }

  #move(event) {
    const last = this.#buttons.length - 1;
    const at = this.#buttons.indexOf(document.activeElement);
    const places = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last };
    if (at < 0 || !(event.key in places)) return;
    event.preventDefault();
    this.#buttons[Math.max(0, Math.min(last, places[event.key]))].focus();
  }
}
