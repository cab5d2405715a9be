// The settings: a slider each, with the ranges that the server gives.

import { find, make } from "./dom.js";

const NAMES = {
  candidates: ["Candidates", ""],
  new: ["New frames", ""],
  temperature: ["Temperature", "0: the likeliest code each time"],
  top_k: ["Top-k", "0: all codes"],
  top_p: ["Top-p", "1: all codes"],
  min_p: ["Min-p", "0: all codes"],
  guidance: ["Guidance", "1: off; above, the prompt counts for more"],
  seed: ["Seed", ""],
};

export class Settings {
  constructor(limits) {
    this.inputs = {};
    for (const [key, [name, hint]] of Object.entries(NAMES)) {
      const { low, high, step, start } = limits[key];
      const id = `set-${key}`, seed = key === "seed";
      const input = make("input", {
        id, type: seed ? "number" : "range", min: low, max: high, step, value: start,
        "aria-describedby": hint ? `${id}-hint` : undefined,
      });
      const last = seed
        ? make("button", { type: "button", title: "Another seed", "aria-label": "Another seed",
          onclick: () => { input.value = Math.floor(Math.random() * 1e6); } }, "⟳")
        : make("output", { for: id }, String(start));
      if (!seed) input.oninput = () => { last.textContent = input.value; };
      const row = make("div", { class: "setting", id: `row-${key}` }, make("label", { for: id }, name), input, last);
      if (hint) row.append(make("small", { id: `${id}-hint` }, hint));
      find("settings").append(row);
      this.inputs[key] = input;
    }
  }

  forKind(kind) { find("row-new").hidden = kind === "pairs"; }

  values(kind) {
    const found = Object.fromEntries(Object.entries(this.inputs).map(([key, input]) => [key, input.valueAsNumber]));
    if (Number.isNaN(found.seed)) found.seed = 0;
    return kind === "pairs" ? { ...found, new: 1 } : found;
  }

  set(values) {
    for (const [key, input] of Object.entries(this.inputs)) {
      input.value = values[key];
      input.oninput?.();
    }
  }
}
