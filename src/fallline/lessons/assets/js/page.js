// A live page: cells, questions, what moves; the state of its Python; the place that the learner has reached.

import { makeCells } from "./cells.js";
import { ask, listen, on, tab } from "./connection.js";
import { makeMoves } from "./move.js";
import { complain, notice } from "./notices.js";
import { makeQuestions } from "./questions.js";

const WORDS = {
  starting: "Python is starting …",
  warming: "Python is loading torch …",
  ready: "Python is ready",
  busy: "Running …",
  restarting: "Python is starting anew …",
  ended: "Python has ended",
  lost: "Not connected",
};

const kernel = document.querySelector(".kernel");

function become(state) {
  kernel.dataset.state = state;
  document.getElementById("kernel-text").textContent = WORDS[state] ?? state;
  document.getElementById("stop").disabled = state !== "busy";
}

on("hello", (event) => {
  become(event.kernel);
  if (event.complaint) notice(event.complaint);
  offerToResume(event.progress.place);
});
on("kernel", (event) => become(event.state));
on("lost", () => become("lost"));
on("notice", (event) => notice(event.text));
on("reset", () => location.replace(location.pathname));

for (const [name, everything, question] of [
  ["reset-page", false, "Forget your answers, guesses and edited code on this page?"],
  ["reset-all", true, "Forget your answers, guesses and edited code on all pages?"],
]) {
  document.getElementById(name).addEventListener("click", () => {
    if (confirm(question)) ask("reset", { everything }).catch(complain);
  });
}

// The place: the last heading above the middle of the window.

const headings = [...document.querySelectorAll("article h2[id]")];
const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
let place = "";
let offered = false;
let saving;

function offerToResume(from) {
  const heading = from && document.getElementById(from);
  if (offered || !heading || location.hash || scrollY > 200) return;
  offered = true;
  const box = document.getElementById("resume");
  const link = document.createElement("a");
  link.href = `#${from}`;
  link.textContent = heading.textContent;
  link.addEventListener("click", () => { box.hidden = true; });
  box.replaceChildren("You were here: ", link);
  box.hidden = false;
}

function reached() {
  const above = headings.filter((heading) => heading.getBoundingClientRect().top < innerHeight / 2);
  const name = above.at(-1)?.id ?? "";
  if (name === place) return;
  links.get(place)?.removeAttribute("aria-current");
  links.get(name)?.setAttribute("aria-current", "true");
  place = name;
  clearTimeout(saving);
  saving = setTimeout(() => { if (place && scrollY > 200) ask("progress", { tab, place }).catch(() => {}); }, 1500);
}

addEventListener("scroll", reached, { passive: true });

makeCells();
makeQuestions();
makeMoves();
reached();
listen();
