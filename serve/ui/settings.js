// The settings drawer. The key is kept for this tab only, the rest in this browser.

import { byId } from "./elements.js";

const SETTINGS = "counsel.settings";
const KEY = "counsel.key";
const NUMBERS = ["temperature", "top_p", "max_completion_tokens", "seed"];
const DEFAULTS = { system: "", temperature: 0.7, top_p: 1, max_completion_tokens: null, seed: null, blind: true };

let current = { ...DEFAULTS, ...JSON.parse(localStorage.getItem(SETTINGS) ?? "{}") };

export const settings = () => current;
export const key = () => sessionStorage.getItem(KEY) ?? "";

/** The sampling fields of a request, without those that are not set. */
export function sampling() {
  return Object.fromEntries(NUMBERS.filter((name) => current[name] !== null).map((name) => [name, current[name]]));
}

export function change(changes) {
  current = { ...current, ...changes };
  localStorage.setItem(SETTINGS, JSON.stringify(current));
  fill();
}

function fill() {
  byId("key").value = key();
  byId("system").value = current.system;
  byId("blind").checked = current.blind;
  for (const name of NUMBERS) byId(name).value = current[name] ?? "";
}

/** Open the drawer; `onChange` is called after each change. */
export function prepareSettings(onChange) {
  const dialog = byId("settings");
  byId("open-settings").addEventListener("click", () => {
    fill();
    dialog.showModal();
  });
  byId("key").addEventListener("change", () => {
    sessionStorage.setItem(KEY, byId("key").value.trim());
    onChange();
  });
  byId("system").addEventListener("change", () => change({ system: byId("system").value.trim() }));
  byId("blind").addEventListener("change", () => change({ blind: byId("blind").checked }));
  for (const name of NUMBERS) {
    byId(name).addEventListener("change", (event) => {
      const { value, validity } = event.target;
      // An invalid number keeps the drawer open, with the browser's own message.
      if (validity.valid) change({ [name]: value === "" ? DEFAULTS[name] : Number(value) });
    });
  }
}
