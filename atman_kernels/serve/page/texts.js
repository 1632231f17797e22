// Elements and texts for this page's own parts; heatmaps come from the service, rendered.

const HIDDEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu;
const SEEN = new Set(["\n", "\t", "\u200c", "\u200d"]); // joiners do their work in scripts and emoji

export function make(tag, attributes = {}, ...content) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...content); // strings become text, never markup
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

/** A text on one line of at most `limit` characters. */
export function label(text, limit = 40) {
  const characters = [...printable(text.trim().replace(/\s+/gu, " "))];
  return characters.length > limit ? `${characters.slice(0, limit - 1).join("")}…` : characters.join("");
}
