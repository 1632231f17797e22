// An explanation as the elements that explanation.css paints and explanation.js brings to life: those of a saved
// page. Whatever comes from a prompt becomes text, never markup.

const TOP = 8; // rows in a list of the strongest
const RISE = "rise of the loss when suppressed, in nats";
const LOG_PROBABILITY = "log-probability";
const HIDDEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu;
const SEEN = new Set(["\n", "\t", "\u200c", "\u200d"]); // joiners do their work in scripts and emoji

export function make(tag, attributes = {}, ...content) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...content);
  return element;
}

/** Control and invisible characters made visible. */
export function printable(text) {
  return text.replace(HIDDEN, (character) => {
    const code = character.codePointAt(0);
    if (SEEN.has(character)) return character;
    return code < 32 ? String.fromCodePoint(0x2400 + code) : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

export function signed(value) {
  const size = Math.abs(value);
  const digits = size >= 0.005 || !size ? size.toFixed(2) : size.toPrecision(1);
  return (value > 0 ? "+" : value < 0 ? "−" : "") + digits;
}

/** A unit's text on one line of at most `limit` characters. */
export function label(text, limit = 40) {
  const shown = text.trim() || text.replaceAll(" ", "␣") || "∅";
  const characters = [...printable(shown.replaceAll("\n", "↵").replaceAll("\t", "⇥"))];
  if (characters.length <= limit) return characters.join("");
  const half = (limit - 1) >> 1;
  return `${characters.slice(0, half).join("")}…${characters.slice(-half).join("")}`;
}

/** Where a text is cut so that each piece lies below the same units; offsets of units count code points. */
export function segments(text, units, source) {
  const characters = Array.from(text);
  const own = units.map((unit, i) => ({ ...unit, i })).filter((unit) => unit.source === source);
  const cuts = [...new Set([0, characters.length, ...own.flatMap(({ start, end }) => [start, end])])].sort((a, b) => a - b);
  const starting = Map.groupBy(own, (unit) => unit.start);
  const pieces = [];
  let covering = [];
  cuts.forEach((start, number) => {
    const end = cuts[number + 1] ?? start;
    const begun = starting.get(start) ?? [];
    for (const unit of begun) if (unit.start === unit.end) pieces.push({ text: "", units: [unit.i] });
    covering = [...covering.filter((unit) => unit.end > start), ...begun.filter((unit) => unit.end > start)];
    if (start < end) pieces.push({ text: characters.slice(start, end).join(""), units: covering.map(({ i }) => i).sort((a, b) => a - b) });
  });
  return pieces;
}

function painted(text, units, source) {
  return segments(text, units, source).map((piece) => {
    if (!piece.units.length) return printable(piece.text);
    const lines = piece.text.trim() ? 0 : piece.text.split("\n").length - 1;
    const span = make("span", { class: piece.text ? "unit" : "unit chip", "data-units": piece.units.join(" ") },
      piece.text ? printable(piece.text) : label(units[piece.units[0]].text, 24));
    if (lines) span.dataset.break = "↵".repeat(lines);
    return span;
  });
}

function texts(question, images, pictures) {
  const parts = [];
  for (const number of new Set(question.units.filter((unit) => unit.source === "image").map((unit) => unit.image))) {
    const own = question.units.map((unit, i) => ({ ...unit, i })).filter((unit) => unit.source === "image" && unit.image === number);
    const boxed = own.filter((unit) => unit.box);
    const width = Math.max(images?.[number]?.width ?? 1, ...boxed.map((unit) => unit.box[2]));
    const height = Math.max(images?.[number]?.height ?? 1, ...boxed.map((unit) => unit.box[3]));
    const canvas = make("div", { class: "image", role: "group", "aria-label": `Image ${number + 1}; arrow keys move between its units` });
    canvas.style.setProperty("--ratio", `${width}/${height}`);
    if (pictures?.[number]) canvas.append(make("img", { src: pictures[number], alt: "" }));
    for (const { i, box: [left, top, right, bottom] } of boxed) {
      const span = make("span", { class: "unit", "data-units": i });
      const place = { left: left / width, top: top / height, width: (right - left) / width, height: (bottom - top) / height };
      for (const [side, share] of Object.entries(place)) span.style.setProperty(side, `${100 * share}%`);
      canvas.append(span);
    }
    parts.push(make("div", { class: "caption" }, `Image ${number + 1}`), canvas);
    const rest = own.filter((unit) => !unit.box);
    if (rest.length) parts.push(make("div", { class: "text" }, ...rest.map((unit) => make("span", { class: "unit chip", "data-units": unit.i }, label(unit.text, 24)))));
  }
  const text = (caption, pieces) => parts.push(make("div", { class: "caption" }, caption),
    make("div", { class: "text", lang: "", dir: "auto", role: "group", "aria-label": `${caption}; arrow keys move between its units` }, ...pieces));
  text("Prompt", painted(question.prompt, question.units, "prompt"));
  if (question.units.some((unit) => unit.source === "target"))
    text("Answer as input: earlier tokens explain later ones", painted(question.target, question.units, "target"));
  return parts;
}

/** The heatmap that fills: `known(index, scores, exact)` paints a unit. */
export function filling(question, pictures) {
  const section = make("section", { class: "atman-explanation", "data-live": "", "aria-label": "Explanation, not complete yet" },
    make("header", {}, make("div", { class: "title" }, "What the answer rests on")),
    make("div", { class: "caption" }, "Answer"),
    make("div", { class: "text", dir: "auto" }, printable(question.target)),
    ...texts(question, null, pictures));
  const spans = [...section.querySelectorAll("[data-units]")].map((span) => [span, span.dataset.units.split(" ").map(Number)]);
  for (const [span] of spans) span.classList.add("waiting");
  const found = new Map();
  let frame = 0;
  function paint() {
    frame = 0;
    const scale = Math.max(...[...found.values()].map(({ total }) => Math.abs(total))) || 1;
    for (const [span, units] of spans) {
      const own = units.map((i) => found.get(i)).filter(Boolean).sort((a, b) => Math.abs(b.total) - Math.abs(a.total))[0];
      if (!own) continue;
      span.classList.remove("waiting");
      span.classList.toggle("negative", own.total < 0);
      span.classList.toggle("estimate", !own.exact);
      span.style.setProperty("--strength", `${((100 * Math.abs(own.total)) / scale).toFixed(1)}%`);
    }
  }
  return {
    section,
    count: question.units.length,
    known(index, scores, exact) {
      found.set(index, { total: scores.reduce((sum, score) => sum + score, 0), exact });
      frame ||= requestAnimationFrame(paint);
      return found.size;
    },
  };
}

function likelihood(explanation) {
  const sum = explanation.base_logprobs.reduce((a, b) => a + b, 0);
  if (explanation.value !== LOG_PROBABILITY) return [`${printable(explanation.value)} ${signed(sum)}`, "with nothing suppressed"];
  if (explanation.versus !== null) {
    const both = explanation.logprobs;
    return [`log odds ${signed(sum)}`, both ? `log p ${signed(both.target)} and ${signed(both.versus)}` : "with nothing suppressed"];
  }
  const share = 100 * Math.exp(Math.min(sum, 0));
  const power = String(Math.round(sum / Math.LN10)).replace(/[-\d]/g, (sign) => (sign === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[sign]));
  return [`log p ${signed(sum)}`, share < 0.05 ? `10${power}` : `${Number(share.toPrecision(2))} %`];
}

function inWords(value) {
  if (value === null || value === undefined) return "none";
  if (Array.isArray(value)) return value.map(inWords).join(", ");
  if (typeof value === "object") return Object.entries(value).map(([key, member]) => `${key} ${inWords(member)}`).join(", ");
  return printable(String(value));
}

function table(title, values) {
  const rows = Object.entries(values).map(([key, value]) => make("tr", {}, make("th", { scope: "row" }, make("bdi", {}, printable(key))), make("td", {}, make("bdi", {}, inWords(value)))));
  return make("table", {}, make("caption", {}, title), ...rows);
}

function summary({ settings, units }) {
  const parts = ["model", "method", "mode"].filter((key) => settings[key]).map((key) => printable(String(settings[key])));
  if (typeof settings.factor === "number") parts.push(`factor ${settings.factor}`);
  parts.push(`${units.length} ${typeof settings.units === "string" ? `${settings.units} ` : ""}units`);
  return parts.join(" · ");
}

function measureOf({ measure, recompute }) {
  const through = recompute === 1 ? " (direct effect)" : recompute ? ` (effect through the last ${recompute} prompt tokens)` : "";
  return printable(measure) + through;
}

/** A finished explanation, alive. */
export function heatmap(explanation, pictures) {
  const tokens = explanation.versus === null
    ? explanation.target_tokens.map((token) => label(token, 24))
    : [`${label(explanation.target, 24)} rather than ${label(explanation.versus, 24)}`];
  const scores = explanation.scores.map((row) => row.map((score) => score ?? 0));
  const total = scores.map((row) => row.reduce((a, b) => a + b, 0));
  const exact = (i) => !explanation.exact || explanation.exact[i];
  const option = (token, ...content) => make("button", { type: "button", role: "radio", "aria-checked": token < 0, tabindex: token < 0 ? 0 : -1, "data-token": token }, ...content);
  const ranking = (title) => make("div", { class: "ranking" }, make("div", { class: "caption" }, title), make("ol"));
  const data = {
    labels: explanation.units.map((unit) => label(unit.text, 60)),
    tokens, total, scores,
    errors: total.map((_, i) => (explanation.standard_errors ? ` ±${signed(Math.abs(explanation.standard_errors[i])).replace("+", "")}` : "")),
    about: total.map((_, i) => (exact(i) ? "" : "≈")),
    top: TOP,
    suppressed: explanation.measure === RISE,
  };
  const estimates = total.some((_, i) => !exact(i)) ? " Hatched and ≈: an estimate of the search that found the strongest." : "";
  return make("section", { class: "atman-explanation", "aria-label": "What the answer rests on" },
    make("header", {}, make("div", { class: "title" }, "What the answer rests on"), make("div", { class: "quiet" }, summary(explanation))),
    make("div", { class: "caption", "aria-hidden": "true" }, "Answer ", make("span", {}, "· select a token to see what it alone rests on")),
    make("div", { class: "answer", role: "radiogroup", "aria-label": "Part of the answer to explain" },
      option(-1, "whole answer", make("small", {}, likelihood(explanation).join(" · "))),
      ...tokens.map((token, i) => option(i, make("bdi", {}, token), make("small", {}, signed(explanation.base_logprobs[i]))))),
    make("div", { class: "body" },
      make("div", { class: "texts" }, ...texts(explanation, explanation.images, pictures),
        make("div", { class: "legend" }, make("span", {}, "against ", make("b", { "data-end": -1 })), make("i"), make("span", {}, make("b", { "data-end": 1 }), " for")),
        make("div", { class: "quiet" }, "Each score: ", make("bdi", {}, measureOf(explanation)), ".", estimates)),
      make("aside", {}, ranking("Speaks for"), ranking("Speaks against"))),
    make("details", {}, make("summary", {}, "Settings and cost"), make("div", { class: "tables" }, table("Settings", explanation.settings), table("Cost", explanation.stats))),
    make("div", { class: "tip", role: "status", hidden: "" }),
    make("script", { type: "application/json" }, JSON.stringify(data)));
}

/** Runs the script of saved pages, which brings to life what is on the page and is not yet. */
export function enliven() {
  const script = make("script", { src: "page/explanation.js" });
  script.addEventListener("load", () => script.remove());
  document.head.append(script);
}
