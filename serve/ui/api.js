// Calls of this server's OpenAI API, and its errors in words. The key goes into a header and nowhere else.

const API = new URL("/v1/", location.origin);
const TOO_LONG = /maximum (context|model) length/;

/** Why a call failed, in words for a person; `kind` is network, key, busy, gone, long, broken or refused. */
export class Problem extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

async function call(path, key, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let reply;
  try {
    reply = await fetch(new URL(path, API), { ...options, headers, credentials: "omit", referrerPolicy: "no-referrer" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("network", "The server does not answer. It may be stopped or restarting.");
  }
  if (!reply.ok) throw await problemIn(reply);
  return reply;
}

async function problemIn(reply) {
  let error = {};
  try {
    error = (await reply.json()).error ?? {};
  } catch {
    // A proxy's page, or a reply that was cut: its status says enough.
  }
  return inWords(reply.status, error.message ?? "", Number(reply.headers.get("Retry-After")));
}

function inWords(status, message, retryAfterS) {
  const wait = retryAfterS > 0 ? ` Try again in ${retryAfterS} s.` : " Try again in a moment.";
  if (status === 401) return new Problem("key", `This server needs an API key: type it in under Settings. (${message})`);
  if (status === 404) return new Problem("gone", `This model is not served any more; choose another. (${message})`);
  if (status === 429) return new Problem("busy", `Too many of your requests are waiting.${wait}`);
  if (status === 503) return new Problem("busy", `The server is busy or stopping.${wait}`);
  if (TOO_LONG.test(message)) return new Problem("long", "This message is too long for the model.");
  return new Problem("refused", `The server refused: ${message || `status ${status}`}`);
}

/** The cards of GET /v1/models, in the server's order. */
export async function listModels(key) {
  return (await (await call("models", key)).json()).data;
}

/** Yields {text, model, atLimit} as an answer arrives. Throws Problem, or AbortError once `signal` is aborted. */
export async function* streamAnswer({ key, model, messages, sampling, signal }) {
  const body = JSON.stringify({ model, messages, stream: true, ...sampling });
  const reply = await call("chat/completions", key, { method: "POST", body, signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (unread + value).split("\n\n");
      unread = events.pop();
      for (const event of events) {
        const data = dataOf(event);
        if (data === "[DONE]") return;
        if (data) yield pieceOf(JSON.parse(data));
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Problem) throw error;
    throw broken();
  }
  throw broken();
}

function broken() {
  return new Problem("broken", "The connection ended in the middle of the answer.");
}

function dataOf(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}

function pieceOf(chunk) {
  if (chunk.error) throw inWords(Number(chunk.error.code) || 500, chunk.error.message ?? "", 0);
  const text = (chunk.choices ?? []).map((choice) => choice.delta?.content ?? "").join("");
  const atLimit = (chunk.choices ?? []).some((choice) => choice.finish_reason === "length");
  return { text, model: chunk.model, atLimit };
}

/** Send a vote; returns {id, models}. */
export async function sendVote(key, vote) {
  return (await call("votes", key, { method: "POST", body: JSON.stringify(vote) })).json();
}

/** Delete a vote with all the text it holds. A vote that is gone already is deleted too. */
export async function deleteVote(key, id) {
  try {
    await call(`votes/${id}`, key, { method: "DELETE" });
  } catch (problem) {
    if (problem.kind !== "gone") throw problem;
  }
}
