// The words of the prompt, to be turned down and up, and what the model answers then.

import { Asked } from "./service.js";
import { make, printable } from "./texts.js";

const PAUSE = 350; // ms after the last choice
const STATES = { "": "unchanged", down: "turned down", up: "turned up" };
const at = (id) => document.getElementById(id);
let asking = null; // of now: {asked, result, own}
let running = null;
let timer = 0;
let baseline = null; // whether the answer as it is is known

export function end() {
  clearTimeout(timer);
  running?.stop();
  running = null;
}

export function begin(asked, result) {
  end();
  at("steer").hidden = Boolean(asked.images?.length || asked.seen) || !asked.prompt;
  if (at("steer").hidden) return;
  asking = { asked, result };
  baseline = !asked.target;
  at("before").textContent = baseline ? printable(result.target) : "—";
  at("after").textContent = "—";
  at("words").replaceChildren(...pieces(result).map(({ text, start, end }) => {
    if (start === undefined) return printable(text);
    const button = make("button", { type: "button", "data-turned": "", "data-start": start, "data-end": end, title: STATES[""] }, printable(text));
    button.addEventListener("click", () => turn(button));
    return button;
  }));
}

/** Units of the prompt that do not overlap, or words where units are tokens; between them text that stays. */
function pieces({ prompt, units, settings }) {
  const characters = Array.from(prompt);
  let own = units.filter((unit) => unit.source === "prompt" && unit.start < unit.end).sort((a, b) => a.start - b.start);
  if (settings.units === "token" || own.some((unit, i) => i && unit.start < own[i - 1].end)) own = words(characters);
  const text = (start, end) => characters.slice(start, end).join("");
  const ends = [0, ...own.map((unit) => unit.end)];
  const parts = own.flatMap(({ start, end }, i) => [{ text: text(ends[i], start) }, { text: text(start, end), start, end }]);
  return [...parts, { text: text(ends.at(-1)) }].filter((part) => part.text);
}

function words(characters) {
  const found = [];
  characters.forEach((character, i) => {
    if (/\s/u.test(character)) return;
    const last = found.at(-1);
    if (last?.end === i) last.end = i + 1;
    else found.push({ start: i, end: i + 1 });
  });
  return found;
}

function mark(button, turned) {
  button.dataset.turned = turned;
  button.title = STATES[turned];
  if (turned) button.setAttribute("aria-label", `${button.textContent.trim()}, ${STATES[turned]}`);
  else button.removeAttribute("aria-label");
}

function turn(button) {
  mark(button, { "": "down", down: "up", up: "" }[button.dataset.turned]);
  later();
}

function later() {
  clearTimeout(timer);
  timer = setTimeout(answer, PAUSE);
}

const body = (spans) => {
  const { prompt, chat, max_new_tokens } = asking.asked;
  return { prompt, chat, max_new_tokens, spans };
};

async function answer() {
  running?.stop();
  const chosen = [...at("words").querySelectorAll("button")].filter((button) => button.dataset.turned);
  const after = at("after");
  if (!chosen.length) {
    after.textContent = "—";
    return;
  }
  const factors = { down: Number(at("down").value), up: Number(at("up").value) };
  const spans = chosen.map(({ dataset }) => ({ start: Number(dataset.start), end: Number(dataset.end), factor: factors[dataset.turned] }));
  const mine = (running = new Asked());
  after.setAttribute("aria-busy", "true"); // read out as a whole, not piece by piece
  try {
    if (!baseline) {
      const found = await mine.result("v1/answers", body([]), {});
      at("before").textContent = printable(found.answer);
      baseline = true;
    }
    let said = "";
    const result = await mine.result("v1/answers", body(spans), { answer: ({ text }) => (after.textContent = printable((said += text))) });
    after.textContent = printable(result.answer) || "(nothing)";
  } catch (error) {
    if (error.name !== "AbortError") after.textContent = `It did not work: ${error.message}`;
  } finally {
    if (running === mine) after.removeAttribute("aria-busy");
  }
}

at("reset").addEventListener("click", () => {
  for (const button of at("words").querySelectorAll("button")) mark(button, "");
  later();
});
for (const id of ["down", "up"]) at(id).addEventListener("change", later);
