// The form, and what becomes of it.

import { Asked, kept, Refused, theModel, useToken } from "./service.js";
import { enliven, filling, finished } from "./heatmap.js";
import * as history from "./history.js";
import * as steer from "./steer.js";
import { label, make, printable } from "./texts.js";

const EXAMPLES = {
  "A fact": { prompt: "The capital of France is", units: "word" },
  "A passage": {
    prompt: "The Amazon is the largest river by discharge. The Nile, which flows north through eleven countries, is often called the longest. "
      + "The Rhine rises in the Alps and ends in the North Sea.\nQuestion: Which river flows north?\nAnswer: The",
    units: "word",
  },
  "This rather than that": { prompt: "The capital of Australia is", target: "Canberra", versus: "Sydney", units: "word" },
};
const STRONGEST = 16;
const NESTED = [["paragraph", "sentence", "word"], ["paragraph", "word"], ["sentence", "word"]];
const at = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const choose = (name, value) => { document.querySelector(`input[name="${name}"][value="${value}"]`).checked = true; };
let running = null;
let pictures = []; // data: URLs
let saved = null; // blob: URL of the result that is shown
let drawing = 0; // the newest heatmap that was asked for

// The form -------------------------------------------------------------------------------------------------------------

function formChanged() {
  const given = chosen("answer") === "given";
  at("given").hidden = !given;
  at("target").required = given;
  at("length").hidden = given;
  at("most").disabled = given; // what cannot be seen must not keep the form back
  const nested = at("units").value.includes(" "); // which are all exact
  at("depth").querySelector('[value="strongest"]').disabled = nested;
  if (nested && at("depth").value === "strongest") at("depth").value = "all";
  at("versus").disabled = pictures.length > 0;
  for (const option of at("units").options) option.disabled = pictures.length > 0 && option.value.includes(" ");
  if (at("units").selectedOptions[0]?.disabled) at("units").value = "word";
}

function asked() {
  const given = chosen("answer") === "given";
  const prompt = at("prompt").value;
  const spaced = (text) => (at("space").checked && !/^\s/u.test(text) && !/\s$/u.test(prompt) ? ` ${text}` : text);
  const depth = { strongest: { exact: STRONGEST }, direct: { recompute: 1 } }[at("depth").value];
  return {
    prompt,
    chat: chosen("form") === "chat",
    target: given ? spaced(at("target").value) : null,
    versus: given && !at("versus").disabled && at("versus").value ? spaced(at("versus").value) : null,
    units: at("units").value.includes(" ") ? at("units").value.split(" ") : at("units").value,
    max_new_tokens: Number(at("most").value) || null,
    store: at("store").checked,
    ...depth,
    ...(pictures.length && { images: pictures, image_units: Number(at("tiles").value) || at("tiles").value }),
  };
}

/** The form as it was when this was asked. */
function fill({ prompt, chat, target, versus, units, exact, recompute, space }) {
  at("prompt").value = prompt;
  choose("form", chat ? "chat" : "plain");
  choose("answer", target ? "given" : "own");
  at("target").value = target ?? "";
  at("versus").value = versus ?? "";
  at("space").checked = space ?? false;
  at("depth").value = exact ? "strongest" : recompute ? "direct" : "all";
  const cut = [units].flat().join(" ");
  if ([...at("units").options].some((option) => option.value === cut)) at("units").value = cut;
  formChanged();
}

async function look(files) {
  pictures = await Promise.all([...files].map((file) => new Promise((done, failed) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => done(reader.result));
    reader.addEventListener("error", () => failed(reader.error));
    reader.readAsDataURL(file);
  })));
  at("pictures").replaceChildren(...pictures.map((source, i) => make("img", { src: source, alt: `image ${i + 1}` })));
  formChanged();
}

// Asking ---------------------------------------------------------------------------------------------------------------

const say = (text) => { at("status").textContent = text; };

function complain(error) {
  at("fault").hidden = !error;
  at("fault").textContent = error ? error.message : "";
  if (error instanceof Refused && error.status === 401) askForToken();
}

function busy(is) {
  const focused = document.activeElement;
  at("cancel").hidden = !is;
  at("progress").hidden = !is;
  at("go").disabled = is;
  at("outcome").setAttribute("aria-busy", is);
  if (is) at("progress").removeAttribute("value"); // nothing known yet
  if (is && (focused === at("go") || focused === document.body)) at("cancel").focus();
  if (!is && focused === at("cancel")) at("go").focus();
}

async function explain() {
  const request = asked();
  const mine = (running = new Asked());
  busy(true);
  complain(null);
  say("Asking …");
  clear();
  at("outcome").hidden = false;
  try {
    const result = await mine.result("v1/explanations", request, listener(request));
    await show(request, result, request.store ? mine.id : null);
    window.history.replaceState(null, "", request.store ? `#${mine.id}` : location.pathname + location.search);
    history.remember(request, result);
    listHistory();
    say(`Done: ${result.units.length} units.`);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say("");
    if (error.name !== "AbortError") complain(error);
    if (!at("heatmap").hasChildNodes()) at("outcome").hidden = true;
  } finally {
    if (running === mine) running = null;
    busy(false);
  }
}

