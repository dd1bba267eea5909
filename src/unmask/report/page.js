"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const language = document.getElementById("language");
  const theme = document.getElementById("theme");

  // Words ------------------------------------------------------------------------------------------------------------

  const word = (key, values = []) => {
    const pair = report.words[key];
    const text = pair ? pair[language.value === "ko" ? 1 : 0] : key;
    return text.replace(/\{(\d)\}/g, (_, number) => values[number]);
  };

  const translate = () => {
    root.lang = language.value;
    for (const element of document.querySelectorAll("[data-t]")) {
      element.textContent = word(element.dataset.t, JSON.parse(element.dataset.a || "[]"));
    }
    for (const element of document.querySelectorAll("[data-t-label]")) {
      element.setAttribute("aria-label", word(element.dataset.tLabel, JSON.parse(element.dataset.a || "[]")));
    }
  };

  // Charts -----------------------------------------------------------------------------------------------------------

  const config = {
    background: null,
    aria: false, // each chart has one label; its points are in tables
    font: getComputedStyle(document.body).fontFamily, // Vega measures texts in it
    range: { category: [0, 1, 2, 3, 4, 5, 6, 7].map((number) => `var(--c${number})`) },
    axis: {
      labelColor: "var(--text)", titleColor: "var(--muted)", gridColor: "var(--rule)", domainColor: "var(--rule)",
      tickColor: "var(--rule)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal",
    },
    legend: { labelColor: "var(--text)", labelFontSize: 12, labelLimit: 260, symbolStrokeWidth: 2 },
    text: { fontSize: 12 },
    point: { size: 28, filled: true },
    view: { stroke: null },
  };

  const axis = () => document.querySelector("input[name=axis]:checked")?.value || "step";

  // Returns a specification with the words, the x axis and the data in place of their names.
  const completed = (value) => {
    if (Array.isArray(value)) return value.map(completed);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, completed(inner)]));
    }
    if (value === "@x") return axis();
    if (value === "@axis") return word(axis() === "seconds" ? `axis_time_${report.unit}` : `axis_${axis()}`);
    return typeof value === "string" && value.startsWith("@w:") ? word(value.slice(3)) : value;
  };

  const names = (value, found = new Set()) => {
    if (value && typeof value === "object") {
      if (value.data?.name) found.add(value.data.name);
      Object.values(value).forEach((inner) => names(inner, found));
    }
    return found;
  };

  const rows = (name) => {
    const table = report.tables[name] || [];
    return name.startsWith("groups-") ? completed(table) : table; // only names of groups are words
  };

  const draw = async () => {
    delete root.dataset.drawn;
    for (const element of document.querySelectorAll(".chart")) {
      const spec = completed(report.charts[element.dataset.chart]);
      spec.datasets = Object.fromEntries([...names(spec)].map((name) => [name, rows(name)]));
      await vegaEmbed(element, { ...spec, config }, { actions: false, renderer: "svg", tooltip: { disableDefaultStyle: false } });
      element.querySelector("svg").setAttribute("aria-hidden", "true");
    }
    root.dataset.drawn = "true";
  };

  // Sentences --------------------------------------------------------------------------------------------------------

  const show = (element) => {
    const { steps, last, letters } = report.sentences[element.dataset.sentences];
    const chosen = steps[Number(element.querySelector("input").value)];
    const label = word("at_step", [chosen.step.toLocaleString("en"), last.toLocaleString("en")]);
    element.querySelector("output").textContent = label;
    element.querySelector("input").setAttribute("aria-valuetext", label);
    element.querySelector(".sentences").replaceChildren(...chosen.lines.map((spans) => {
      const line = document.createElement("p");
      for (const [text, state, truth] of spans) {
        const span = state === "plain" ? document.createTextNode(text) : document.createElement("mark");
        if (state !== "plain") {
          span.className = state;
          span.textContent = state === "wrong" && !letters ? `${text} → ${truth}` : text;
          span.title = state === "wrong" ? `${word("wrong_truth")}: ${text} → ${truth}` : word("correct");
        }
        line.append(span);
      }
      return line;
    }));
  };

  // Start ------------------------------------------------------------------------------------------------------------

  const sentences = document.querySelectorAll("[data-sentences]");
  for (const element of sentences) element.querySelector("input").addEventListener("input", () => show(element));
  const update = () => { translate(); sentences.forEach(show); return draw(); };
  language.value = navigator.language.toLowerCase().startsWith("ko") ? "ko" : "en";
  language.addEventListener("change", update);
  theme.addEventListener("change", () => { root.dataset.theme = theme.value; });
  for (const input of document.querySelectorAll("input[name=axis]")) input.addEventListener("change", draw);

  // A closed section has no width: its charts are drawn again when it opens.
  for (const section of document.querySelectorAll("details.run")) {
    section.addEventListener("toggle", () => { if (section.open) window.dispatchEvent(new Event("resize")); });
  }
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((section) => { section.open = true; });
  });
  window.addEventListener("afterprint", () => closed.forEach((section) => { section.open = false; }));
  update();
})();
