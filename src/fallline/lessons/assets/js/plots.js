// The two plots of "see it move", drawn as SVG: the contours of the loss with the way over them, and the loss's curve.

const WIDTH = 380;
const HEIGHT = 300;
const ROOM = { left: 42, right: 10, top: 10, bottom: 34 };
// The part of the plane that is shown, around the minimum at weight 2 and bias 0.
const MINIMUM = [2, 0];
const WEIGHTS = [-1.5, 5.5];
const BIASES = [-4, 4];
const LEVELS = [0.01, 0.1, 0.5, 2, 6, 14, 28, 50, 80, 120];
const LOSSES = [1e-4, 1e4];
// A path of very many points is drawn with this many of them marked by dots.
const DOTS = 400;

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const scale = ([low, high], from, to) => (value) => from + ((value - low) / (high - low)) * (to - from);
const inverse = ([low, high], from, to) => (at) => low + ((at - from) / (to - from)) * (high - low);
const across = [ROOM.left, WIDTH - ROOM.right];
const upward = [HEIGHT - ROOM.bottom, ROOM.top];
// A way is drawn until it is so many pixels away from the plot.
const FAR = 3000;
const near = ([x, y]) => Math.abs(x) < FAR && Math.abs(y) < FAR;
const bounded = (value) => Math.max(-FAR, Math.min(FAR, value));
let clips = 0;

function frame(label, role) {
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role, "aria-label": label });
  const clip = `clip-${clips++}`;
  const [left, right] = across;
  const [bottom, top] = upward;
  svg.append(
    draw("defs", {}, draw("clipPath", { id: clip }, draw("rect", { x: left, y: top, width: right - left, height: bottom - top }))),
    draw("path", { class: "axis", fill: "none", d: `M${left},${top}V${bottom}H${right}` }),
  );
  const inside = draw("g", { "clip-path": `url(#${clip})` });
  return { svg, inside };
}

function label(svg, x, y, text, attributes = {}) {
  const element = draw("text", { x, y, "text-anchor": "middle", ...attributes });
  element.textContent = text;
  svg.append(element);
}

