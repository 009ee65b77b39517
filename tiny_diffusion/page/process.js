// From a network to images: the denoiser with guidance and clipping, and sampling from noise or from a given image.
// It follows tiny_diffusion/diffusion/process.py, guidance.py, sampling.py and edits.py.

const PREDICTIONS = {
  epsilon: () => [0, 1],
  x0: () => [1, 0],
  v: ({ alpha, sigma }) => [-sigma, alpha],
  flow: () => [-1, 1],
};

// A model of the page: its network, its schedule, what it predicts.
class Model {
  // about: as build.py makes it.   kernel: the bytes of kernel.wasm, or null.
  constructor(about, kernel) {
    this.about = about;
    this.schedule = new Schedule(about.schedule);
    this.network = new UNet(about.network.shape, readWeights(about.network), new Memory(kernel));
    this.evaluations = 0;
  }

  // The network's output under guidance: none + w (label - none).
  predict(x, level, { label = null, guidance = 1, interval = null }) {
    const time = level.angle / (Math.PI / 2);
    const weight = label === null || (interval && (time < interval[0] || time > interval[1])) ? 1 : guidance;
    const output = (asked) => {
      this.evaluations += 1;
      return this.network.evaluate(x, level.time, asked);
    };
    if (weight === 1) return output(label);
    if (weight === 0) return output(null);
    return combine([weight, output(label)], [1 - weight, output(null)]);
  }

  // denoise(x, level) -> {clean, noise}, for the samplers.
  denoiser(request) {
    return (x, level) => {
      const output = this.predict(x, level, request);
      const { alpha, sigma } = level;
      const [a, b] = PREDICTIONS[this.about.prediction](level);
      const determinant = alpha * b - sigma * a;
      const clean = combine([b / determinant, x], [-sigma / determinant, output]);
      if (!this.about.sampling.clip) return { clean, noise: combine([alpha / determinant, output], [-a / determinant, x]) };
      for (let i = 0; i < clean.length; i++) clean[i] = Math.min(Math.max(clean[i], -1), 1);
      return { clean, noise: combine([1 / sigma, x], [-alpha / sigma, clean]) };
    };
  }

  // Yields the steps of one image, as `denoising` of sampling.py does: first the noise, last the image.
  // request: {seed, index, sampler, steps, grid, eta, label, guidance, interval}, and for SDEdit {image, strength}.
  *sample(request) {
    const { channels, height, width } = this.about.network.shape;
    const random = new Stream(request.seed, "image", request.index ?? 0);
    const draw = () => random.normals(channels * height * width);
    const row = SAMPLERS[request.sampler];
    const grid = request.grid ?? row.grid;
    const edits = request.image && request.strength < 1;
    const levels = edits ? levelsFrom(this.schedule, grid, request.steps, request.strength)
      : makeLevels(this.schedule, grid, request.steps);
    const start = edits ? request.image : new Float32Array(channels * height * width);
    const x = combine([levels[0].sigma, draw()], [edits ? levels[0].alpha : 0, start]);
    yield { level: levels[0], x, clean: start };
    yield* row.run(this.denoiser(request), x, levels, draw, row.eta === undefined ? 0 : request.eta ?? row.eta);
  }
}
