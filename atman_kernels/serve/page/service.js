// The service's own protocol (docs/service.md), as this page needs it.

const TOKEN = "atman-token";

export class Refused extends Error {
  constructor(status, about) {
    super(about?.message ?? `the service answered ${status}`);
    this.status = status;
    this.kind = about?.type;
  }
}

export const useToken = (token) => sessionStorage.setItem(TOKEN, token);

async function send(path, options = {}) {
  const headers = { ...options.headers };
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the service cannot be reached");
  }
  if (!response.ok) throw new Refused(response.status, (await response.json().catch(() => null))?.error);
  return response;
}

/** What the service renders of an explanation, or of a question: an element, whose texts were escaped there. */
export async function rendered(kind, content) {
  const response = await send(`v1/heatmaps/${kind}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
  });
  const found = new DOMParser().parseFromString(await response.text(), "text/html").querySelector("section");
  return document.adoptNode(found);
}

export const theModel = async () => (await (await send("v1/models")).json()).data[0];
export const kept = async (id) => (await send(`v1/explanations/${encodeURIComponent(id)}`)).json();

export class Asked {
  #abort = new AbortController();
  #ended = false;
  id = null;
  stopped = false;

  /** Stops it: the service is told, for behind a proxy it may not see that the connection ends. */
  async stop() {
    if (this.stopped || this.#ended) return;
    this.stopped = true;
    const late = new Promise((done) => setTimeout(done, 1000));
    const told = this.id ? send(`v1/requests/${this.id}`, { method: "DELETE" }).catch(() => {}) : null; // it may be done
    await Promise.race([told, late]);
    this.#abort.abort();
  }

  /** Sends a request and tells `hear` its events; returns the result. */
  async result(path, body, hear) {
    const response = await send(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true }),
      signal: this.#abort.signal,
    });
    this.id = response.headers.get("X-Request-Id");
    for await (const [name, data] of events(response.body)) {
      if (this.stopped) throw new DOMException("stopped", "AbortError");
      this.#ended = name === "error" || name === "result";
      if (name === "error") throw new Refused(data.status, data.error);
      if (name === "result") return data;
      hear[name]?.(data);
    }
    throw new Error("the connection ended before the result was there");
  }
}

/** Server-sent events with a name and one line of JSON each. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let name = "";
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("event: ")) name = line.slice(7);
      if (line.startsWith("data: ")) yield [name, JSON.parse(line.slice(6))];
    }
  }
}
