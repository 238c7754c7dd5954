// The way to the server: requests, and the events that come back. Events go to whoever asked for their type.

const page = location.pathname.slice(1);
const listeners = new Map();

/** A name for this tab, so that it knows its own changes when they come back. */
export const tab = Math.random().toString(36).slice(2);

/** Calls a function for every event of a type. */
export function on(type, listener) {
  if (!listeners.has(type)) listeners.set(type, []);
  listeners.get(type).push(listener);
}

/** Asks the server for something; the answer as an object, or an Error with a sentence for the learner. */
export async function ask(action, given = {}) {
  let response;
  try {
    response = await fetch(`/do/${page}/${action}`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(given),
    });
  } catch {
    throw new Error("The server does not answer. Is `fallline learn` still running?");
  }
  const text = await response.text();
  let found = {};
  try {
    found = JSON.parse(text);
  } catch {
    found = { error: text };
  }
  if (!response.ok) throw new Error(found.error || `The server answered ${response.status}.`);
  return found;
}

/** Opens the stream of events; the browser opens it again when it breaks. */
export function listen() {
  const source = new EventSource(`/events/${page}`);
  source.addEventListener("message", (message) => {
    const event = JSON.parse(message.data);
    for (const listener of listeners.get(event.type) ?? []) listener(event);
  });
  source.addEventListener("error", () => {
    for (const listener of listeners.get("lost") ?? []) listener();
    // A refused stream stays closed: the server was started anew, and this page belongs to the old one.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  });
  addEventListener("pagehide", () => source.close());
}
