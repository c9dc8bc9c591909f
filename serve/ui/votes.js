// The dialog in which a person gives a reason for a vote, and says whether the text may be kept.

import { deleteVote, sendVote } from "./api.js";
import { messagesOf } from "./conversations.js";
import { byId, show } from "./elements.js";
import { key } from "./settings.js";

const MINE = "counsel.votes";

/** The ids of the votes that were sent from this browser: a vote outlives the answer that it was about. */
export const myVotes = () => JSON.parse(localStorage.getItem(MINE) ?? "[]");

/** Delete a vote on the server, with all the text it holds. */
export async function withdraw(id) {
  await deleteVote(key(), id);
  localStorage.setItem(MINE, JSON.stringify(myVotes().filter((other) => other !== id)));
}

/** The body of POST /v1/votes about turn `index`. Text is in it only with `consent`. */
function voteOn(turns, index, choice, { consent, reasons, comment }) {
  const { answers, blind } = turns[index];
  const { system, sampling, leftOut = 0 } = answers[0];
  const vote = {
    answers: answers.map(({ model, content }) => (consent ? { model, text: content } : { model })),
    choice, blind, consent, reasons, sampling,
  };
  if (!consent) return vote;
  const prompt = messagesOf(turns, system, index);
  prompt.splice(system ? 1 : 0, leftOut);
  return { ...vote, prompt, comment };
}

/** Ask for the reason, send the vote; resolves to {id, choice}, or null when the person cancels. */
export function askForVote(turns, index, choice) {
  const dialog = byId("vote");
  const form = dialog.querySelector("form");
  // A tie trains nothing, and neither does an answer without a word: their text is not asked for.
  const whole = turns[index].answers.every((answer) => answer.content);
  form.reset();
  byId("vote-text").hidden = choice === "tie" || !whole;
  byId("comment-label").hidden = true;
  byId("consent").onchange = () => (byId("comment-label").hidden = !byId("consent").checked);
  show(byId("vote-problem"), "");
  dialog.showModal();
  return new Promise((resolve) => {
    const finish = (result) => {
      dialog.onclose = null;
      dialog.close();
      resolve(result);
    };
    dialog.onclose = () => finish(null);
    byId("vote-cancel").onclick = () => finish(null);
    form.onsubmit = async (event) => {
      event.preventDefault();
      const reasons = [...form.querySelectorAll("[name=reason]:checked")].map((box) => box.value);
      const consent = byId("consent").checked;
      try {
        const given = { consent, reasons, comment: byId("comment").value.trim() };
        const { id } = await sendVote(key(), voteOn(turns, index, choice, given));
        localStorage.setItem(MINE, JSON.stringify([...myVotes(), id]));
        finish({ id, choice });
      } catch (problem) {
        show(byId("vote-problem"), problem.message);
      }
    };
  });
}
