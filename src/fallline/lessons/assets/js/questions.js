// Questions: an answer shows its reason (the style sheet does that), is spoken, kept, and shown in every tab.

import { ask, on, tab } from "./connection.js";
import { complain } from "./notices.js";

const questions = [...document.querySelectorAll(".question")];
const score = document.getElementById("score");

function count() {
  const answered = questions.filter((question) => question.querySelector("input:checked"));
  const right = questions.filter((question) => question.querySelector(".right input:checked"));
  score.textContent = answered.length ? `${right.length} of ${questions.length} right so far.` : "";
}

function choose(name, value) {
  const question = questions.find((each) => each.dataset.question === name);
  for (const input of question?.querySelectorAll("input") ?? []) input.checked = value !== null && Number(input.value) === value;
  count();
}

/** Makes the page's questions answerable. */
export function makeQuestions() {
  for (const question of questions) {
    question.addEventListener("change", (event) => {
      const option = event.target.closest(".option");
      question.querySelector(".spoken").textContent = option.querySelector(".reason").textContent;
      count();
      ask("progress", { tab, answers: { [question.dataset.question]: Number(event.target.value) } }).catch(complain);
    });
  }
  const take = (answers) => Object.entries(answers ?? {}).forEach(([name, value]) => choose(name, value));
  on("hello", (event) => take(event.progress.answers));
  on("progress", (event) => { if (event.tab !== tab) take(event.given.answers); });
}
