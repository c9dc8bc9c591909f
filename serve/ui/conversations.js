// Conversations: their form, this browser's copies, and files of them.
//
// A conversation is {id, title, turns}. A turn is {role: "user", content}, or {role: "assistant", answers, chosen, blind,
// vote} with one answer, or two in the order in which they are shown. `chosen` is the answer that the conversation goes
// on with, null while the choice is open; `vote` is {id, choice}. An answer is {model, content, system, sampling}: the
// exact model, and what it was asked with; `leftOut` how many of the oldest messages no longer
// fitted, `atLimit` that it reached the longest answer, `stopped` that it was cut, `loaded` that it is a file's.

const PREFIX = "counsel.conversation.";
const CURRENT = "counsel.current";

export function newConversation() {
  // Not randomUUID(): a page that came over plain HTTP from another machine has none.
  const id = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", turns: [] };
}

/** The messages that the API takes: the turns before `end`. */
export function messagesOf(turns, system = "", end = turns.length) {
  const messages = turns.slice(0, end).map((turn) => ({ role: turn.role, content: contentOf(turn) }));
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

export function contentOf(turn) {
  return turn.role === "user" ? turn.content : turn.answers[turn.chosen ?? 0].content;
}

/** Keep a conversation in this browser. Throws when the browser's storage is full or closed. */
export function keep(conversation) {
  if (!conversation.turns.length) return;
  conversation.title ||= conversation.turns[0].content.slice(0, 80);
  localStorage.setItem(PREFIX + conversation.id, JSON.stringify({ ...conversation, changed: Date.now() }));
}

/** The conversation that was open in this tab before a reload, or a new one. */
export function reopen() {
  return kept(sessionStorage.getItem(CURRENT)) ?? newConversation();
}

/** Make it the one that `reopen` opens. */
export function setCurrent(conversation) {
  sessionStorage.setItem(CURRENT, conversation.id);
}

/** Every kept conversation, the last changed first. */
export function allKept() {
  const ids = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX)).map((name) => name.slice(PREFIX.length));
  return ids.map(kept).filter(Boolean).sort((a, b) => b.changed - a.changed);
}

function kept(id) {
  const text = id && localStorage.getItem(PREFIX + id);
  return text ? JSON.parse(text) : null;
}

export function forget(id) {
  localStorage.removeItem(PREFIX + id);
}

/** What a file holds: `messages` as `counsel serve chat` writes them and training reads them. */
export function toFile(conversation, system, model) {
  return JSON.stringify({ model, messages: messagesOf(conversation.turns, system) }, null, 2) + "\n";
}

/** {conversation, system} in a file's text. Throws an Error in words when it is not a conversation. */
export function fromFile(text) {
  let document;
  try {
    document = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON.");
  }
  const { messages } = document ?? {};
  const isTurn = (turn) => ["system", "user", "assistant"].includes(turn?.role) && typeof turn.content === "string";
  if (!Array.isArray(messages) || !messages.length || !messages.every(isTurn)) {
    throw new Error("This file holds no conversation: it needs messages, each with a role and a content.");
  }
  const system = messages[0].role === "system" ? messages[0].content : "";
  const turns = messages.slice(system ? 1 : 0);
  const fits = turns.every((turn, i) => turn.role === (i % 2 ? "assistant" : "user"));
  if (!turns.length || !fits) throw new Error("In this file, user and assistant do not take turns.");
  const model = typeof document.model === "string" ? document.model : "";
  const asTurn = ({ role, content }) =>
    role === "user" ? { role, content } : { role, answers: [{ model, content, loaded: true }], chosen: 0 };
  return { conversation: { ...newConversation(), turns: turns.map(asTurn) }, system };
}
