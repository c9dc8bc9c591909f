// Small helpers for the document.

export const byId = (id) => document.getElementById(id);

/** A new element; text goes in as text, so nothing that a model or a person wrote becomes HTML. */
export function element(tag, { text, onclick, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  if (onclick) made.addEventListener("click", onclick);
  made.append(...children);
  return made;
}

export function button(text, onclick, attributes = {}) {
  return element("button", { type: "button", text, onclick, ...attributes });
}

/** Show a problem's words in a paragraph, or hide it. */
export function show(paragraph, text) {
  paragraph.textContent = text;
  paragraph.hidden = !text;
}

/** Have a screen reader say this once. */
export function announce(text) {
  byId("status").textContent = text;
}
