// The views of a text: candidates, surprisal, a swapped word, attention. Each has controls and an answer for each model.

import { post } from "./api.js";
import { bar, el, labeled, select, visible } from "./dom.js";
import { number, percent, t } from "./words.js";

/** Return whether an error concerns one model, so that the others still answer. */
export const isOfModel = (error) => "hint" in error && !error.isOffline;

export const problem = ({ message, hint }) => el("p", { className: "problem" }, message, hint ? ` (${hint})` : "");

/** Show what `compute` returns for each model, in columns. An error of one model is shown in its column. */
async function columns(page, signal, compute) {
  page.answers.setAttribute("aria-busy", "true");
  const found = await Promise.all(page.models.map(async (model) => {
    try {
      return await compute(model);
    } catch (error) {
      if (!isOfModel(error)) throw error;
      return [problem(error)];
    }
  }));
  signal.throwIfAborted();
  page.show(found.map((parts, index) =>
    el("article", { className: "column", "aria-label": page.models[index] }, el("h2", {}, page.models[index]), parts)));
}

const hint = (key) => el("p", { className: "hint" }, t(key));

// Fill ---------------------------------------------------------------------------------------------------------------

const TOP = 8;
const MOST_REPORTED = 3; // masks of each model whose candidates a screen reader announces

export const fill = {
  options: { joint: "off", words: "0" },

  controls(page) {
    const sizes = [["0", t("asInText")], ["1", "1"], ...[2, 3, 4].map((count) => [String(count), t("upTo", { count })])];
    const size = select(sizes, this.options.words, (value) => { this.options.words = value; page.refresh(); });
    size.disabled = this.options.joint === "off";
    const joints = [["off", t("oneByOne")], ["beam", t("beam")], ["best-first", t("bestFirst")]];
    const joint = select(joints, this.options.joint, (value) => {
      this.options.joint = value;
      size.disabled = value === "off";
      page.refresh();
    });
    return [labeled(t("candidates"), joint), labeled(t("maskSize"), size)];
  },

  async refresh(page, signal) {
    if (!page.text.hasMasks) {
      page.show([hint(page.text.words.length ? "fillHint" : "noWords")]);
      page.report("");
      return;
    }
    const { joint } = this.options;
    const words = joint === "off" ? 0 : Number(this.options.words);
    const reports = [];
    await columns(page, signal, async (model) => {
      const prompt = page.text.prompt(model, { oneEach: words > 0 });
      const body = { texts: [prompt], model, top: TOP, joint: joint === "off" ? null : joint, words: words || null };
      const [result] = (await post("/fill", body, signal)).results;
      return joint === "off" ? fillCards(page, model, result, reports) : fillings(model, result, reports);
    });
    page.report(reports.join(". "));
  },
};

function fillCards(page, model, result, reports) {
  const slots = page.text.slots(model).flatMap(({ word, ids }) =>
    (ids.length ? ids : [null]).map((id, part) => ({ word, id, part: part + 1, parts: Math.max(1, ids.length) })));
  return result.masks.map((mask, index) => {
    const { word, id, part, parts } = slots[index];
    const title = t(parts > 1 ? "maskTitleOf" : "maskTitle", { number: index + 1, word, part, parts });
    if (index < MOST_REPORTED) {
      const best = mask.candidates.slice(0, 3).map((one) => `${visible(one.shown)} ${percent(one.score)}`).join(", ");
      reports.push(t("fillStatus", { model, number: index + 1, answers: best }));
    }
    const rows = mask.candidates.map((one) => {
      const isSame = one.id === id;
      const mark = isSame ? el("span", { className: "mark", role: "img", "aria-label": t("inText"), title: t("inText") }, "✓") : null;
      return el("li", { className: isSame ? "same" : "" },
        el("span", { className: "row-name" }, el("span", { className: "candidate" }, visible(one.shown)), mark),
        bar(one.score),
        el("span", { className: "figure" }, percent(one.score)));
    });
    return el("section", { className: "card" }, el("h3", {}, title), el("ol", { className: "bars" }, rows));
  });
}

