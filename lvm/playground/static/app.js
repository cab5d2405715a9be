// The page: puts prompt, settings, answers and history together.

import { about, answers as ask, imageUrl, recall } from "./api.js";
import { Answers } from "./answers.js";
import { find, make, picture } from "./dom.js";
import { Prompt } from "./prompt.js";
import { Settings } from "./settings.js";

const MOST_HISTORY = 20;
const status = text => { find("status").textContent = text; };

function problem(text) {
  if (text === null) find("problems").replaceChildren();
  else find("problems").append(make("li", {}, text));
}

const info = await about().catch(error => { problem(error.message); throw error; });
const settings = new Settings(info.limits);
const answers = new Answers();
const prompt = new Prompt(info, { changed: () => settings.forKind(prompt?.kind ?? "pairs"), problem });
const history = [];
let running = null; // AbortController of the answer that is being drawn

const count = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(info.parameters);
find("model").textContent = `${info.model}: ${count} parameters on ${info.device}, pictures of ` +
  `${info.size} × ${info.size} pixels as ${info.codes} codes, up to ${info.room} before the answer`;
if (info.size <= 96) document.body.classList.add("pixels");
prompt.show();

const placed = (kind, images, names = []) =>
  prompt.set(kind, images.map((id, i) => ({ id, name: names[i] || `picture ${i + 1}` })));

for (const example of info.examples) {
  const thumbs = example.images.slice(0, 4).map(id => picture(imageUrl(id), ""));
  find("examples").append(make("button", {
    type: "button", "aria-label": `Example: ${example.name}`, title: example.name,
    onclick: () => { problem(null); placed(example.kind, example.images); },
  }, make("span", { class: "thumbs" }, ...thumbs), make("span", { class: "name" }, example.name)));
}
find("examples-section").hidden = !info.examples.length;

function working(controller) {
  running = controller;
  find("stop").hidden = !controller;
  find("go").disabled = Boolean(controller);
}

function showLink(id) {
  window.history.replaceState(null, "", `#p=${id}`);
  find("link").value = location.href;
}

async function generate() {
  if (running) return;
  problem(null);
  if (!prompt.full) {
    problem(prompt.kind === "pairs"
      ? "some places of the prompt are empty; fill both pictures of each pair and the query, or remove the pair"
      : "there is no frame yet; add at least one picture");
    return;
  }
  const { kind } = prompt;
  const asked = { kind, images: prompt.images, settings: settings.values(kind) };
  const controller = new AbortController();
  let id = null;
  working(controller);
  answers.begin(asked);
  status("Sent …");
  if (matchMedia("(max-width: 50rem)").matches) find("answers").scrollIntoView();
  try {
    await ask(asked, event => {
      if (event.event === "prompt") id = event.id;
      else if (event.event === "queued") status(`${event.ahead} before this one in the queue`);
      else if (event.event === "start") status("Reading the prompt …");
      else if (event.event === "rows") {
        answers.rows(event);
        const frame = asked.settings.new > 1 ? `Frame ${event.frame + 1} of ${asked.settings.new}, row` : "Row";
        status(`${frame} ${event.rows} of ${event.of}`);
      } else if (event.event === "done") {
        answers.done(event);
        showLink(id);
        const count = event.nats.length === 1 ? "One answer" : `${event.nats.length} answers`;
        status(`${count} in ${event.seconds} s`);
        remember(id);
      }
    }, controller.signal);
  } catch (error) {
    answers.drop();
    if (error.name === "AbortError") status("Cancelled.");
    else { status("No answer."); problem(error.message); }
  } finally {
    working(null);
  }
}

function remember(id) {
  history.unshift({ id, ...answers.kept(), at: new Date() });
  history.length = Math.min(history.length, MOST_HISTORY);
  find("history-section").hidden = false;
  find("history").replaceChildren(...history.map(entry => {
    const { settings: s } = entry.asked;
    const what = `${entry.at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" })}, seed ${s.seed}`;
    const query = entry.asked.images.at(-1);
    return make("button", {
      type: "button", title: what, "aria-label": `Show again: ${what}`,
      onclick: () => {
        if (running) return;
        placed(entry.asked.kind, entry.asked.images);
        settings.set(s);
        answers.again(entry);
        showLink(entry.id);
        status(`Asked at ${what}`);
      },
    }, make("span", { class: "thumbs" }, picture(imageUrl(query), ""), picture(entry.sources[0].at(-1), "")),
    make("span", { class: "name" }, what));
  }));
}

// A link: its prompt and settings, asked again.
async function followLink() {
  const id = /^#p=([0-9a-f]{20})$/.exec(location.hash)?.[1];
  if (!id || running) return;
  problem(null);
  try {
    const found = await recall(id);
    placed(found.kind, found.images);
    settings.set(found.settings);
    if (!found.same_model) problem("this link was made with another model; the answers below are this one's");
  } catch (error) {
    problem(error.message);
    return;
  }
  await generate();
}

find("ask").onsubmit = event => { event.preventDefault(); generate(); };
find("stop").onclick = () => running?.abort();
document.addEventListener("keydown", event => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); generate(); }
});
find("copy").onclick = async () => {
  try {
    await navigator.clipboard.writeText(find("link").value);
    status("The link is copied.");
  } catch { // not allowed, or no secure context
    find("link-line").hidden = false;
    find("link").select();
  }
};
window.addEventListener("hashchange", followLink);
followLink();
