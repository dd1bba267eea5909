// The page: models, text, views, language, link, and what happens when the server can't be reached.

import { get, Latest, RequestFailed } from "./api.js";
import { byId, el } from "./dom.js";
import { generate, quiz } from "./play.js";
import { MaskedText, MAX_CHARACTERS, WordBar } from "./text.js";
import { attention, fill, surprisal, swap } from "./views.js";
import { currentLanguage, number, setLanguage, t } from "./words.js";

const VIEWS = { fill, surprisal, swap, attention, generate, quiz };
const TYPING_MS = 150;
const RETRY_MS = 1000;
const EXAMPLES = { en: "The cat sat on the mat and looked at the moon.", ko: "서울은 대한민국의 수도이다." };

const node = {
  text: byId("text"), words: byId("words"), tabs: byId("tabs"), panel: byId("panel"), controls: byId("controls"),
  answers: byId("answers"), status: byId("status"), alert: byId("alert"), modelA: byId("model-a"), modelB: byId("model-b"),
  counts: byId("counts"), language: byId("language"),
};

let models = []; // of the server
let view = "fill";
let retry = 0;
const text = new MaskedText();
const reading = new Latest(failed);
const computing = new Latest(failed);

/** What the views see of the page. */
const page = {
  text,
  answers: node.answers,

  get models() {
    return [node.modelA.value, node.modelB.value].filter(Boolean);
  },

  show(children) {
    node.answers.removeAttribute("aria-busy");
    node.answers.replaceChildren(...children);
  },

  report(message) {
    if (node.status.textContent !== message) node.status.textContent = message;
  },

  refresh(delay = 0) {
    computing.start(async (signal) => VIEWS[view].refresh(page, signal), delay);
  },
};

const bar = new WordBar(node.words, text, () => {
  showCounts();
  saveLink();
  page.refresh();
});

// Text ---------------------------------------------------------------------------------------------------------------

function readText(delay = 0) {
  const value = node.text.value;
  if (value.length > MAX_CHARACTERS && Array.from(value).length > MAX_CHARACTERS) {
    node.text.value = text.text;
    warn(t("tooLong", { got: number(Array.from(value).length, 0), most: number(MAX_CHARACTERS, 0) }));
    return;
  }
  if (!page.models.length) return; // the server was never reached
  computing.stop();
  reading.start(async (signal) => {
    await text.read(value, page.models, signal);
    signal.throwIfAborted();
    clearWarning();
    bar.render();
    showCounts();
    saveLink();
    page.refresh();
  }, delay);
}

function showCounts() {
  const { words, tokens, masks } = text;
  node.counts.textContent = t("counts", { words: words.length, tokens: tokens.length, masks: masks.size });
  byId("clear").disabled = masks.size === 0;
}

// Messages -----------------------------------------------------------------------------------------------------------

function warn(message) {
  node.alert.hidden = false;
  node.alert.textContent = message;
}

function clearWarning() {
  node.alert.hidden = true;
  node.alert.textContent = "";
}

/** Show an error. If the server doesn't answer, try until it does, then compute again. */
function failed(error) {
  node.answers.removeAttribute("aria-busy");
  if (!(error instanceof RequestFailed)) throw error;
  warn(error.hint ? `${error.message} (${error.hint})` : error.message);
  if (error.isOffline && !retry) retry = setTimeout(reconnect, RETRY_MS);
}

async function reconnect() {
  try {
    await loadModels();
  } catch {
    retry = setTimeout(reconnect, RETRY_MS);
    return;
  }
  retry = 0;
  clearWarning();
  page.report(t("online"));
  readText();
}

// Models and views ---------------------------------------------------------------------------------------------------

async function loadModels() {
  const answer = await get("/models");
  const chosen = [node.modelA.value, node.modelB.value];
  models = answer.models;
  const groups = Object.entries(Object.groupBy(models, (model) => model.group));
  const options = () => groups.map(([group, members]) =>
    el("optgroup", { label: group }, members.map(({ name }) => el("option", { value: name }, name))));
  node.modelA.replaceChildren(...options());
  node.modelB.replaceChildren(el("option", { value: "" }, t("none")), ...options());
  const known = (name) => models.some((model) => model.name === name);
  node.modelA.value = known(chosen[0]) ? chosen[0] : answer.first[0];
  node.modelB.value = known(chosen[1]) ? chosen[1] : "";
  return answer;
}