const line = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${bounded(x).toFixed(1)},${bounded(y).toFixed(1)}`).join("");

/** The loss over weight and bias. Its start can be dragged, or moved with the arrow keys. */
export class Surface {
  constructor(moved) {
    const { svg, inside } = frame("Contours of the loss over weight and bias", "group");
    this.svg = svg;
    this.x = scale(WEIGHTS, ...across);
    this.y = scale(BIASES, ...upward);
    for (const w of [-1, 0, 1, 2, 3, 4, 5]) label(svg, this.x(w), HEIGHT - 18, w);
    for (const b of [-4, -2, 0, 2, 4]) label(svg, ROOM.left - 8, this.y(b) + 4, b, { "text-anchor": "end" });
    label(svg, (across[0] + across[1]) / 2, HEIGHT - 3, "weight");
    label(svg, 12, (upward[0] + upward[1]) / 2, "bias", { transform: `rotate(-90 12 ${(upward[0] + upward[1]) / 2})` });
    this.contours = draw("g");
    this.way = draw("path", { class: "path" });
    this.dots = draw("g", { class: "dots" });
    this.now = draw("circle", { class: "now", r: 6, visibility: "hidden" });
    this.handle = draw("circle", { class: "start", r: 7, tabindex: 0, role: "button" });
    const [mx, my] = [this.x(MINIMUM[0]), this.y(MINIMUM[1])];
    const cross = draw("path", { class: "minimum", d: `M${mx - 6},${my}h12M${mx},${my - 6}v12` });
    inside.append(this.contours, cross, this.way, this.dots, this.now, this.handle);
    svg.append(inside);
    this.dragged(moved);
  }

  dragged(moved) {
    const weights = inverse(WEIGHTS, ...across);
    const biases = inverse(BIASES, ...upward);
    const into = (value, [low, high]) => Number(Math.max(low, Math.min(high, value)).toFixed(2));
    const move = (weight, bias) => moved(into(weight, WEIGHTS), into(bias, BIASES));
    this.handle.addEventListener("pointerdown", (event) => {
      this.handle.setPointerCapture(event.pointerId);
      event.preventDefault();
      this.handle.focus();
    });
    this.handle.addEventListener("pointermove", (event) => {
      if (!this.handle.hasPointerCapture(event.pointerId)) return;
      const box = this.svg.getBoundingClientRect();
      move(weights(((event.clientX - box.left) / box.width) * WIDTH), biases(((event.clientY - box.top) / box.height) * HEIGHT));
    });
    this.handle.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 0.5 : 0.1;
      const by = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[event.key];
      if (!by) return;
      event.preventDefault();
      move(this.at[0] + by[0], this.at[1] + by[1]);
    });
  }

  /** Draws the ellipses ½ dᵀHd = level around the minimum. */
  landscape([ww, wb, bb]) {
    const middle = (ww + bb) / 2;
    const apart = Math.hypot((ww - bb) / 2, wb);
    const angle = Math.atan2(2 * wb, ww - bb) / 2; // of the steepest direction
    this.contours.replaceChildren(...LEVELS.map((level) => {
      const [steep, flat] = [middle + apart, middle - apart].map((value) => Math.sqrt((2 * level) / value));
      const points = Array.from({ length: 121 }, (_, i) => {
        const turn = (i / 120) * 2 * Math.PI;
        const [p, q] = [steep * Math.cos(turn), flat * Math.sin(turn)];
        return [
          this.x(MINIMUM[0] + p * Math.cos(angle) - q * Math.sin(angle)),
          this.y(MINIMUM[1] + p * Math.sin(angle) + q * Math.cos(angle)),
        ];
      });
      return draw("path", { class: "contour", d: line(points) });
    }));
  }

  start(weight, bias) {
    this.at = [weight, bias];
    this.handle.setAttribute("cx", this.x(weight));
    this.handle.setAttribute("cy", this.y(bias));
    this.handle.setAttribute("aria-label", `Start at weight ${weight}, bias ${bias}. Move it with the arrow keys, or drag it.`);
  }

  path(points) {
    const all = points.map((point) => (point[1] === null || point[2] === null ? [Infinity, 0] : [this.x(point[1]), this.y(point[2])]));
    const gone = all.findIndex((at) => !near(at));
    const drawn = gone < 0 ? all : all.slice(0, gone);
    this.way.setAttribute("d", line(drawn));
    const dots = drawn.length > DOTS ? [] : drawn;
    this.dots.replaceChildren(...dots.map(([cx, cy]) => draw("circle", { cx, cy, r: 2 })));
  }

  mark(point) {
    const there = point && point[1] !== null && near([this.x(point[1]), this.y(point[2])]);
    this.now.setAttribute("visibility", there ? "visible" : "hidden");
    if (!there) return;
    this.now.setAttribute("cx", this.x(point[1]));
    this.now.setAttribute("cy", this.y(point[2]));
  }
}

/** The loss after every epoch, on a logarithmic scale. */
export class Curve {
  constructor(looked) {
    const { svg, inside } = frame("The loss after every epoch; described below", "img");
    this.svg = svg;
    this.inside = inside;
    this.ticks = draw("g");
    const logarithms = LOSSES.map(Math.log10);
    const y = scale(logarithms, ...upward);
    this.y = (loss) => y(loss === null ? 99 : Math.log10(Math.max(loss, 1e-12)));
    for (const power of [-4, -2, 0, 2, 4]) {
      const at = y(power);
      inside.append(draw("path", { class: "gridline", d: `M${across[0]},${at}H${across[1]}` }));
      label(svg, ROOM.left - 8, at + 4, power ? `10${"⁻".repeat(power < 0)}${"⁰¹²³⁴"[Math.abs(power)]}` : "1", { "text-anchor": "end" });
    }
    label(svg, (across[0] + across[1]) / 2, HEIGHT - 3, "epoch");
    this.curve = draw("path", { class: "curve" });
    this.cursor = draw("path", { class: "cursor" });
    this.now = draw("circle", { class: "now", r: 5, visibility: "hidden" });
    inside.append(this.cursor, this.curve, this.now);
    svg.append(inside, this.ticks);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      looked(Math.round(this.epochAt(((event.clientX - box.left) / box.width) * WIDTH)));
    });
  }

  path(points, epochs) {
    this.x = scale([0, epochs], ...across);
    this.epochAt = inverse([0, epochs], ...across);
    this.ticks.replaceChildren();
    for (const part of [0, 0.25, 0.5, 0.75, 1]) label(this.ticks, this.x(part * epochs), HEIGHT - 18, Math.round(part * epochs));
    this.curve.setAttribute("d", line(points.map((point) => [this.x(point[0]), this.y(point[3])])));
  }

  mark(point) {
    this.now.setAttribute("visibility", point ? "visible" : "hidden");
    this.cursor.setAttribute("d", point ? `M${this.x(point[0])},${upward[1]}V${upward[0]}` : "");
    if (!point) return;
    this.now.setAttribute("cx", this.x(point[0]));
    this.now.setAttribute("cy", bounded(this.y(point[3])));
  }
}