function listener(request) {
  let said = "";
  let live = null;
  return {
    queued: ({ position }) => say(position ? `Waiting; ${position} before this one.` : "Reading …"),
    answer({ text }) {
      at("saying").hidden = false;
      at("answering").textContent = printable((said += text));
    },
    question(question) {
      at("saying").hidden = true;
      const mine = (drawing += 1);
      live = filling(question, request.images, (section) => {
        if (mine !== drawing) return false; // the result is there
        at("heatmap").replaceChildren(section);
        enliven();
        return true;
      });
      live.drawn.catch(complain);
      say(`Explaining ${live.count} units …`);
    },
    units({ units }) {
      live.more(units).catch(complain);
      say(`Explaining ${live.count} units …`);
    },
    progress({ done, total }) {
      at("progress").value = total ? done / total : 0;
    },
    unit({ index, scores, exact }) {
      const known = live.known(index, scores, exact);
      at("heatmap").dataset.known = known;
    },
  };
}

function clear() {
  drawing += 1;
  at("heatmap").replaceChildren();
  at("answering").textContent = "";
  steer.end();
  for (const id of ["saying", "keep", "steer"]) at(id).hidden = true;
}

async function show(request, result, id) {
  const mine = (drawing += 1);
  const heatmap = finished(result, request.images);
  at("outcome").hidden = false;
  at("saying").hidden = true;
  if (saved) URL.revokeObjectURL(saved);
  saved = URL.createObjectURL(new Blob([JSON.stringify(result), "\n"], { type: "application/json" }));
  at("save").href = saved;
  at("keep").hidden = false;
  at("link").hidden = !id;
  if (id) at("link").href = `#${id}`;
  steer.begin(request, result);
  const section = await heatmap;
  if (mine !== drawing) return; // another one was asked for meanwhile
  at("heatmap").replaceChildren(section);
  enliven();
}

// Results of before ------------------------------------------------------------------------------------------------------

function listHistory() {
  const list = history.entries();
  at("history").hidden = !list.length;
  at("entries").replaceChildren(...list.map(({ time, asked: request, result }) => {
    const when = new Date(time);
    const button = make("button", { type: "button" },
      make("bdi", {}, `${label(request.prompt, 60)} → ${label(result.target, 30)}`),
      make("time", { datetime: when.toISOString() }, when.toLocaleString([], { dateStyle: "short", timeStyle: "short" })));
    button.addEventListener("click", () => again(request, result));
    return make("li", {}, button);
  }));
}

async function again(request, result) {
  running?.stop();
  complain(null);
  fill(request);
  try {
    await show(request, result, null);
    say("A result of before.");
    at("outcome").focus();
  } catch (error) {
    complain(error);
  }
}

async function fromLink() {
  const id = location.hash.slice(1);
  if (!/^[0-9a-f]{32}$/.test(id)) return;
  try {
    const result = await kept(id);
    running?.stop();
    complain(null);
    clear();
    await show({}, result, id);
    say("A result that was kept.");
  } catch (error) {
    complain(error);
  }
}

// The beginning ----------------------------------------------------------------------------------------------------------

function askForToken() {
  at("unlock").hidden = false;
  at("token").focus();
}

async function begin() {
  try {
    const model = await theModel();
    at("unlock").hidden = true;
    complain(null);
    at("model").textContent = `${model.id} · ${model.dtype} on ${model.device} · up to ${model.limits.tokens} tokens`;
    at("units").replaceChildren(...[...model.units.map((unit) => [unit]), ...NESTED].map((levels) =>
      make("option", { value: levels.join(" ") }, levels.join(" → "))));
    if (model.units.includes("word")) at("units").value = "word";
    at("most").max = model.limits.new_tokens;
    at("most").value = Math.min(32, model.limits.new_tokens);
    at("forms").hidden = !model.chat;
    at("seeing").hidden = !model.images;
    await fromLink();
  } catch (error) {
    at("model").textContent = "";
    if (error.status === 401 && at("unlock").hidden) askForToken();
    else complain(error);
  }
}

for (const [name, example] of Object.entries(EXAMPLES)) {
  const button = make("button", { type: "button" }, name);
  button.addEventListener("click", () => {
    fill({ ...example, space: true });
    at("prompt").focus();
  });
  at("examples").append(button);
}
at("explain").addEventListener("change", formChanged);
at("versus").addEventListener("input", formChanged);
at("images").addEventListener("change", () => look(at("images").files));
for (const input of document.querySelectorAll('input[name="form"]'))
  input.addEventListener("change", () => { at("space").checked = chosen("form") === "plain"; });
at("explain").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) explain();
});
at("explain").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("explain").requestSubmit(at("go"));
});
at("cancel").addEventListener("click", () => running?.stop());
at("forget").addEventListener("click", () => {
  history.forget();
  listHistory();
});
at("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(at("token").value);
  at("token").value = "";
  begin();
});
addEventListener("hashchange", fromLink);
listHistory();
begin();
