// Creates elements. Text is only ever set as text, so markup in it is never read as markup.

/** Return an element with properties ("aria-…", "data-…" and "role" are attributes), and children that are nodes or text. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (/^(aria-|data-|role$|for$|list$)/.test(name)) node.setAttribute(name, value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
    else node[name] = value;
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Return a labeled control: a label with a caption and an input in it. */
export const labeled = (caption, control) => el("label", {}, el("span", {}, caption), control);

/** Return a select with [value, caption] options. */
export function select(options, value, onChange) {
  const node = el("select", {}, options.map(([one, caption]) => el("option", { value: one }, caption)));
  node.value = value;
  node.addEventListener("change", () => onChange(node.value));
  return node;
}

/** Return a text on one line, with signs for line ends and tabs, and for a space that is all of it. */
export function visible(text) {
  const shown = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/[\u0000-\u001f\u007f]/g, "�");
  return /^ +$/.test(shown) ? shown.replaceAll(" ", "␣") : shown;
}

/** Return a bar whose length is a fraction. Screen readers get the number beside it instead. */
export function bar(fraction, className = "") {
  const width = `${(100 * Math.max(0, Math.min(1, fraction))).toFixed(1)}%`;
  return el("span", { className: "bar", "aria-hidden": "true" }, el("span", { className, style: { width } }));
}
