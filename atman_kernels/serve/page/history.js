// Results of before, in this browser alone: the newest few, as far as there is room.

const KEY = "atman-history";
const MOST = 20;
const CHARACTERS = 2_000_000; // browsers give a site about five million

export function entries() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? [];
  } catch {
    return []; // not ours, or no storage here
  }
}

function write(list) {
  for (let kept = list.slice(0, MOST); ; kept = kept.slice(0, -1)) {
    const text = JSON.stringify(kept);
    if (text.length > CHARACTERS && kept.length) continue;
    try {
      localStorage.setItem(KEY, text);
      return;
    } catch {
      if (!kept.length) return;
    }
  }
}

/** Images are not kept: they are large. */
export function remember(asked, result) {
  const { images, ...rest } = asked;
  write([{ time: Date.now(), asked: { ...rest, seen: images?.length ?? 0 }, result }, ...entries()]);
}

export function forget() {
  try {
    localStorage.removeItem(KEY);
  } catch {
    // there was nothing
  }
}
