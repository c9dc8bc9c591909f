// How the turns of a conversation look, and the buttons on them.

import { contentOf } from "./conversations.js";
import { announce, button, byId, element, show } from "./elements.js";

/** Draw every turn. `actions`: ask(question, upTo), vote(index, choice), unvote(index), skip(index); `busy`: no buttons. */
export function drawTurns(turns, actions, busy) {
  const main = document.querySelector("main");
  const atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
  byId("turns").replaceChildren(
    ...turns.map((turn, index) => {
      const last = index >= turns.length - 2;
      return turn.role === "user" ? question(turn, index, actions, busy) : answers(turns, index, actions, busy, last);
    }),
  );
  if (atEnd) scrollToEnd();
}

export function scrollToEnd() {
  const main = document.querySelector("main");
  main.scrollTop = main.scrollHeight;
}

/** Show an answer's text while it arrives. */
export function drawText(turnIndex, answerIndex, answer) {
  const main = document.querySelector("main");
  const atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
  const box = byId("turns").children[turnIndex].querySelectorAll(".answer")[answerIndex];
  box.querySelector(".text").textContent = answer.content;
  if (atEnd) scrollToEnd();
}

function question(turn, index, actions, busy) {
  const item = element("li", { class: "mine" });
  const draw = () => {
    const tools = element("div", { class: "tools" }, copyButton(turn.content), button("Edit", edit));
    item.replaceChildren(
      element("p", { class: "unseen", text: "You" }),
      element("p", { class: "text", text: turn.content }),
      ...(busy ? [] : [tools]),
    );
  };
  const edit = () => {
    const field = element("textarea", { rows: 3, "aria-label": "Edit your message" });
    field.value = turn.content;
    const again = () => field.value.trim() && actions.ask(field.value.trim(), index);
    const cancel = () => {
      draw();
      item.querySelector(".tools button:last-child").focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
    });
    item.replaceChildren(
      field,
      element("div", { class: "tools" }, button("Ask again from here", again), button("Cancel", cancel)),
    );
    field.focus();
  };
  draw();
  return item;
}

function answers(turns, index, actions, busy, last) {
  const turn = turns[index];
  const working = busy && last;
  const pair = turn.answers.length === 2;
  const open = pair && turn.chosen === null;
  const boxes = turn.answers.map((answer, i) => {
    const box = element("article", { class: "answer" });
    if (working) box.classList.add("streaming");
    if (pair && i === turn.chosen) box.classList.add("chosen");
    const hidden = turn.blind && open;
    const name = hidden ? `Answer ${i + 1}` : pair ? `Answer ${i + 1}: ${answer.model}` : answer.model || "Answer";
    box.setAttribute("aria-label", name);
    box.append(element("p", { class: "who", text: name }));
    box.append(element("p", { class: "text", text: answer.content }));
    if (!working) box.append(...remarks(answer), element("div", { class: "tools" }, copyButton(answer.content)));
    return box;
  });
  const item = element("li", { class: pair ? "pair" : "" }, ...boxes);
  if (!busy) {
    const again = button("Regenerate", () => actions.ask(contentOf(turns[index - 1]), index - 1));
    const whole = turn.answers.every((answer) => !answer.stopped);
    const tools = pair ? element("div", { class: "tools choice" }) : boxes[0].querySelector(".tools");
    if (last && (!open || !whole)) tools.append(again);
    if (open && whole) tools.append(...choices(index, actions));
    if (open) tools.append(button("Skip", () => actions.skip(index)));
    else tools.append(...verdicts(turn, index, actions, pair, whole));
    if (pair) item.append(tools);
  }
  return item;
}

function remarks(answer) {
  const words = [];
  if (!answer.content && !answer.stopped) words.push("The model ended its answer without a word.");
  if (answer.stopped) words.push("Not the whole answer.");
  if (answer.atLimit) words.push("It ends here because the longest answer is reached.");
  if (answer.leftOut) words.push("The oldest turns no longer fitted the model and were left out.");
  return words.map((text) => element("p", { class: "soft", text }));
}

function choices(index, actions) {
  return [
    element("span", { class: "soft", text: "Which is better?" }),
    button("Answer 1", () => actions.vote(index, "first")),
    button("Equally good", () => actions.vote(index, "tie")),
    button("Answer 2", () => actions.vote(index, "second")),
  ];
}

function verdicts(turn, index, actions, pair, whole) {
  if (turn.vote) {
    const words = { first: "Answer 1 is better", second: "Answer 2 is better", tie: "equally good" };
    return [
      element("span", { class: "soft", text: `Your vote: ${words[turn.vote.choice] ?? turn.vote.choice}.` }),
      button("Delete my vote", () => actions.unvote(index)),
    ];
  }
  // The model of an answer from a file is what the file says: a vote needs one that this page has asked.
  if (pair || !whole || turn.answers[0].loaded || !turn.answers[0].content) return [];
  return [
    button("Good", () => actions.vote(index, "good"), { "aria-label": "Good answer" }),
    button("Bad", () => actions.vote(index, "bad"), { "aria-label": "Bad answer" }),
  ];
}

function copyButton(text) {
  return button("Copy", async (event) => {
    try {
      await navigator.clipboard.writeText(text);
      event.target.textContent = "Copied";
      announce("Copied");
    } catch {
      // Not offered over plain HTTP from another machine, or refused by the person.
      event.target.textContent = "Select the text to copy it";
    }
  });
}

/** Show a problem below the conversation, with its retry. */
export function drawProblem(problem, retry) {
  const box = byId("problem");
  box.hidden = !problem;
  show(box.querySelector("p"), problem?.message ?? "");
  const again = box.querySelector("button");
  again.hidden = !retry;
  again.onclick = retry;
  if (problem) scrollToEnd();
}
