// Drawing a picture by pointer or keys, adding noise to it, and denoising it: SDEdit (Meng et al., 2022).

// A canvas to draw on, in the pixels of the model's images.
class Easel {
  constructor(shape, onChange) {
    Object.assign(this, { shape, onChange, values: new Float32Array(shape.channels * shape.height * shape.width) });
    this.pictures = new Pictures(shape, "");
    this.canvas = this.pictures.canvas;
    this.canvas.classList.add("drawable");
    this.cursor = [Math.floor(shape.width / 2), Math.floor(shape.height / 2)];
    Object.assign(this, { last: null, erasing: false });
    for (const [name, value] of Object.entries({ tabindex: 0, role: "application",
      "aria-label": "Drawing. Draw with the pointer, or move with the arrow keys and paint with the space bar" })) {
      this.canvas.setAttribute(name, value);
    }
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.last = this.place(event);
      this.stroke(this.last);
    });
    this.canvas.addEventListener("pointermove", (event) => { if (this.last) this.stroke(this.place(event)); });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => { this.last = null; });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focus", () => this.show());
    this.canvas.addEventListener("blur", () => this.show());
    this.clear();
  }

  clear() {
    this.set(new Float32Array(this.values.length).fill(-1));
  }

  set(values) {
    this.values = Float32Array.from(values);
    this.show();
    this.onChange();
  }

  show() {
    const shown = Float32Array.from(this.values);
    if (document.activeElement === this.canvas && this.canvas.matches(":focus-visible")) {
      const at = this.cursor[1] * this.shape.width + this.cursor[0];
      shown[at] = shown[at] > 0 ? -0.4 : 0.4;
    }
    this.pictures.show(shown);
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.shape.width, ((event.clientY - box.top) / box.height) * this.shape.height];
  }

  // Paints from the last place to this one.
  stroke([x, y]) {
    const [fromX, fromY] = this.last;
    const parts = Math.ceil(Math.hypot(x - fromX, y - fromY) * 2) + 1;
    for (let i = 1; i <= parts; i++) this.dab(fromX + ((x - fromX) * i) / parts, fromY + ((y - fromY) * i) / parts);
    this.last = [x, y];
    this.show();
    this.onChange();
  }

  // A round spot with a soft edge, in proportion to the image: two pixels wide in an image of 28.
  dab(x, y) {
    const { channels, height, width } = this.shape;
    const radius = Math.max(0.75, width / 22);
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width; column++) {
        const ink = Math.min(Math.max(radius + 0.5 - Math.hypot(column + 0.5 - x, row + 0.5 - y), 0), 1) * 2 - 1;
        for (let at = row * width + column; at < channels * height * width; at += height * width) {
          this.values[at] = this.erasing ? Math.min(this.values[at], -ink) : Math.max(this.values[at], ink);
        }
      }
    }
  }

  key(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] }[event.key];
    if (!by) return;
    event.preventDefault();
    const limits = [this.shape.width - 1, this.shape.height - 1];
    this.cursor = this.cursor.map((value, i) => Math.min(Math.max(value + by[i], 0), limits[i]));
    if (event.key === " ") {
      this.dab(this.cursor[0] + 0.5, this.cursor[1] + 0.5);
      this.onChange();
    }
    this.show();
  }
}

// state: of live.js.   images: real ones to begin with, or none.
function showDrawing(place, state, images) {
  const { shape, about, painter } = state;
  const quick = Object.keys(about).includes("student") ? "student" : "main";
  const model = choice("Model", Object.entries(about).map(([key, { title }]) => [key, title]), quick);
  const strength = slider("Noise to add", { min: 0.05, max: 1, step: 0.01, value: 0.5, shown: (v) => `${Math.round(v * 100)} %` });
  const steps = slider("Steps", { min: 1, max: 20, value: quick === "student" ? about.student.sampling.steps : 6 });
  const { classes, guidable } = about.main;
  const label = choice("Class", [...(guidable ? [["none", "any (no class)"]] : []), ...classes], guidable ? "none" : classes[0]?.[0] ?? "none");
  const noisy = new Pictures(shape, "The drawing under noise"), clean = new Pictures(shape, "The drawing denoised");
  const text = make("p", { className: "quiet" });
  let easel = null;

  function draw() {
    if (!easel) return;
    const { sampling } = about[model.value];
    const request = { sampler: sampling.sampler, grid: sampling.grid, eta: sampling.eta, steps: steps.number, guidance: 1,
      label: label.value === "none" ? null : Number(label.value), seed: state.seed.value || "0", index: state.index.number,
      image: easel.values, strength: strength.number };
    painter.sample("drawing", model.value, request, (step) => {
      if (step.step === 0) noisy.show(step.x);
      else if (step.done) clean.show(step.x);
      text.textContent = describeStep(step);
    });
  }

  easel = new Easel(shape, draw);
  for (const { input } of [model, strength, steps, label, state.seed]) input.addEventListener("input", draw);
  const real = images.bytes ? imagesOf(images.bytes, shape) : [];
  let next = 0;
  const erase = button("Eraser", () => {
    easel.erasing = !easel.erasing;
    erase.textContent = easel.erasing ? "Brush" : "Eraser";
  }, true);
  const buttons = [button("Clear", () => easel.clear(), true), erase,
    ...(real.length ? [button("Take a real image", () => easel.set(real[next++ % real.length]), true)] : [])];
  const shown = [...(Object.keys(about).length > 1 ? [model] : []), strength, steps, ...(classes.length ? [label] : [])];
  place.append(make("h3", {}, "Draw, add noise, denoise"),
    make("p", {}, "Draw with the mouse or a finger, or with the arrow keys and the space bar. Noise is added to the drawing "
      + "and the model removes it. With more noise it keeps less of the drawing, and the result looks more like its own images."),
    make("div", { className: "controls" }, ...shown.map(({ element }) => element)),
    make("div", { className: "controls" }, ...buttons),
    make("div", { className: "triple" }, figure(easel.canvas, "Your drawing"), figure(noisy.canvas, "With noise"),
      figure(clean.canvas, "Denoised")), text);
  if (real.length) easel.set(real[next++]);
  else draw();
}
