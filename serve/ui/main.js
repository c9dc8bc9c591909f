// The chat page: what it remembers while it is open, and what its controls do.

import { listModels, Problem, streamAnswer } from "./api.js";
import * as kept from "./conversations.js";
import { announce, button, byId, element, show } from "./elements.js";
import { change, key, prepareSettings, sampling, settings } from "./settings.js";
import { drawProblem, drawText, drawTurns, scrollToEnd } from "./turns.js";
import { askForVote, myVotes, withdraw } from "./votes.js";

// A version that is published appears in the picker within this time, and at once when the picker is opened.
const POLL_MS = 4000;

let conversation = kept.reopen();
let cards = [];
let running = null; // the AbortController of the answers that are arriving
const question = byId("question");

// ---- the conversation

const actions = {
  ask,
  async vote(index, choice) {
    const { turns } = conversation;
    const vote = await askForVote(turns, index, choice);
    if (vote) settle(turns[index], { vote, chosen: choice === "second" ? 1 : 0 });
  },
  skip: (index) => settle(conversation.turns[index], { chosen: 0 }),
  async unvote(index) {
    const turn = conversation.turns[index];
    try {
      await withdraw(turn.vote.id);
      settle(turn, { vote: undefined });
      announce("Your vote is deleted.");
    } catch (problem) {
      drawProblem(problem, () => actions.unvote(index));
    }
  },
};

function settle(turn, changes) {
  Object.assign(turn, changes);
  drawProblem(null);
  draw();
  question.focus();
}

function draw() {
  drawTurns(conversation.turns, actions, running !== null);
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  if (running) return; // an answer that has not come yet is not worth keeping
  try {
    kept.keep(conversation);
    kept.setCurrent(conversation);
  } catch {
    drawProblem(new Error("This browser has no room left for conversations: delete some, or save this one to a file."));
  }
}

/** Ask a question after the first `upTo` turns; what followed them is replaced. */
async function ask(text, upTo = conversation.turns.length) {
  if (running) return;
  const before = conversation.turns;
  const asked = { system: settings().system, sampling: sampling() };
  const names = beside() ? drawnOrder([byId("model").value, byId("other").value]) : [byId("model").value];
  const answers = names.map((model) => ({ model, content: "", ...asked }));
  const turn = { role: "assistant", answers, chosen: names.length === 2 ? null : 0, blind: beside() && settings().blind };
  const here = conversation;
  const turns = (here.turns = [...before.slice(0, upTo), { role: "user", content: text }, turn]);
  const controller = (running = new AbortController());
  drawProblem(null);
  draw();
  scrollToEnd();
  announce("Waiting for the answer.");
  const messages = kept.messagesOf(turns, asked.system, turns.length - 1);
  const results = await Promise.allSettled(
    answers.map((answer, i) => fill(answer, messages, controller, () => {
      if (here === conversation) drawText(turns.length - 1, i, answer);
    })),
  );
  running = null;
  const failed = results.find(({ status }) => status === "rejected")?.reason;
  const stopped = controller.signal.aborted;
  if (failed && answers.some((answer) => !answer.content)) {
    // Nothing to show: as it was before, with the question back where it was typed.
    here.turns = before;
    if (upTo === before.length && here === conversation) question.value ||= text;
  }
  if (here !== conversation) return kept.keep(here);
  draw();
  if (failed && failed.name !== "AbortError") {
    drawProblem(failed, () => {
      if (question.value === text) question.value = "";
      ask(text, upTo);
    });
  } else {
    announce(stopped ? "Stopped." : answers.length === 2 ? "Both answers are complete." : answers[0].content);
  }
  question.focus();
}

/** Stream one answer into `answer`; while the messages do not fit the model, their oldest exchange is left out. */
async function fill(answer, messages, controller, onText) {
  const system = messages[0].role === "system" ? 1 : 0;
  for (let leftOut = 0; ; leftOut += 2) {
    const sent = [...messages.slice(0, system), ...messages.slice(system + leftOut)];
    const request = { key: key(), model: answer.model, messages: sent, sampling: answer.sampling, signal: controller.signal };
    try {
      for await (const piece of streamAnswer(request)) {
        answer.model = piece.model ?? answer.model;
        answer.content += piece.text;
        if (piece.atLimit) answer.atLimit = true;
        onText();
      }
      if (leftOut) answer.leftOut = leftOut;
      return;
    } catch (error) {
      if (error.kind === "long" && !answer.content && sent.length > system + 1) continue;
      answer.stopped = true;
      if (error.name !== "AbortError") controller.abort(); // the other of two is of no use alone
      throw error;
    }
  }
}

/** Which of two models is shown first is drawn, so that neither place favors one. */
function drawnOrder(names) {
  return crypto.getRandomValues(new Uint8Array(1))[0] % 2 ? names : names.reverse();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || running) return;
  if (conversation.turns.at(-1)?.chosen === null) {
    return drawProblem(new Problem("choice", "Choose one of the two answers first, or skip the choice."));
  }
  if (!byId("model").value) return drawProblem(new Problem("gone", "There is no model to ask yet."));
  question.value = "";
  ask(text);
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
});

