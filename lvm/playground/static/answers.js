// The answers: cards that fill row by row, their order, downloads.

import { find, make, picture } from "./dom.js";

const uri = png => `data:image/png;base64,${png}`;

export class Answers {
  constructor() {
    find("order").onchange = () => this.sort();
    this.cards = [];
  }

  // Empty cards of an answer that is being drawn.
  begin(asked) {
    this.asked = asked;
    this.result = null;
    const { candidates, new: frames } = asked.settings;
    this.pictures = [];
    this.cards = Array.from({ length: candidates }, (_, i) => {
      const places = Array.from({ length: frames }, () => make("div", { class: "picture" }));
      this.pictures.push(places);
      return make("figure", { class: "card drawing", "aria-label": `Candidate ${i + 1}` },
        make("div", { class: "pictures" }, ...places), make("figcaption", {}, make("b", {}, String(i + 1))));
    });
    find("cards").classList.toggle("long", frames > 1);
    find("cards").replaceChildren(...this.cards);
    for (const id of ["tools", "legend", "link-line"]) find(id).hidden = true;
    this.progress(0);
  }

  progress(part) {
    find("progress").hidden = part === null;
    find("progress").value = part ?? 0;
  }

  rows({ frame, rows, of, images }) {
    this.progress((frame + rows / of) / this.asked.settings.new);
    images?.forEach((png, c) => {
      const place = this.pictures[c][frame], img = place.querySelector("img");
      const alt = rows === of ? `Candidate ${c + 1}, frame ${frame + 1}` : "unfinished";
      if (img) Object.assign(img, { src: uri(png), alt });
      else place.append(picture(uri(png), alt));
    });
  }

  done(result) {
    this.result = result;
    this.progress(null);
    const best = result.nats.indexOf(Math.min(...result.nats)), several = result.nats.length > 1;
    this.cards.forEach((card, c) => {
      card.classList.remove("drawing");
      card.classList.toggle("best", several && c === best);
      const files = this.pictures[c].map((place, f) => make("a", {
        href: place.querySelector("img").src, download: `answer-${c + 1}${this.pictures[c].length > 1 ? `-${f + 1}` : ""}.png`,
        "aria-label": `Download candidate ${c + 1}, frame ${f + 1}`,
      }, this.pictures[c].length > 1 ? `PNG ${f + 1}` : "PNG"));
      const facts = [make("b", {}, String(c + 1)), `${result.nats[c].toFixed(3)} nats a code`];
      if (result.gain) facts.push(`prompt ${result.gain[c] < 0 ? "−" : "+"}${Math.abs(result.gain[c]).toFixed(3)}`);
      if (several && c === best) card.append(make("span", { class: "tag" }, "likeliest"));
      card.querySelector("figcaption").replaceChildren(
        ...facts.map(fact => typeof fact === "string" ? make("span", {}, fact) : fact),
        make("span", { class: "files" }, ...files));
    });
    find("order").querySelector('[value="gain"]').hidden = !result.gain;
    if (!result.gain && find("order").value === "gain") find("order").value = "drawn";
    find("sheet").href = uri(result.sheet);
    find("tools").hidden = find("legend").hidden = false;
    this.sort();
  }

  // Takes down what was not finished.
  drop() {
    this.progress(null);
    if (this.result) return;
    this.cards = [];
    find("cards").replaceChildren();
  }

  sort() {
    if (!this.result) return;
    const by = find("order").value, { nats, gain } = this.result;
    const value = { drawn: c => c, nats: c => nats[c], gain: c => -(gain?.[c] ?? 0) }[by];
    const order = this.cards.map((_, c) => c).sort((a, b) => value(a) - value(b));
    find("cards").replaceChildren(...order.map(c => this.cards[c]));
  }

  // What is needed to show this answer again.
  kept() { return { asked: this.asked, result: this.result, sources: this.pictures.map(p => p.map(x => x.querySelector("img").src)) }; }

  again({ asked, result, sources }) {
    this.begin(asked);
    sources.forEach((frames, c) => frames.forEach((src, f) => {
      this.pictures[c][f].append(picture(src, `Candidate ${c + 1}, frame ${f + 1}`));
    }));
    this.done(result);
  }
}
