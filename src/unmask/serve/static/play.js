// The views that play: text that is generated step by step, and the quiz.

import { post, stream } from "./api.js";
import { bar, el, labeled, select, visible } from "./dom.js";
import { number, percent, t } from "./words.js";
import { isOfModel, problem } from "./views.js";

// Generate -----------------------------------------------------------------------------------------------------------

export const generate = {
  options: { length: 12, order: "", temperature: 0.7, seed: 0, speed: 4 },
  frames: [], // lines of the answer, for each model
  problems: [], // for each model, what to show in place of an answer
  shown: 0, // number of the step on the page
  timer: 0,

  controls(page) {
    this.prefix = el("input", { type: "text", className: "wide" });
    this.suffix = el("input", { type: "text" });
    this.isEdited = false;
    for (const input of [this.prefix, this.suffix]) input.addEventListener("input", () => { this.isEdited = true; });
    const field = (name, properties) => {
      const input = el("input", { type: "number", value: this.options[name], ...properties });
      input.addEventListener("input", () => { this.options[name] = Number(input.value); });
      return input;
    };
    const orders = [["", t("defaultOrder")], ...["confidence", "random", "gibbs", "left-to-right"].map((order) => [order, t(order)])];
    const order = select(orders, this.options.order, (value) => { this.options.order = value; });
    this.play = el("button", { type: "button", disabled: true }, t("play"));
    this.play.addEventListener("click", () => (this.timer ? this.stop() : this.start(page)));
    this.slider = el("input", { type: "range", min: 0, max: 0, value: 0, step: 1 });
    this.slider.addEventListener("input", () => { this.stop(); this.showStep(page, Number(this.slider.value)); });
    const speed = el("input", { type: "range", min: 1, max: 20, value: this.options.speed, step: 1 });
    const say = () => speed.setAttribute("aria-valuetext", t("perSecond", { value: speed.value }));
    speed.addEventListener("input", () => { this.options.speed = Number(speed.value); say(); if (this.timer) this.start(page); });
    say();
    const begin = el("button", { type: "submit", className: "primary" }, t("start"));
    return [
      labeled(t("prefix"), this.prefix), labeled(t("suffix"), this.suffix),
      labeled(t("length"), field("length", { min: 1, max: 200 })), labeled(t("order"), order),
      labeled(t("temperature"), field("temperature", { min: 0.1, max: 100, step: 0.1 })),
      labeled(t("seed"), field("seed", { min: 0, max: 2 ** 31 - 1 })), begin, this.play,
      labeled(t("step"), this.slider), labeled(t("speed"), speed),
    ];
  },

  /** Take the text around the masks, unless it was edited here. */
  refresh(page) {
    if (!this.isEdited) {
      const { words } = page.text;
      const masked = [...page.text.masks].filter((index) => index < words.length).sort((a, b) => a - b);
      this.prefix.value = page.text.slice(0, masked.length ? words[masked[0]].first : undefined).trimEnd();
      this.suffix.value = masked.length ? page.text.slice(words[masked.at(-1)].last).trimStart() : "";
    }
    this.clear(page);
  },

  clear(page) {
    this.stop();
    this.frames = [];
    page.show([el("p", { className: "hint" }, t("generateHint"))]);
  },

  leave() {
    this.stop();
  },

  async submit(page, signal) {
    this.clear(page);
    this.shown = 0;
    this.frames = page.models.map(() => []);
    this.problems = page.models.map(() => null);
    const { length, order, temperature, seed } = this.options;
    const body = { prefix: this.prefix.value, suffix: this.suffix.value, length, order: order || null, temperature, seed };
    this.start(page);
    await Promise.all(page.models.map(async (model, index) => {
      try {
        await stream("/generate", { ...body, model }, signal, (line) => {
          this.frames[index].push(line);
          this.slider.max = line.steps;
          this.play.disabled = false;
        });
      } catch (error) {
        if (!isOfModel(error)) throw error;
        this.problems[index] = problem(error);
      }
    }));
    if (!this.available()) this.stop();
    this.showStep(page, this.shown);
    page.report(this.frames.map((frames, index) => (frames.length ? `${page.models[index]}: ${frames.at(-1).text}` : "")).join(" "));
  },

  available() {
    return Math.max(0, ...this.frames.map((frames) => frames.length));
  },

  start(page) {
    this.stop();
    this.play.textContent = t("pause");
    const isComplete = () => this.frames.every((frames, index) => this.problems[index] || typeof frames.at(-1)?.text === "string");
    if (isComplete() && this.shown >= this.available()) this.shown = 0;
    this.timer = setInterval(() => {
      if (this.shown < this.available()) this.showStep(page, this.shown + 1);
      else if (isComplete()) this.stop();
    }, 1000 / this.options.speed);
  },

  stop() {
    clearInterval(this.timer);
    this.timer = 0;
    if (this.play) this.play.textContent = t("play");
  },

  showStep(page, step) {
    this.shown = step;
    this.slider.value = step;
    page.show(this.frames.map((frames, index) => {
      const line = frames[Math.min(step, frames.length) - 1];
      const heading = el("h2", {}, page.models[index]);
      const parts = line ? this.text(line) : this.problems[index];
      return el("article", { className: "column", "aria-label": page.models[index] }, heading, parts);
    }));
  },

  text(line) {
    const parts = line.segments.map(({ text, state }) => state === "mask"
      ? el("span", { className: "boxes" }, Array.from(text, () => el("span", { className: "box" }, "\u00a0")))
      : el("span", { className: `segment ${state}` }, text));
    const facts = [t("stepOf", { step: line.step, steps: line.steps })];
    if (typeof line.log_probability === "number") facts.push(t("logProbability", { value: number(line.log_probability, 2) }));
    return [el("p", { className: "generated" }, parts), el("p", { className: "facts" }, facts.join(", "))];
  },
};