function fillings(model, result, reports) {
  if (!result.fillings.length) return [hint("noFilling")];
  const best = result.fillings[0].log_probability;
  const names = result.fillings.map((one) => one.groups.map(visible).join(" … "));
  reports.push(t("jointStatus", { model, answers: names.slice(0, 3).join(", ") }));
  const rows = result.fillings.map((one, index) => el("li", {},
    el("span", { className: "candidate" }, names[index]),
    bar(Math.exp(one.log_probability - best)),
    el("span", { className: "figure" }, number(one.log_probability, 2)),
    el("span", { className: "sentence" }, one.sequence)));
  const title = `${t("jointTitle")} (${t("logProbability", { value: "" }).trim()})`;
  return [el("section", { className: "card" }, el("h3", {}, title), el("ol", { className: "bars" }, rows))];
}

// Surprisal ----------------------------------------------------------------------------------------------------------

const DARKEST = 16; // bits

/** Return a scored text: each word with its surprisal below it, and a color by it. `marked` is the number of a word. */
function coloredText(score, marked = -1) {
  const parts = [];
  let at = 0;
  score.words.forEach((word, index) => {
    const first = score.text.indexOf(word.word, at);
    if (first < 0) return;
    parts.push(score.text.slice(at, first));
    at = first + word.word.length;
    const share = word.surprisal === null ? 0 : Math.min(1, Math.max(0, word.surprisal / DARKEST));
    const tokens = word.tokens.map((one) => `${one.token} ${one.surprisal === null ? "?" : number(one.surprisal)}`);
    parts.push(el("span",
      { className: index === marked ? "scored marked" : "scored", style: { "--share": String(share) }, title: tokens.join(", ") },
      el("span", {}, word.word),
      el("small", {}, word.surprisal === null ? "?" : number(word.surprisal))));
  });
  parts.push(score.text.slice(at));
  return el("p", { className: "surprisal" }, parts);
}

function scoreFacts(score) {
  return el("p", { className: "facts" }, t("scoreFacts", {
    bits: number(score.surprisal),
    perCharacter: number(score.bits_per_character, 2),
    perplexity: number(score.pseudo_perplexity),
  }));
}

function methodControl(view, page) {
  const methods = [["within-word", t("withinWord")], ["original", t("original")]];
  return labeled(t("method"), select(methods, view.options.method, (value) => {
    view.options.method = value;
    page.refresh();
  }));
}

export const surprisal = {
  options: { method: "within-word" },

  controls(page) {
    return [methodControl(this, page), hint("surprisalHint")];
  },

  async refresh(page, signal) {
    if (!page.text.words.length) return page.show([hint("noWords")]);
    const reports = [];
    await columns(page, signal, async (model) => {
      const body = { texts: [page.text.text], model, method: this.options.method };
      const [score] = (await post("/score", body, signal)).results;
      reports.push(t("scoreStatus", { model, bits: number(score.surprisal) }));
      return [coloredText(score), scoreFacts(score)];
    });
    return page.report(reports.join(". "));
  },
};

// Swap ---------------------------------------------------------------------------------------------------------------

const SAME = 0.05; // bits: less is shown as 0.0

export const swap = {
  options: { method: "within-word", word: 0, replacement: "" },

  controls(page) {
    this.choice = select([], "", (value) => { this.options.word = Number(value); page.refresh(); });
    const input = el("input", { type: "text", value: this.options.replacement, maxLength: 100, size: 14 });
    input.addEventListener("input", () => { this.options.replacement = input.value; page.refresh(250); });
    if (page.text.masks.size) this.options.word = Math.min(...page.text.masks);
    this.listed = null;
    return [labeled(t("word"), this.choice), labeled(t("replacement"), input), methodControl(this, page)];
  },

  async refresh(page, signal) {
    const { words, text } = page.text;
    if (this.listed !== text) {
      this.choice.replaceChildren(...words.map((_, index) => el("option", { value: String(index) }, page.text.wordText(index))));
      this.options.word = Math.min(this.options.word, Math.max(0, words.length - 1));
      this.choice.value = String(this.options.word);
      this.listed = text;
    }
    const replacement = this.options.replacement.trim();
    if (!words.length || !replacement) return page.show([hint(words.length ? "swapHint" : "noWords")]);
    const index = this.options.word;
    const texts = [text, page.text.replaced(index, replacement)];
    const reports = [];
    await columns(page, signal, async (model) => {
      const body = { texts, model, method: this.options.method };
      const [before, after] = (await post("/score", body, signal)).results;
      const difference = after.surprisal - before.surprisal;
      const result = Math.abs(difference) < SAME ? t("same") : t("swapResult", {
        bits: number(Math.abs(difference)),
        direction: t(difference > 0 ? "more" : "less"),
        judgment: t(difference > 0 ? "unlikelier" : "likelier"),
      });
      reports.push(`${model}: ${result}`);
      return [
        el("h3", {}, t("before")), coloredText(before, index), scoreFacts(before),
        el("h3", {}, t("after")), coloredText(after, index), scoreFacts(after),
        el("p", { className: "result" }, result),
      ];
    });
    return page.report(reports.join(" "));
  },
};

