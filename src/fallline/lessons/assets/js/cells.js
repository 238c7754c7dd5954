// Code cells: edited, run, stopped and reset; and what they put out.

import { ask, on, tab } from "./connection.js";
import { makeEditor, setCode } from "./editor.js";
import { complain } from "./notices.js";

const MILLISECONDS_BEFORE_SAVING = 600;
const cells = new Map();

class Cell {
  constructor(element) {
    this.element = element;
    this.name = element.dataset.cell;
    this.title = element.querySelector(".cell-title").textContent;
    this.original = element.querySelector(".source code").textContent;
    this.outputs = element.querySelector(".outputs");
    this.state = element.querySelector(".cell-state");
    this.button = (name) => element.querySelector(`.${name}`);
    const place = element.querySelector(".source");
    const listing = place.firstElementChild;
    this.editor = makeEditor(place, this.original, `Code: ${this.title}`, {
      run: () => this.run(),
      runAndNext: () => { this.run(); this.next()?.editor.focus(); },
      changed: () => this.changed(),
    });
    listing.remove();
    this.button("run").addEventListener("click", () => this.run());
    this.button("run-above").addEventListener("click", () => run([...cells.values()].slice(0, this.position())));
    this.button("reset").addEventListener("click", () => { setCode(this.editor, this.original); this.editor.focus(); });
    for (const name of ["run", "run-above"]) this.button(name).disabled = false;
    if (this.position() === 0) this.button("run-above").remove();
  }

  position() { return [...cells.keys()].includes(this.name) ? [...cells.keys()].indexOf(this.name) : cells.size; }
  next() { return [...cells.values()][this.position() + 1]; }
  code() { return this.editor.state.doc.toString(); }
  run() { run([this]); }

  changed() {
    const edited = this.code() !== this.original;
    this.button("reset").hidden = !edited;
    this.element.classList.toggle("edited", edited);
    if (this.quiet) return;
    clearTimeout(this.saving);
    this.saving = setTimeout(() => this.save(), MILLISECONDS_BEFORE_SAVING);
  }

  save() {
    clearTimeout(this.saving);
    this.saving = undefined;
    const code = this.code();
    ask("progress", { tab, code: { [this.name]: code === this.original ? null : code } }).catch(complain);
  }

  /** Shows code that comes from the learner's progress, without saving it again. */
  show(code) {
    if (code === this.code()) return;
    this.quiet = true;
    setCode(this.editor, code);
    this.quiet = false;
  }

  say(text) { this.state.textContent = text; }

  become({ state, seconds, dropped }) {
    this.element.dataset.state = state;
    if (state === "running") {
      if (!this.cleared) { this.outputs.replaceChildren(); this.cleared = true; }
      this.say("running …");
    } else {
      this.cleared = false;
      const took = seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${(seconds ?? 0).toFixed(1)} s`;
      this.say({
        queued: "waits", skipped: "not run", done: `done in ${took}`, failed: `failed after ${took}`,
        stopped: `stopped after ${took}`,
      }[state]);
    }
    if (dropped) this.cut(dropped);
  }

  put(output) {
    if (output.kind === "clear") return this.outputs.replaceChildren();
    if (output.kind === "figure") {
      const image = document.createElement("img");
      image.className = "figure";
      image.src = output.source;
      image.alt = `${this.title}: the figure that the code has drawn`;
      if (output.width) [image.width, image.height] = [output.width, output.height];
      return this.outputs.append(image);
    }
    const last = this.outputs.lastElementChild;
    const kind = output.kind === "error" ? "error" : output.stream;
    if (output.kind === "text" && last?.tagName === "PRE" && last.className === kind) return last.append(output.text);
    const listing = document.createElement("pre");
    listing.className = kind;
    listing.tabIndex = 0;
    listing.append(output.text);
    this.outputs.append(listing);
  }

  /** Says how much was printed that is not shown. */
  cut(dropped) {
    let place = this.outputs.querySelector(".cut");
    if (!place) {
      place = document.createElement("p");
      place.className = "cut";
    }
    const size = dropped < 1e6 ? `${Math.ceil(dropped / 1e3)} kB` : `${(dropped / 1e6).toFixed(1)} MB`;
    place.textContent = `… and ${size} more, which are not shown.`;
    this.outputs.append(place);
  }
}

/** Runs cells, one after the other. */
function run(chosen) {
  for (const cell of chosen) {
    if (cell.saving) cell.save();
    if (cell.element.dataset.state !== "running") cell.become({ state: "queued" });
  }
  ask("run", { cells: chosen.map((cell) => ({ cell: cell.name, code: cell.code() })) }).catch((error) => {
    for (const cell of chosen) cell.become({ state: "skipped" });
    complain(error);
  });
}

/** Makes the listings of the page into cells. */
export function makeCells() {
  for (const element of document.querySelectorAll(".cell")) cells.set(element.dataset.cell, new Cell(element));
  const first = cells.values().next().value;
  first?.button("run-above")?.remove();
  document.getElementById("run-all").addEventListener("click", () => run([...cells.values()]));
  document.getElementById("stop").addEventListener("click", () => ask("stop").catch(complain));
  document.getElementById("restart").addEventListener("click", () => ask("restart").catch(complain));
  on("hello", (event) => {
    for (const [name, code] of Object.entries(event.progress.code ?? {})) cells.get(name)?.show(code);
    for (const ran of event.cells) {
      const cell = cells.get(ran.cell);
      if (!cell) continue;
      cell.outputs.replaceChildren();
      cell.cleared = true;
      for (const output of ran.outputs) cell.put(output);
      cell.become(ran);
    }
  });
  on("cell", (event) => cells.get(event.cell)?.become(event));
  on("output", (event) => cells.get(event.cell)?.put(event.output));
  on("progress", (event) => {
    if (event.tab === tab) return;
    for (const [name, code] of Object.entries(event.given.code ?? {})) {
      const cell = cells.get(name);
      cell?.show(code ?? cell.original);
    }
  });
}
