// The live section: the model samples in the worker, and the page shows each step.

// Speaks with the worker.  A request on a channel replaces the one before it.
class Painter {
  constructor(script, models, kernel) {
    this.worker = new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
    this.calls = new Map(); // channel -> {id, onStep}
    this.ids = 0;
    this.opened = new Promise((resolve, reject) => {
      this.worker.onmessage = ({ data }) => {
        if (data.type === "opened") resolve(data);
        else if (data.type === "failed") reject(new Error(data.message));
        else if (this.calls.get(data.channel)?.id === data.id) this.calls.get(data.channel).onStep(data);
      };
      this.worker.onerror = (event) => reject(new Error(event.message));
    });
    this.worker.postMessage({ type: "open", models, kernel });
  }

  sample(channel, model, request, onStep) {
    const id = (this.ids += 1);
    this.calls.set(channel, { id, onStep });
    this.worker.postMessage({ type: "sample", channel, id, model, request });
  }
}

// The settings of a model's sampling, as controls.  about: what the page says of the models, by name.
class Settings {
  constructor(about, legend, onChange) {
    this.about = about;
    this.body = make("div", { className: "controls" });
    this.element = make("fieldset", {}, make("legend", {}, legend), this.body);
    this.model = choice("Model", Object.entries(about).map(([key, { title }]) => [key, title]), Object.keys(about)[0]);
    this.onChange = onChange;
    this.model.input.addEventListener("change", () => { this.build(); onChange(); });
    this.build();
  }

  // The controls that this model and this sampler have.
  build() {
    const { sampling, schedule, classes, guidable } = this.about[this.model.value];
    const most = Math.min(schedule.timesteps, 100);
    this.sampler = choice("Sampler", Object.keys(SAMPLERS).map((key) => [key, key]), sampling.sampler);
    this.steps = slider("Steps", { min: 1, max: most, value: Math.min(sampling.steps, most) });
    this.eta = slider("eta, fresh noise", { min: 0, max: 1.5, step: 0.05, value: sampling.eta ?? 0 });
    const labels = [...(guidable ? [["none", "any (no class)"]] : []), ...classes];
    this.label = choice("Class", labels, classes.length ? classes[Math.min(3, classes.length - 1)][0] : "none");
    this.guidance = slider("Guidance", { min: 0, max: 5, step: 0.25, value: sampling.guidance });
    const [low, high] = sampling.interval ?? [0, 1];
    this.low = slider("Guided from time", { min: 0, max: 1, step: 0.01, value: low });
    this.high = slider("Guided to time", { min: 0, max: 1, step: 0.01, value: high });
    const shown = [this.sampler, this.steps, this.eta, ...(classes.length ? [this.label] : []),
      ...(guidable ? [this.guidance, this.low, this.high] : [])];
    this.sampler.input.addEventListener("change", () => this.useItsEta());
    for (const { input } of shown) input.addEventListener(input.tagName === "SELECT" ? "change" : "input", () => this.changed());
    const several = Object.keys(this.about).length > 1 ? [this.model] : [];
    this.body.replaceChildren(...[...several, ...shown].map(({ element }) => element));
    this.show();
  }

  // Another sampler brings its own eta, as in sample.py.
  useItsEta() {
    const { sampling } = this.about[this.model.value];
    const { eta = 0, maxEta = 0 } = SAMPLERS[this.sampler.value];
    this.eta.input.max = maxEta;
    this.eta.set(this.sampler.value === sampling.sampler ? sampling.eta ?? eta : eta);
  }

  changed() {
    this.show();
    this.onChange();
  }

  // Only what has an effect can be moved.
  show() {
    const row = SAMPLERS[this.sampler.value];
    this.eta.element.hidden = row.eta === undefined;
    this.eta.input.max = row.maxEta ?? 0;
    this.eta.update();
    const guided = this.label.value !== "none" && this.guidance.number !== 1;
    this.guidance.input.disabled = this.label.value === "none";
    this.low.element.hidden = this.high.element.hidden = !guided;
  }

  // What process.js is asked for.  Another sampler than the model's own brings its grid.
  request() {
    const { sampling } = this.about[this.model.value];
    const sampler = this.sampler.value, row = SAMPLERS[sampler];
    return {
      sampler,
      steps: this.steps.number,
      grid: sampler === sampling.sampler ? sampling.grid : row.grid,
      eta: row.eta === undefined ? null : this.eta.number,
      label: this.label.value === "none" ? null : Number(this.label.value),
      guidance: this.guidance.number,
      interval: this.low.number > 0 || this.high.number < 1 ? [this.low.number, this.high.number] : null,
    };
  }

