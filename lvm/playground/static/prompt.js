// The places of the prompt: pairs and a query, or frames. Files come by button, drop or paste.

import { imageUrl, upload } from "./api.js";
import { find, make, picture } from "./dom.js";

const HOW = {
  pairs: "Drop in pairs, before and after, all of one task, and a query to be changed the same way.",
  frames: "Drop in a few frames of a sequence, in order; the model goes on.",
};

export class Prompt {
  // `changed` is called after every change, `problem` with the text of each file that is refused.
  constructor(limits, { changed, problem }) {
    Object.assign(this, { limits, changed, problem, kind: "pairs", places: { pairs: [null, null, null], frames: [] } });
    this.target = null; // the place that the file dialog was opened for
    find("choose").onclick = () => this.open(null);
    find("clear").onclick = () => this.set(this.kind, this.kind === "pairs" ? [null, null, null] : []);
    find("more").onclick = () => { this.slots.splice(-1, 0, null, null); this.show(); };
    find("files").onchange = async event => {
      const files = [...event.target.files];
      event.target.value = "";
      await this.add(files, this.target);
    };
    for (const radio of document.getElementsByName("kind")) {
      radio.onchange = () => { this.kind = radio.value; this.show(); };
    }
    document.addEventListener("paste", event => {
      const files = [...event.clipboardData.files];
      if (files.length) { event.preventDefault(); this.add(files, null); }
    });
    document.addEventListener("dragover", event => { event.preventDefault(); this.mark(event.target); });
    document.addEventListener("dragleave", event => { if (!event.relatedTarget) this.mark(null); });
    document.addEventListener("drop", event => {
      event.preventDefault();
      this.mark(null);
      const place = event.target.closest?.(".slot[data-place]")?.dataset.place;
      this.add([...event.dataTransfer.files], place === undefined ? null : Number(place));
    });
  }

  get slots() { return this.places[this.kind]; }
  get images() { return this.slots.map(image => image?.id); }
  get full() { return this.slots.length > 0 && this.slots.every(Boolean); }
  get most() { return this.kind === "pairs" ? 2 * Math.floor((this.limits.room - 1) / 2) + 1 : this.limits.room; }

  set(kind, images) {
    this.kind = kind;
    this.places[kind] = images;
    this.show();
  }

  open(place) {
    this.target = place;
    find("files").multiple = true;
    find("files").click();
  }

  // Uploads files one after another and puts each into the next free place from `place` on.
  async add(files, place) {
    if (!files.length) { this.problem("that was no picture file; drop files, not links or text"); return; }
    const names = new Intl.Collator(undefined, { numeric: true });
    files.sort((a, b) => names.compare(a.name, b.name));
    const { kind } = this;
    if (kind === "pairs") this.makeRoom(files.length);
    this.problem(null);
    for (const file of files) {
      try {
        const image = { id: await upload(file, this.limits), name: file.name };
        if (this.kind !== kind) return;
        this.put(image, place);
        place = null;
      } catch (error) {
        this.problem(error.message);
      }
    }
  }

  makeRoom(count) {
    while (this.slots.filter(slot => !slot).length < count && this.slots.length + 2 <= this.most) {
      this.slots.splice(-1, 0, null, null);
    }
  }

  put(image, place) {
    if (place === null) place = this.slots.indexOf(null);
    if (place < 0) {
      if (this.kind === "pairs" || this.slots.length >= this.most) {
        throw new Error(`${image.name} has no place: this model reads at most ${this.most} pictures before its answer`);
      }
      place = this.slots.length;
    }
    this.slots[place] = image;
    this.show();
  }

  remove(place) {
    if (this.kind === "frames") this.slots.splice(place, 1);
    else this.slots[place] = null;
    this.show();
    document.querySelector(`.slot[data-place="${place}"] button`)?.focus();
  }

  mark(target) {
    for (const element of document.querySelectorAll(".over")) element.classList.remove("over");
    if (!target) return;
    (target.closest?.(".slot[data-place]") || find("slots")).classList.add("over");
  }

  show() {
    const { kind, slots } = this;
    for (const radio of document.getElementsByName("kind")) radio.checked = radio.value === kind;
    find("how").textContent = HOW[kind];
    find("more").hidden = kind !== "pairs";
    find("more").disabled = slots.length + 2 > this.most;
    const rows = [];
    if (kind === "frames") {
      const line = make("div", { class: "row frames" }, ...slots.map((_, i) => this.slot(i, `Frame ${i + 1}`)));
      if (slots.length < this.most) line.append(this.slot(slots.length, `Frame ${slots.length + 1}`));
      rows.push(line);
    } else {
      const pairs = (slots.length - 1) / 2;
      for (let i = 0; i < pairs; i++) {
        const row = make("div", { class: "row", role: "group", "aria-label": `Pair ${i + 1}` },
          this.slot(2 * i, `Before ${i + 1}`), make("span", { class: "arrow" }, "→"), this.slot(2 * i + 1, `After ${i + 1}`));
        if (pairs > 1) {
          row.append(make("button", {
            type: "button", class: "remove", title: "Remove this pair", "aria-label": `Remove pair ${i + 1}`,
            onclick: () => { slots.splice(2 * i, 2); this.show(); find("more").focus(); },
          }, "×"));
        }
        rows.push(row);
      }
      rows.push(make("div", { class: "row", role: "group", "aria-label": "Query" }, this.slot(slots.length - 1, "Query"),
        make("span", { class: "arrow" }, "→"), make("div", { class: "slot asked", "aria-hidden": "true" }, "?")));
    }
    find("slots").replaceChildren(...rows);
    this.changed();
  }

  slot(place, label) {
    const image = this.slots[place];
    const button = make("button", {
      type: "button", "aria-label": image ? `${label}: ${image.name}; choose another` : `${label}: empty; choose a picture`,
      title: image?.name, onclick: () => this.open(place),
      onkeydown: event => { if (image && ["Delete", "Backspace"].includes(event.key)) this.remove(place); },
    }, image ? picture(imageUrl(image.id), "") : label);
    const slot = make("div", { class: image ? "slot full" : "slot", "data-place": place }, button);
    if (image) {
      slot.append(make("button", {
        type: "button", class: "remove", title: "Remove", "aria-label": `Remove ${label}`, onclick: () => this.remove(place),
      }, "×"));
    }
    return slot;
  }
}