// Quiz ---------------------------------------------------------------------------------------------------------------

const QUIZ_TOKENS = 4; // longest word that the model may guess

export const quiz = {
  score: { you: 0, model: 0, count: 0 },
  word: null,
  asked: [],

  controls() {
    this.input = el("input", { type: "text", autocomplete: "off", maxLength: 100 });
    this.check = el("button", { type: "submit", className: "primary" }, t("check"));
    return [labeled(t("guess"), this.input), this.check, el("p", { className: "hint" }, t("quizHint"))];
  },

  refresh(page) {
    const words = page.text.words.map((word, index) => ({ ...word, index, text: page.text.wordText(index) }));
    const possible = words.filter((word) => !word.is_unknown && word.num_tokens <= QUIZ_TOKENS && /\p{L}{2}/u.test(word.text));
    const hasMask = words.some((word) => word.is_mask);
    if (hasMask || !possible.length || words.length < 3) {
      this.word = null;
      page.show([el("p", { className: "hint" }, t(hasMask ? "quizMask" : "quizTooShort"))]);
      return;
    }
    const fresh = possible.filter((word) => !this.asked.includes(word.text));
    const choices = fresh.length ? fresh : possible;
    this.word = choices[Math.floor(Math.random() * choices.length)];
    this.asked = [...(fresh.length ? this.asked : []), this.word.text];
    this.isAnswered = false;
    this.input.value = "";
    this.input.disabled = false;
    this.check.textContent = t("check");
    this.question = el("p", { className: "question" }, page.text.slice(0, this.word.first),
      el("span", { className: "box wide" }, "\u00a0?\u00a0"), page.text.slice(this.word.last));
    page.show([el("div", {}, this.question, this.scoreLine())]);
  },

  scoreLine() {
    return el("p", { className: "facts" }, t("quizScore", this.score));
  },

  async submit(page, signal) {
    if (!this.word) return;
    if (this.isAnswered) {
      this.refresh(page);
      this.input.focus();
      return;
    }
    const { text: answer, first, last } = this.word;
    const [model] = page.models;
    const prompt = `${page.text.slice(0, first)}[MASK]${page.text.slice(last)}`;
    const body = { texts: [prompt], model, top: 5, joint: "beam", words: QUIZ_TOKENS };
    const { fillings } = (await post("/fill", body, signal)).results[0];
    const guesses = fillings.map((one) => visible(one.groups[0]));
    const guess = this.input.value.trim();
    const isSame = (one) => one.toLowerCase().normalize() === answer.toLowerCase().normalize();
    const isRight = isSame(guess);
    const isModelRight = guesses.length > 0 && isSame(guesses[0]);
    this.score.count += 1;
    this.score.you += isRight ? 1 : 0;
    this.score.model += isModelRight ? 1 : 0;
    this.isAnswered = true;
    this.input.disabled = true;
    this.check.textContent = t("next");
    const result = t("quizResult", {
      word: answer,
      you: t(isRight ? "right" : "wrong"),
      guess: guesses[0] ?? t("noGuess"),
      model: t(isModelRight ? "right" : "wrong"),
    });
    const rows = fillings.map((one, index) => el("li", { className: isSame(guesses[index]) ? "same" : "" },
      el("span", { className: "candidate" }, guesses[index]), bar(Math.exp(one.log_probability)),
      el("span", { className: "figure" }, percent(Math.exp(one.log_probability)))));
    this.question.querySelector(".box").textContent = answer;
    page.show([el("div", {}, this.question, el("p", { className: "result" }, result), el("ol", { className: "bars" }, rows), this.scoreLine())]);
    page.report(`${result} ${t("quizScore", this.score)}`);
    this.check.focus();
  },
};
