
(() => {
  "use strict";
  // Where a page's policy forbids style attributes they come under another name.
  for (const element of document.querySelectorAll(".atman-explanation [data-style]")) {
    for (const declaration of element.dataset.style.split(";")) element.style.setProperty(...declaration.split(":"));
    element.removeAttribute("data-style");
  }
  for (const root of document.querySelectorAll(".atman-explanation:not([data-live])")) {
    root.dataset.live = "";
    bringToLife(root);
  }

  function bringToLife(root) {
    const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
    const buttons = [...root.querySelectorAll("[data-token]")];
    const spans = [...root.querySelectorAll("[data-units]")];
    const unitsOf = new Map(spans.map((span) => [span, span.dataset.units.split(" ").map(Number)]));
    const tip = root.querySelector(".tip");
    let token = -1; // -1: the whole answer
    const parents = data.parents ?? [];
    let scores = data.total; // of the selection, one per unit
    let scales = []; // of the selection, one per level

    spans.forEach((span, i) => {
      span.removeAttribute("title"); // the tip says more
      span.tabIndex = i ? -1 : 0; // one stop of the tab key; arrow keys do the rest
    });

    const strongest = (units, of) => units.reduce((a, b) => (Math.abs(of[b]) > Math.abs(of[a]) ? b : a));
    const levels = [...new Set(data.depths)].map((depth) => data.depths.flatMap((own, i) => (own === depth ? [i] : [])));
    const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

    function paint(element, score, of) {
      element.style.setProperty("--strength", `${((100 * Math.abs(score)) / of).toFixed(1)}%`);
      element.classList.toggle("negative", score < 0);
    }

    function select(chosen) {
      token = chosen;
      scores = token < 0 ? data.total : data.scores.map((row) => row[token]);
      scales = levels.map((level) => largest(level.map((i) => scores[i])) || 1);
      for (const button of buttons) {
        const checked = Number(button.dataset.token) === token;
        button.setAttribute("aria-checked", checked);
        button.tabIndex = checked ? 0 : -1;
      }
      for (const span of spans) {
        const side = span.closest("[data-side]")?.dataset.side;
        const own = side ? data.sides[side] : scores;
        const unit = strongest(unitsOf.get(span), own);
        paint(span, own[unit], (side ? data.side_scales : scales)[data.depths[unit]]);
        span.classList.toggle("estimate", data.about[unit] !== "");
      }
      for (const end of root.querySelectorAll("[data-end]")) end.textContent = signed(end.dataset.end * scales[0]);
      for (const end of root.querySelectorAll("[data-scale]")) end.textContent = `±${signed(scales[end.dataset.scale] ?? 1).replace("+", "")}`;
      rank();
    }

    // The strongest of each level, each below the one that it lies in.
    function outlined(sign, top) {
      const order = (units) => units.sort((a, b) => sign * (scores[b] - scores[a]) || a - b);
      const chosen = new Set(levels.flatMap((level, depth) => order(level.filter((i) => sign * scores[i] > 0.01 * scales[depth])).slice(0, top)));
      for (const i of chosen) if (parents[i] != null) chosen.add(parents[i]); // a set is walked to its end, which grows
      const below = (parent) => order([...chosen].filter((i) => (parents[i] ?? null) === parent)).flatMap((i) => [i, ...below(i)]);
      return below(null);
    }

    function rank() {
      const lists = [outlined(1, data.top), outlined(-1, data.top >> 1)];
      root.querySelectorAll(".ranking").forEach((ranking, side) => {
        ranking.hidden = !lists[side].length;
        ranking.querySelector("ol").replaceChildren(...lists[side].map((i) => {
          const button = make("button", `depth-${data.depths[i]}`, make("bdi", "", data.labels[i]), make("b", "", data.about[i] + signed(scores[i]) + (token < 0 ? data.errors[i] : "")), bar(scores[i], scales[data.depths[i]]));
          button.type = "button";
          button.dataset.unit = i;
          return make("li", "", button);
        }));
      });
    }

    // The tip: what is known about the units below the pointer or the focus.
    function describe(unit, rows) {
      const part = make("div", "", make("strong", "", make("bdi", "", data.labels[unit])), make("div", "", data.about[unit] + inWords(scores[unit], token < 0, data.suppressed)));
      for (let above = parents[unit]; above != null; above = parents[above])
        part.append(make("div", "quiet", "in ", make("bdi", "", data.labels[above]), ` ${signed(scores[above])}`));
      if (data.sides) {
        const most = largest(data.sides.map((own) => own[unit])) || 1;
        part.append(make("div", "rows", ...data.sides.map((own, side) =>
          make("div", "row", make("bdi", "", data.answers[side]), bar(own[unit], most), make("span", "", signed(own[unit]))))));
      }
      const row = data.scores[unit];
      if (row.length < 2) return part;
      const shown = row.map((_, t) => t).sort((a, b) => Math.abs(row[b]) - Math.abs(row[a])).slice(0, rows).sort((a, b) => a - b);
      const most = largest(row) || 1;
      part.append(make("div", "rows", ...shown.map((t) =>
        make("div", t === token ? "row selected" : "row",
          make("bdi", "", data.tokens[t]), bar(row[t], most), make("span", "", signed(row[t]))))));
      if (shown.length < row.length) part.append(make("div", "quiet", `and ${row.length - shown.length} weaker ones`));
      return part;
    }

    function point(anchor, units) {
      for (const span of spans) span.classList.toggle("here", unitsOf.get(span).some((i) => units.includes(i)));
      tip.hidden = !units.length;
      if (tip.hidden) return;
      const shown = [...units].sort((a, b) => Math.abs(scores[b]) - Math.abs(scores[a])).slice(0, 4);
      tip.replaceChildren(...shown.map((unit) => describe(unit, units.length > 1 ? 3 : 10)));
      if (shown.length < units.length) tip.append(make("div", "quiet", `and ${units.length - shown.length} more units here`));
      const frame = root.getBoundingClientRect();
      const place = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
      const room = frame.width - tip.offsetWidth - 8;
      tip.style.left = `${Math.max(8, Math.min(place.left - frame.left, room))}px`;
      const below = anchor.getBoundingClientRect().bottom + 8;
      const fits = below + tip.offsetHeight < innerHeight || place.top - tip.offsetHeight < 8;
      tip.style.top = `${(fits ? below : place.top - tip.offsetHeight - 8) - frame.top}px`;
    }

    const leave = () => point(root, []);
    function aim(event) {
      const target = event.target.closest?.("[data-units], [data-unit]");
      if (!target) return leave();
      point(target, unitsOf.get(target) ?? [Number(target.dataset.unit)]);
    }

    root.addEventListener("pointerover", aim);
    root.addEventListener("pointerleave", leave);
    root.addEventListener("focusin", aim);
    root.addEventListener("focusout", leave);
    root.addEventListener("click", (event) => {
      const button = event.target.closest("[data-token]");
      if (button) select(Number(button.dataset.token));
      const row = event.target.closest("[data-unit]");
      if (row) move(spans, spans.findIndex((span) => unitsOf.get(span).includes(Number(row.dataset.unit))));
    });
    root.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return leave();
      const group = [buttons, spans].find((members) => members.includes(event.target));
      const i = group?.indexOf(event.target);
      const next = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: group?.length - 1 }[event.key];
      if (!group || next === undefined) return;
      event.preventDefault();
      const reached = move(group, (next + group.length) % group.length);
      if (group === buttons) select(Number(reached.dataset.token));
    });

    function move(group, i) {
      for (const member of group) member.tabIndex = -1;
      group[i].tabIndex = 0;
      group[i].focus();
      return group[i];
    }

    select(-1);
  }

  function make(tag, name, ...content) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.append(...content); // strings become text, never markup
    return element;
  }

  function bar(score, of) {
    const element = make("i", score < 0 ? "negative" : "");
    element.style.setProperty("--strength", `${((100 * Math.abs(score)) / of).toFixed(1)}%`);
    return element;
  }

  function signed(value) {
    const size = Math.abs(value);
    const digits = size >= 0.005 || !size ? size.toFixed(2) : size.toPrecision(1);
    return (value > 0 ? "+" : value < 0 ? "−" : "") + digits;
  }

  // exp of a difference in loss is a ratio of probabilities; other methods' scores are numbers and no more.
  function inWords(score, whole, suppressed) {
    if (!suppressed) return signed(score);
    const ratio = Math.exp(Math.abs(score));
    const share = 100 * (score > 0 ? 1 - 1 / ratio : ratio - 1);
    const power = String(Math.round(Math.abs(score) / Math.LN10)).replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);
    const size = ratio < 2 ? `${share.toFixed(share < 1 ? 1 : 0)} %`
      : ratio < 1e4 ? `${Number(ratio.toPrecision(2))}×` : `10${power}×`;
    return `${signed(score)}: without it the ${whole ? "answer" : "token"} is ${size} ${score < 0 ? "more" : "less"} likely`;
  }
})();