function showTabs() {
  node.tabs.setAttribute("aria-label", t("views"));
  node.tabs.replaceChildren(...Object.keys(VIEWS).map((name) => {
    const tab = el("button", { type: "button", id: `tab-${name}`, role: "tab", "aria-controls": "panel" }, t(name));
    tab.addEventListener("click", () => open(name));
    return tab;
  }));
}

function open(name) {
  VIEWS[view].leave?.();
  view = name;
  for (const tab of node.tabs.children) {
    const isOpen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(isOpen));
    tab.tabIndex = isOpen ? 0 : -1;
  }
  node.panel.setAttribute("aria-labelledby", `tab-${name}`);
  node.controls.replaceChildren(...VIEWS[name].controls(page));
  node.answers.replaceChildren();
  page.report("");
  saveLink();
  page.refresh();
}

function moveTab(event) {
  const names = Object.keys(VIEWS);
  const at = names.indexOf(view);
  const places = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 };
  if (!(event.key in places)) return;
  event.preventDefault();
  open(names[(places[event.key] + names.length) % names.length]);
  byId(`tab-${view}`).focus();
}

// Link ---------------------------------------------------------------------------------------------------------------

function saveLink() {
  const values = new URLSearchParams({ text: node.text.value, view, a: node.modelA.value });
  if (node.modelB.value) values.set("b", node.modelB.value);
  if (text.masks.size) values.set("masks", [...text.masks].sort((x, y) => x - y).join("."));
  history.replaceState(null, "", `#${values}`);
}

/** Take text, masks, models and view from the address; return whether it has a text. */
function openLink() {
  const values = new URLSearchParams(location.hash.slice(1));
  const value = values.get("text");
  if (value !== null && Array.from(value).length > MAX_CHARACTERS) {
    warn(t("badLink"));
    return false;
  }
  const names = models.map((model) => model.name);
  if (names.includes(values.get("a"))) node.modelA.value = values.get("a");
  if (value !== null) node.modelB.value = names.includes(values.get("b")) ? values.get("b") : "";
  if (Object.hasOwn(VIEWS, values.get("view") ?? "")) view = values.get("view");
  const masks = (values.get("masks") ?? "").split(".").filter((one) => /^\d{1,5}$/.test(one)).map(Number);
  text.restart(masks);
  if (value !== null) node.text.value = value;
  return value !== null;
}

async function share() {
  saveLink();
  try {
    await navigator.clipboard.writeText(location.href);
    page.report(t("shared"));
  } catch {
    page.report(t("shareByHand"));
  }
}

// Start --------------------------------------------------------------------------------------------------------------

function translate(language) {
  setLanguage(language);
  node.language.value = currentLanguage();
  showTabs();
  const none = node.modelB.options[0];
  if (none) none.textContent = t("none");
  bar.render();
  showCounts();
}

function listen() {
  node.text.addEventListener("input", () => readText(TYPING_MS));
  for (const choice of [node.modelA, node.modelB]) choice.addEventListener("change", () => readText());
  node.controls.addEventListener("submit", (event) => {
    event.preventDefault();
    const { submit } = VIEWS[view];
    if (submit) computing.start((signal) => submit.call(VIEWS[view], page, signal));
  });
  node.tabs.addEventListener("keydown", moveTab);
  byId("share").addEventListener("click", share);
  byId("clear").addEventListener("click", () => {
    text.masks.clear();
    bar.render();
    showCounts();
    saveLink();
    page.refresh();
  });
  node.language.addEventListener("change", () => { translate(node.language.value); open(view); });
  window.addEventListener("hashchange", () => { openLink(); open(view); readText(); });
}

async function start() {
  translate(currentLanguage());
  listen();
  try {
    const { first } = await loadModels();
    if (first.length > 1) node.modelB.value = first[1];
  } catch (error) {
    failed(error);
  }
  if (!openLink()) node.text.value = EXAMPLES[currentLanguage()];
  open(view);
  readText();
}

start();