  // The command that draws the same picture, in parts that a line does not break.
  command({ sampler, steps, grid, eta, label, guidance, interval, seed, index }) {
    const { path, classes } = this.about[this.model.value];
    const guided = label !== null && guidance !== 1;
    return ["python", "sample.py", "--checkpoint", path, `--seed ${seed}`, `--indices ${index}`, `--sampler ${sampler}`,
      `--steps ${steps}`, `--grid ${grid}`, ...(eta === null ? [] : [`--eta ${eta}`]),
      ...(classes.length ? [`--classes ${label ?? "none"}`] : []),
      ...(classes.length && label !== null ? [`--guidance ${guidance}`] : []),
      ...(guided ? [`--guidance_interval ${interval ?? "0,1"}`] : [])];
  }
}

// One setting with its two pictures.
class Panel {
  constructor(live, channel, legend) {
    const { shape } = live;
    Object.assign(this, { live, channel });
    this.settings = new Settings(live.about, legend, () => this.draw());
    this.noisy = new Pictures(shape, `${legend}: x_t`);
    this.clean = new Pictures(shape, `${legend}: estimate of x_0`);
    this.text = make("p", { className: "quiet" });
    this.command = make("code");
    this.element = make("div", { className: "panel" }, this.settings.element, make("div", { className: "pair" },
      figure(this.noisy.canvas, "x_t"), figure(this.clean.canvas, "x_0, the estimate")), this.text,
    make("p", { className: "quiet" }, "The same picture: ", this.command));
  }

  draw() {
    const { live, settings } = this;
    const request = { ...settings.request(), seed: live.seed.value || "0", index: live.index.number };
    this.command.replaceChildren(...commandParts(this.settings.command(request)));
    live.painter.sample(this.channel, settings.model.value, request, (step) => {
      this.noisy.show(step.x);
      this.clean.show(step.clean);
      this.text.textContent = describeStep(step);
    });
  }
}

function describeStep({ step, steps, done, evaluations, milliseconds }) {
  if (!done) return `Step ${step} of ${steps}`;
  const each = evaluations ? `, ${(milliseconds / evaluations).toFixed(1)} ms each` : "";
  return `Done: ${evaluations} evaluations of the network in ${milliseconds.toFixed(0)} ms${each}.`;
}

async function showLive({ live, shape, images }) {
  const place = document.getElementById("live-body");
  if (live.missing) {
    place.append(make("p", { className: "note" }, live.missing));
    return;
  }
  const status = make("p", { className: "quiet", role: "status" }, "The model is starting.");
  place.append(status);
  const state = { shape, about: live.models, seed: numberField("Seed", 0, 2 ** 53), index: numberField("Image of the seed", 0, 1e6) };
  try {
    state.painter = new Painter(document.getElementById("worker").textContent, live.models, live.kernel);
    const { kernel, multiplications } = await state.painter.opened;
    const millions = (multiplications.main / 1e6).toFixed(0);
    status.textContent = `One evaluation takes ${millions} million multiplications, here ${kernel ? "in WebAssembly"
      : "in plain JavaScript, because this browser has no WebAssembly with vectors"}.`;
  } catch (error) {
    status.textContent = `The model cannot run in this browser (${error.message}); the recordings above show it.`;
    return;
  }
  const first = new Panel(state, "first", "Setting"), second = new Panel(state, "second", "Second setting");
  const panels = make("div", { className: "panels" }, first.element);
  const draw = () => { first.draw(); if (second.element.isConnected) second.draw(); };
  const compare = button("Compare with a second setting", () => {
    if (second.element.isConnected) second.element.remove();
    else panels.append(second.element);
    compare.textContent = second.element.isConnected ? "One setting" : "Compare with a second setting";
    draw();
  }, true);
  const another = () => { state.seed.set(String(state.seed.number + 1)); draw(); };
  for (const { input } of [state.seed, state.index]) input.addEventListener("input", draw);
  place.append(make("div", { className: "controls" }, state.seed.element, state.index.element, button("Draw", draw),
    button("Next seed", another, true), compare), panels);
  showDrawing(place, state, images);
  draw();
}
