// See it move: a training run on three points, as a walk over the loss's contours and as a curve, linked with each other.
// The run happens in the page's Python; here it is asked for, drawn, and compared with what the learner had guessed.

import { ask, on, tab } from "./connection.js";
import { complain } from "./notices.js";
import { Curve, Surface } from "./plots.js";

const DEFAULTS = { optimizer: "sgd", lr: 0.01, momentum: 0, batch: 3, epochs: 100, weight: -0.0075, bias: 0.5364 };
const GUESSES = {
  arrived: "It arrives: the loss falls below 0.01",
  "on the way": "It is still on its way at the end",
  diverged: "It diverges",
};
const PACES = { 8: "slow", 30: "medium", 120: "fast" };
// The slider of the learning rate runs over its logarithm.
const SLOWEST = -4;
const FASTEST = 1;
const MILLISECONDS_BEFORE_ASKING = 150;

const still = matchMedia("(prefers-reduced-motion: reduce)");

/** An element with attributes and children. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function short(value) {
  if (value === null) return "beyond all numbers";
  return Math.abs(value) >= 1e6 ? value.toExponential(2) : Number(value.toPrecision(4)).toString();
}

class Move {
  constructor(element) {
    this.element = element;
    this.name = element.id;
    this.settings = { ...DEFAULTS, ...read(element.dataset.settings), ...read(location.search) };
    this.points = [];
    this.state = "still";
    this.build(element.querySelector(".stage"));
    this.show();
    this.expect();
  }

  // What is on the stage.

  build(stage) {
    const field = (name, label, attributes, extra = []) => {
      const input = make("input", {
        type: "number", name, step: "any", required: true, ...attributes,
        onchange: () => this.change({ [name]: input.valueAsNumber }),
      });
      this.inputs[name] = input;
      return make("label", {}, label, input, ...extra);
    };
    const choice = (name, label, options, change) => {
      const select = make("select", { name, onchange: () => change(select.value) },
        ...Object.entries(options).map(([value, text]) => make("option", { value }, text)));
      this.inputs[name] = select;
      return make("label", {}, label, select);
    };
    this.inputs = {};
    this.slider = make("input", {
      type: "range", min: SLOWEST, max: FASTEST, step: 0.01, "aria-label": "learning rate, on a logarithmic scale",
      oninput: () => this.change({ lr: Number((10 ** this.slider.valueAsNumber).toPrecision(3)) }),
    });
    this.marks = make("div", { class: "rate-marks", "aria-hidden": "true" });
    this.momentum = field("momentum", "momentum", { min: 0, max: 0.999 });
    this.controls = make("div", { class: "controls" },
      choice("optimizer", "optimizer", { sgd: "SGD", rmsprop: "RMSprop", adam: "Adam" }, (optimizer) => this.change({ optimizer })),
      this.momentum,
      choice("batch", "batch", { 3: "all 3 points", 2: "2 points", 1: "1 point" }, (batch) => this.change({ batch: Number(batch) })),
      field("epochs", "epochs", { min: 1, max: 2000, step: 1 }),
      make("div", { class: "rate" }, field("lr", "learning rate", { min: 1e-6, max: 1000 }), this.slider, this.marks),
      field("weight", "start: weight", { min: -100, max: 100 }),
      field("bias", "start: bias", { min: -100, max: 100 }),
      choice("pace", "speed", PACES, (pace) => { this.pace = Number(pace); }),
    );
    this.pace = 30;
    this.inputs.pace.value = "30";

    this.guesses = Object.entries(GUESSES).map(([value, text]) => {
      const input = make("input", { type: "radio", name: `${this.name}-guess`, value, onchange: () => this.ready() });
      return make("label", {}, input, text);
    });
    this.guess = make("fieldset", { class: "guess" }, make("legend", {}, "Guess first: what will happen?"), ...this.guesses);
    this.start = make("button", { type: "button", class: "primary", onclick: () => this.begin() }, "Train");
    this.hold = make("button", { type: "button", onclick: () => this.toggle() }, "Pause");
    this.end = make("button", { type: "button", onclick: () => ask("move", { action: "stop" }).catch(complain) }, "Stop");
    this.problem = make("span", { class: "problem", role: "status" });
    this.surface = new Surface((weight, bias) => this.change({ weight, bias }));
    this.curve = new Curve((epoch) => this.look(epoch));
    this.scrub = make("input", {
      type: "range", min: 0, max: 0, step: 1, value: 0, "aria-label": "epoch to look at",
      oninput: () => this.look(this.scrub.valueAsNumber),
    });
    this.here = make("p", { class: "here" });
    this.known = make("p");
    this.verdict = make("p");
    this.judged = make("p");
    stage.append(
      this.controls, this.guess,
      make("div", { class: "playing" }, this.start, this.hold, this.end, this.problem),
      make("div", { class: "plots" },
        make("figure", {}, make("figcaption", {}, "The way over the loss of weight and bias"), this.surface.svg),
        make("figure", {}, make("figcaption", {}, "The loss after every epoch (logarithmic)"), this.curve.svg)),
      make("div", { class: "look" }, make("label", { class: "scrub" }, "Look at epoch", this.scrub), this.here),
      make("div", { class: "told", role: "status" }, this.known, this.verdict, this.judged),
    );
    stage.hidden = false;
  }

  // Settings.

  change(some) {
    for (const name of Object.keys(some)) {
      const input = this.inputs[name];
      if (Number.isNaN(some[name])) { input.setAttribute("aria-invalid", "true"); this.say("A number is missing."); return; }
      input?.removeAttribute("aria-invalid");
    }
    Object.assign(this.settings, some);
    if (this.state === "running" || this.state === "paused") ask("move", { action: "stop" }).catch(() => {});
    this.points = [];
    this.state = "still";
    for (const label of this.guesses) label.firstElementChild.checked = false;
    this.verdict.textContent = this.judged.textContent = this.here.textContent = "";
    const query = new URLSearchParams(Object.entries(this.settings).filter(([name, value]) => value !== DEFAULTS[name]));
    history.replaceState(null, "", `${location.pathname}${query.size ? `?${query}` : ""}${location.hash}`);
    this.show();
    clearTimeout(this.asking);
    this.asking = setTimeout(() => this.expect(), MILLISECONDS_BEFORE_ASKING);
  }

  /** What the optimizer is told; Adam knows no momentum. */
  get asked() {
    const { momentum, ...others } = this.settings;
    return this.settings.optimizer === "adam" ? others : this.settings;
  }

  async expect() {
    try {
      const told = await ask("expect", { settings: this.asked });
      this.say("");
      this.known.textContent = "Guess, then train.";
      this.expected = told.text;
      this.surface.landscape(told.hessian);
      this.mark(told);
      this.valid = true;
    } catch (error) {
      this.valid = false;
      this.say(error.message);
    }
    this.ready();
  }

  mark({ critical, bound }) {
    this.marks.replaceChildren();
    if (critical === null) return;
    const at = (Math.log10(critical) - SLOWEST) / (FASTEST - SLOWEST);
    const label = make("span", { class: "critical" }, at < 0.6 ? `▲ ${bound}` : `${bound} ▲`);
    // The middle of the slider's thumb is never nearer to an end than its radius, of 8 pixels.
    label.style.left = `calc(8px + ${at} * (100% - 16px))`;
    label.classList.toggle("leftward", at >= 0.6);
    this.marks.append(label);
    this.slider.setAttribute("aria-description", `critical learning rate: ${bound}`);
  }

  // The run.

  get guessed() { return this.guesses.map((label) => label.firstElementChild).find((input) => input.checked)?.value; }

  begin() {
    const pace = still.matches ? 240 : this.pace;
    this.mine = true;
    ask("progress", { tab, guesses: { [this.name]: this.guessed } }).catch(complain);
    ask("move", { action: "start", settings: this.asked, pace }).catch((error) => this.say(error.message));
  }

  toggle() { ask("move", { action: this.state === "paused" ? "resume" : "pause" }).catch(complain); }

  take(event) {
    if (event.began) {
      this.points = [];
      if (!this.mine) { Object.assign(this.settings, event.settings); }
      this.known.textContent = this.expected ?? "";
      this.verdict.textContent = this.judged.textContent = "";
    }
    const before = this.state;
    this.state = event.state;
    this.points.push(...(event.points ?? []));
    if (event.state === "waiting") this.say("Waits until the code above has run …");
    else if (before === "waiting") this.say("");
    if (event.outcome) this.finish(event.outcome);
    if (event.state === "stopped" && this.points.length) this.verdict.textContent = `Stopped after epoch ${this.points.at(-1)[0]}.`;
    if (event.state === "done" || event.state === "stopped") this.mine = false;
    if (!still.matches || event.state !== "running") this.show();
    else this.ready();
  }

  finish(outcome) {
    this.verdict.textContent = outcome.text;
    this.verdict.className = outcome.kind === "on the way" ? "" : outcome.kind;
    const guessed = this.guessed;
    if (guessed) this.judged.textContent = guessed === outcome.kind ? "You guessed that." : `You guessed: ${GUESSES[guessed].toLowerCase()}.`;
  }

  // What is seen.

  ready() {
    const runs = ["running", "paused", "waiting"].includes(this.state);
    this.start.disabled = runs || !this.valid || !this.guessed;
    this.start.textContent = this.points.length && !runs ? "Train again" : "Train";
    this.hold.disabled = !runs || this.state === "waiting";
    this.hold.textContent = this.state === "paused" ? "Go on" : "Pause";
    this.end.disabled = !runs;
  }

  show() {
    const { settings } = this;
    for (const name of ["lr", "momentum", "epochs", "weight", "bias", "optimizer", "batch"]) {
      if (document.activeElement !== this.inputs[name]) this.inputs[name].value = settings[name];
    }
    if (document.activeElement !== this.slider) this.slider.value = Math.log10(settings.lr);
    this.slider.setAttribute("aria-valuetext", `${settings.lr}`);
    this.inputs.momentum.disabled = settings.optimizer === "adam";
    this.surface.start(settings.weight, settings.bias);
    this.surface.path(this.points);
    this.curve.path(this.points, settings.epochs);
    this.scrub.max = Math.max(0, this.points.length - 1);
    this.scrub.disabled = this.points.length < 2;
    this.look(this.points.length - 1);
    this.ready();
  }

  /** Marks an epoch in both plots, and says where it was. */
  look(epoch) {
    const point = this.points[Math.min(Math.max(0, epoch), this.points.length - 1)];
    this.surface.mark(point);
    this.curve.mark(point);
    if (!point) return;
    this.scrub.value = point[0];
    const text = `Epoch ${point[0]}: weight ${short(point[1])}, bias ${short(point[2])}, loss ${short(point[3])}.`;
    this.scrub.setAttribute("aria-valuetext", text);
    this.here.textContent = text;
  }

  say(text) { this.problem.textContent = text; }
}

/** Settings out of the query of an address; what is no setting is left out. */
function read(query) {
  const found = {};
  for (const [name, value] of new URLSearchParams(query ?? "")) {
    if (!(name in DEFAULTS)) continue;
    if (name === "optimizer") { if (["sgd", "rmsprop", "adam"].includes(value)) found[name] = value; }
    else if (value.trim() !== "" && Number.isFinite(Number(value))) found[name] = Number(value);
  }
  return found;
}

/** Brings the page's moving parts to life. */
export function makeMoves() {
  const moves = [...document.querySelectorAll(".move")].map((element) => new Move(element));
  on("move", (event) => (moves.find((move) => move.mine) ?? moves[0])?.take(event));
}