// Attention ----------------------------------------------------------------------------------------------------------

export const attention = {
  options: { layer: 1, head: 1 },

  controls(page) {
    const field = (name) => {
      const input = el("input", { type: "number", min: 1, max: 1000, value: this.options[name] });
      input.addEventListener("input", () => {
        const value = Number(input.value);
        if (!Number.isInteger(value) || value < 1) return;
        this.options[name] = value;
        page.refresh(150);
      });
      return input;
    };
    this.fields = { layer: field("layer"), head: field("head") };
    return [labeled(t("layer"), this.fields.layer), labeled(t("head"), this.fields.head), hint("attentionHint")];
  },

  choose(page, layer, head) {
    this.options = { layer, head };
    this.fields.layer.value = layer;
    this.fields.head.value = head;
    page.refresh();
  },

  async refresh(page, signal) {
    if (!page.text.words.length) return page.show([hint("noWords")]);
    const { layer, head } = this.options;
    const reports = [];
    await columns(page, signal, async (model) => {
      const body = { text: page.text.prompt(model), model, layer: layer - 1, head: head - 1 };
      const answer = await post("/attention", body, signal);
      this.fields.layer.max = answer.distances.length;
      this.fields.head.max = answer.distances[0].length;
      const value = number(answer.distances[layer - 1][head - 1]);
      reports.push(t("attentionStatus", { model, layer, head, value }));
      return [heatMap(answer, layer, head), this.distances(page, answer)];
    });
    return page.report(reports.join(". "));
  },

  distances(page, { distances }) {
    const { layer, head } = this.options;
    const longest = Math.max(...distances.flat(), 1e-9);
    const rows = distances.map((row, l) => el("tr", {}, el("th", { scope: "row" }, String(l + 1)), row.map((value, h) => {
      const isChosen = l + 1 === layer && h + 1 === head;
      const label = t("distance", { layer: l + 1, head: h + 1, value: number(value) });
      const button = el("button", { type: "button", tabIndex: -1, title: label, "aria-label": label, "aria-pressed": String(isChosen) });
      button.textContent = number(value);
      button.style.setProperty("--share", String(value / longest));
      button.addEventListener("click", () => this.choose(page, l + 1, h + 1));
      return el("td", {}, button);
    })));
    const heads = el("tr", {}, el("td"), distances[0].map((_, h) => el("th", { scope: "col" }, String(h + 1))));
    return el("div", { className: "scroll" },
      el("table", { className: "distances" }, el("caption", {}, t("distanceTitle")), heads, rows));
  },
};

function heatMap({ tokens, weights }, layer, head) {
  const isDense = tokens.length > 24;
  const largest = Math.max(...weights.flat());
  const top = el("tr", {}, el("td"), tokens.map((token) => el("th", { scope: "col" }, el("span", {}, visible(token)))));
  const rows = weights.map((row, i) => el("tr", {}, el("th", { scope: "row" }, visible(tokens[i])), row.map((weight, j) => el("td",
    { style: { "--share": String(weight / largest) }, title: `${tokens[i]} → ${tokens[j]}: ${percent(weight)}` },
    String(Math.round(100 * weight))))));
  const table = el("table", { className: isDense ? "heat dense" : "heat" },
    el("caption", {}, t("attentionOf", { layer, head })), top, rows);
  return el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": t("attentionOf", { layer, head }) }, table);
}
