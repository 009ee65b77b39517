// The worker of the page: it owns the models and samples with them, so that the page itself never waits.
//
// Messages in:   {type: "open", models: {name: about}, kernel: base64 or null}, and
//                {type: "sample", channel, id, model, request}, which replaces what its channel was doing.
// Messages out:  {type: "opened", kernel: whether WebAssembly runs}, {type: "failed", message},
//                {type: "step", channel, id, step, steps, level, x, clean, done, evaluations, milliseconds}.

const models = {};
const running = new Map(); // channel -> {id, steps, model, count, of, evaluations, milliseconds}
const pause = new MessageChannel(); // a pause between steps, in which messages arrive; setTimeout would take 4 ms
let waiting = false;

function open({ models: about, kernel }) {
  let bytes = kernel === null ? null : bytesOf(kernel);
  try {
    if (bytes) new Memory(bytes);
  } catch (error) {
    bytes = null; // no WebAssembly, or none with vectors: plain JavaScript gives the same numbers
  }
  for (const name of Object.keys(about)) models[name] = new Model(about[name], bytes);
  postMessage({ type: "opened", kernel: bytes !== null, multiplications: multiplications() });
}

// Of one evaluation of each model.
function multiplications() {
  const counts = {};
  for (const [name, { network }] of Object.entries(models)) {
    const { channels, height, width } = network.shape;
    network.memory.products = 0;
    network.evaluate(new Float32Array(channels * height * width), 0, null);
    counts[name] = network.memory.products;
  }
  return counts;
}

function begin({ channel, id, model, request }) {
  const steps = models[model].sample(request);
  running.set(channel, { id, model: models[model], steps, count: 0, of: request.steps, evaluations: 0, milliseconds: 0 });
  goOn();
}

function goOn() {
  if (waiting || !running.size) return;
  waiting = true;
  pause.port2.postMessage(null);
}

// One step of every channel.
pause.port1.onmessage = () => {
  waiting = false;
  for (const [channel, run] of running) {
    const before = run.model.evaluations;
    const started = performance.now();
    const { value } = run.steps.next();
    run.milliseconds += performance.now() - started;
    run.evaluations += run.model.evaluations - before;
    if (!value) {
      running.delete(channel);
      continue;
    }
    const done = value.level.sigma === 0;
    if (done) running.delete(channel);
    const { id, count, of, evaluations, milliseconds } = run;
    const level = { time: value.level.time, alpha: value.level.alpha, sigma: value.level.sigma };
    postMessage({ type: "step", channel, id, step: count, steps: of, level, x: value.x, clean: value.clean, done,
      evaluations, milliseconds });
    run.count += 1;
  }
  goOn();
};

onmessage = ({ data }) => {
  try {
    if (data.type === "open") open(data);
    else begin(data);
  } catch (error) {
    postMessage({ type: "failed", message: String(error) });
  }
};
