// The sections with a slider through time: real images under noise, and the recorded sampling.

const MOVIE_MILLISECONDS = 160; // a frame

function showForward({ images, shape, schedule, schedules }) {
  const place = document.getElementById("forward-body");
  const own = { ...schedule };
  const select = choice("Schedule", schedules.map((name) => [name, name === own.name ? `${name} (this run's)` : name]), own.name);
  const last = own.timesteps - 1;
  const t = slider("Timestep t", { min: 0, max: last, value: Math.round(last * 0.4), whole: true });
  const text = make("p", { className: "quiet", role: "status" });
  const curves = make("div", { className: "panels" });
  const real = images.bytes ? imagesOf(images.bytes, shape) : [];
  const noises = real.map((values, i) => new Stream(0, "figure", i).normals(values.length));
  const row = new Pictures(shape, "Real images under noise", real.length);
  let now, charts = [];

  function choose() {
    now = new Schedule(select.value === own.name ? own : { name: select.value, timesteps: own.timesteps, shift: own.shift });
    const every = Math.max(1, Math.floor(own.timesteps / 1000));
    const times = Array.from({ length: Math.ceil(own.timesteps / every) }, (_, i) => Math.min(i * every, last));
    const levels = times.map((time) => now.level(time));
    const points = (value) => levels.map((level, i) => [times[i], value(level)]);
    const onMark = (x) => { t.set(Math.round(x)); show(); };
    charts = [
      chart({ label: "alpha and sigma over the timestep", x: "timestep", shares: 2, onMark, series: [
        { name: "alpha", points: points((level) => level.alpha) }, { name: "sigma", points: points((level) => level.sigma) }] }),
      chart({ label: "log-SNR over the timestep", x: "timestep", shares: 2, onMark, series: [
        { name: "log-SNR", points: points(({ alpha, sigma }) => 2 * Math.log(alpha / sigma)) }] }),
    ];
    curves.replaceChildren(...charts.map(({ element }) => element));
    show();
  }

  function show() {
    const { alpha, sigma } = now.level(t.number);
    row.showAll(real.map((values, i) => combine([alpha, values], [sigma, noises[i]])));
    text.textContent = `alpha ${alpha.toFixed(3)}, sigma ${sigma.toFixed(3)}, log-SNR ${(2 * Math.log(alpha / sigma)).toFixed(2)}`;
    for (const one of charts) one.mark(t.number);
  }

  t.input.addEventListener("input", show);
  select.input.addEventListener("change", choose);
  const pictures = real.length ? figure(row.canvas, images.text) : make("p", { className: "note" }, images.missing);
  place.append(make("div", { className: "controls" }, select.element, t.element), text, pictures, curves);
  choose();
}

function showReverse({ film, shape }) {
  const place = document.getElementById("reverse-body");
  const noisy = imagesOf(film.noisy, shape), clean = imagesOf(film.clean, shape);
  const columns = Math.ceil(Math.sqrt(film.count));
  const left = new Pictures(shape, "The noisy images x_t of the recording", columns, film.count);
  const right = new Pictures(shape, "The estimates of x_0 of the recording", columns, film.count);
  const last = film.levels.length - 1;
  const step = slider("Frame", { min: 0, max: last, value: last, whole: true, shown: (i) => `${i} of ${last}` });
  const text = make("p", { className: "quiet" });

  function show() {
    const frame = step.number, start = frame * film.count;
    left.showAll(noisy.slice(start, start + film.count));
    right.showAll(clean.slice(start, start + film.count));
    const [time, alpha, sigma] = film.levels[frame];
    text.textContent = `time ${time.toFixed(0)}: alpha ${alpha.toFixed(3)}, sigma ${sigma.toFixed(3)}`;
  }

  let timer = null;
  const play = button("Play", () => {
    if (timer) return stop();
    step.set(0);
    show();
    play.textContent = "Stop";
    timer = setInterval(() => {
      step.set(step.number + 1);
      show();
      if (step.number >= last) stop();
    }, MOVIE_MILLISECONDS);
  });
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  step.input.addEventListener("input", () => { stop(); show(); });
  place.append(make("p", { className: "quiet" }, film.text), make("div", { className: "controls" }, step.element, play), text,
    make("div", { className: "pair" }, figure(left.canvas, "x_t, what the sampler holds"),
      figure(right.canvas, "x_0, what the model estimates from it")));
  show();
}
