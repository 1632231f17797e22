// Heatmaps: the service renders them, as saved pages have them; explanation.css paints them, explanation.js brings them to
// life. While the model works, scores are painted here as they come.

import { rendered } from "./service.js";
import { make } from "./texts.js";

/** A finished explanation. */
export async function finished(explanation, pictures) {
  return withPictures(await rendered("explanation", explanation), pictures);
}

/** The heatmap that fills: `known(index, scores, exact)` paints a unit; `more(units)` are those of a further level. */
export function filling(question, pictures, show) {
  const units = [...question.units];
  const found = new Map();
  let spans = [];
  let asked = 0;
  let frame = 0;

  async function draw() {
    const mine = (asked += 1);
    const section = withPictures(await rendered("question", { ...question, units }), pictures);
    if (mine !== asked || !show(section)) return;
    spans = [...section.querySelectorAll("[data-units]")].map((span) => [span, span.dataset.units.split(" ").map(Number)]);
    for (const [span] of spans) span.classList.add("waiting");
    paint();
  }

  const depth = (i) => (units[i].parent === undefined ? 0 : 1 + depth(units[i].parent));

  function paint() {
    frame = 0;
    const scales = [];
    for (const [i, { total }] of found) scales[depth(i)] = Math.max(scales[depth(i)] ?? 0, Math.abs(total));
    for (const [span, owners] of spans) {
      const strongest = owners.filter((i) => found.has(i)).sort((a, b) => Math.abs(found.get(b).total) - Math.abs(found.get(a).total))[0];
      if (strongest === undefined) continue;
      const { total, exact } = found.get(strongest);
      span.classList.remove("waiting");
      span.classList.toggle("negative", total < 0);
      span.classList.toggle("estimate", !exact);
      span.style.setProperty("--strength", `${((100 * Math.abs(total)) / (scales[depth(strongest)] || 1)).toFixed(1)}%`);
    }
  }

  const drawn = draw();
  return {
    drawn,
    get count() { return units.length; },
    known(index, scores, exact) {
      found.set(index, { total: scores.reduce((sum, score) => sum + score, 0), exact });
      frame ||= requestAnimationFrame(paint);
      return found.size;
    },
    more(further) {
      units.push(...further);
      return draw();
    },
  };
}

/** Runs the script of saved pages, which brings to life what is on the page and is not yet. */
export function enliven() {
  const script = make("script", { src: "page/explanation.js" });
  script.addEventListener("load", () => script.remove());
  document.head.append(script);
}

function withPictures(section, pictures) {
  for (const canvas of section.querySelectorAll("[data-image]")) {
    const source = pictures?.[canvas.dataset.image];
    if (source) canvas.prepend(make("img", { src: source, alt: "" }));
  }
  return section;
}