// ---- models

addEventListener("pagehide", () => {
  const { answers } = conversation.turns.at(-1) ?? {};
  if (!running || !answers.every((answer) => answer.content)) return;
  for (const answer of answers) answer.stopped = true;
  kept.keep(conversation);
});

const beside = () => byId("beside").getAttribute("aria-pressed") === "true";

byId("beside").addEventListener("click", () => {
  byId("beside").setAttribute("aria-pressed", String(!beside()));
  byId("other-label").hidden = !beside();
});

async function refreshModels() {
  try {
    const listed = await listModels(key());
    show(byId("connection"), "");
    const known = new Set(cards.map((card) => card.root));
    const added = listed.filter((card) => !known.has(card.root)).map((card) => card.root);
    const changed = shapeOf(listed) !== shapeOf(cards);
    if (cards.length && added.length) announce(`New: ${[...new Set(added)].join(", ")}`);
    cards = listed;
    if (changed) {
      const adapter = cards.find((card) => card.parent) ?? cards[0];
      fillPicker(byId("model"), adapter?.id);
      fillPicker(byId("other"), cards.find((card) => !card.parent)?.id);
    }
  } catch (problem) {
    show(byId("connection"), problem.message);
  }
}

const shapeOf = (list) => list.map((card) => `${card.id}=${card.root}`).join();

function fillPicker(select, initial) {
  const wanted = select.value || initial;
  const exact = (card) => card.id === card.root;
  const groups = [
    ["Base model", cards.filter((card) => !card.parent)],
    ["Adapters, current version", cards.filter((card) => card.parent && !exact(card))],
    ["Exact versions", cards.filter((card) => card.parent && exact(card))],
  ];
  const label = (card) => (card.parent && !exact(card) ? `${card.id} (${card.version})` : card.id);
  select.replaceChildren(
    ...groups.filter(([, members]) => members.length).map(([name, members]) =>
      element("optgroup", { label: name }, ...members.map((card) => element("option", { value: card.id, text: label(card) }))),
    ),
  );
  if (wanted && !cards.some((card) => card.id === wanted)) {
    select.append(element("option", { value: wanted, text: `${wanted} (not served any more)` }));
  }
  select.value = wanted;
}

async function followModels() {
  if (document.visibilityState === "visible") await refreshModels();
  setTimeout(followModels, POLL_MS);
}
for (const id of ["model", "other"]) byId(id).addEventListener("focus", refreshModels);

// ---- conversations

function openConversation(other) {
  running?.abort();
  conversation = other;
  kept.setCurrent(other);
  drawProblem(null);
  draw();
  question.focus();
}

function listSaved() {
  const rows = kept.allKept().map((other) => {
    const open = button(other.title, () => {
      byId("conversations").close();
      openConversation(other);
    }, { class: "open" });
    const remove = button("Delete", () => forget([other]), { "aria-label": `Delete: ${other.title}` });
    return element("li", {}, open, remove);
  });
  byId("saved").replaceChildren(...(rows.length ? rows : [element("li", { class: "soft", text: "None yet." })]));
  byId("save-file").disabled = !conversation.turns.length;
  byId("delete-all").disabled = !rows.length;
  byId("delete-votes").disabled = !myVotes().length;
}

function forget(others) {
  for (const { id } of others) kept.forget(id);
  if (others.some(({ id }) => id === conversation.id)) openConversation(kept.newConversation());
  listSaved();
}

byId("new").addEventListener("click", () => openConversation(kept.newConversation()));
byId("open-conversations").addEventListener("click", () => {
  show(byId("file-problem"), "");
  listSaved();
  byId("conversations").showModal();
});
byId("delete-all").addEventListener("click", () => forget(kept.allKept()));
byId("delete-votes").addEventListener("click", async () => {
  try {
    for (const id of myVotes()) await withdraw(id);
  } catch (problem) {
    return show(byId("file-problem"), problem.message);
  }
  for (const other of [...kept.allKept(), conversation]) {
    for (const turn of other.turns) delete turn.vote;
    kept.keep(other);
  }
  draw();
  listSaved();
  announce("Your votes are deleted.");
});
byId("save-file").addEventListener("click", () => {
  const text = kept.toFile(conversation, settings().system, byId("model").value);
  const link = element("a", { download: "conversation.json" });
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.click();
  URL.revokeObjectURL(link.href);
});
byId("load-file").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", async () => {
  const [file] = byId("file").files;
  byId("file").value = "";
  try {
    const loaded = kept.fromFile(await file.text());
    change({ system: loaded.system });
    byId("conversations").close();
    openConversation(loaded.conversation);
  } catch (error) {
    show(byId("file-problem"), error.message);
  }
});

// ---- start

prepareSettings(refreshModels);
draw();
scrollToEnd();
followModels();
question.focus();
