// Sentences for the learner, above the text, until they are dismissed.

const place = document.getElementById("notices");
const MOST = 3;

/** Says something; what is said already is not said twice. */
export function notice(text) {
  for (const shown of place.children) if (shown.dataset.text === text) return;
  const box = document.createElement("p");
  box.className = "notice";
  box.dataset.text = text;
  const words = document.createElement("span");
  words.textContent = text;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Dismiss";
  button.addEventListener("click", () => box.remove());
  box.append(words, button);
  place.append(box);
  while (place.children.length > MOST) place.firstElementChild.remove();
}

/** Says what an error says. */
export const complain = (error) => notice(error.message);
