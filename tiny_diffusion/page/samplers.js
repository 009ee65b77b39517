// Samplers: tiny_diffusion/diffusion/samplers.py and multistep.py, where their sources are named.
//
// Each is a generator.  It is given denoise(x, level) -> {clean, noise}, the noise x, the levels to visit with CLEAN at
// the end, draw() for fresh noise, and eta; it yields {level, x, clean} after each step.  Images are Float32Arrays.

// The sum of factor * array over pairs.
function combine(...pairs) {
  const sum = new Float32Array(pairs[0][1].length);
  for (let i = 0; i < sum.length; i++) {
    let total = 0;
    for (const [factor, values] of pairs) total += factor * values[i];
    sum[i] = total;
  }
  return sum;
}

// The derivative of x / radius by the angle.
const velocity = ({ alpha, sigma, radius }, { clean, noise }) =>
  combine([alpha / radius, noise], [-sigma / radius, clean]);

const pairwise = (levels) => levels.slice(1).map((following, i) => [levels[i], following]);

function* ddim(denoise, x, levels, draw, eta) {
  for (const [level, following] of pairwise(levels)) {
    const { clean, noise } = denoise(x, level);
    let fresh = 0; // the part of following.sigma^2 that is drawn anew
    if (eta) {
      const kept = ((level.alpha / following.alpha) * following.sigma) ** 2;
      fresh = (eta ** 2 * (level.sigma ** 2 - kept) * following.sigma ** 2) / level.sigma ** 2;
    }
    const old = Math.sqrt(Math.max(following.sigma ** 2 - fresh, 0));
    x = combine([following.alpha, clean], [old, noise]);
    if (fresh > 0) x = combine([1, x], [Math.sqrt(fresh), draw()]);
    yield { level: following, x, clean };
  }
}

function* heun(denoise, x, levels) {
  for (const [level, following] of pairwise(levels)) {
    const estimate = denoise(x, level);
    if (following.sigma === 0) {
      yield { level: following, x: estimate.clean, clean: estimate.clean };
      continue;
    }
    const slope = velocity(level, estimate), step = following.angle - level.angle, { radius } = following;
    const guess = combine([radius / level.radius, x], [radius * step, slope]);
    const second = velocity(following, denoise(guess, following));
    x = combine([radius / level.radius, x], [(radius * step) / 2, slope], [(radius * step) / 2, second]);
    yield { level: following, x, clean: estimate.clean };
  }
}

// e^-h of the step in log(alpha / sigma), which is 0 at alpha = 0.
const shrinkOf = (level, following) => (level.alpha * following.sigma) / (level.sigma * following.alpha);

function* dpmpp2m(denoise, x, levels) {
  let previous = null, lastH = null;
  for (const [level, following] of pairwise(levels)) {
    const { clean } = denoise(x, level);
    if (following.sigma === 0) {
      yield { level: following, x: clean, clean };
      continue;
    }
    const shrink = shrinkOf(level, following);
    const h = shrink > 0 ? -Math.log(shrink) : Infinity;
    const ahead = following.alpha * (1 - shrink);
    const share = previous ? h / (2 * lastH) : 0;
    const pairs = [[following.sigma / level.sigma, x], [ahead * (1 + share), clean]];
    if (previous) pairs.push([-ahead * share, previous]);
    x = combine(...pairs);
    [previous, lastH] = [clean, h];
    yield { level: following, x, clean };
  }
}

function* abm(denoise, x, levels) {
  let y = combine([1 / levels[0].radius, x]);
  yield* multistep(3, denoise, x, levels, (history, level, following) => {
    if (history.length > 1) y = combine([1, y], ...velocityIntegral(history, history[1].angle, level.angle));
    const moved = combine([1, y], ...velocityIntegral(history, level.angle, following.angle));
    return moved.map((value) => value * following.radius);
  });
}

function* saSolver(denoise, x, levels, draw, eta) {
  yield* multistep(2, denoise, x, levels, (history, level, following, x) => {
    const shrink = shrinkOf(level, following);
    const kept = (following.sigma / level.sigma) * shrink ** (eta ** 2);
    const moved = combine([kept, x], ...dataTerm(history, shrink, following, eta));
    if (!eta) return moved;
    return combine([1, moved], [following.sigma * Math.sqrt(1 - shrink ** (2 * eta ** 2)), draw()]);
  });
}

// Steps by move(history, level, following, x) -> x, until the last one, which ends at the estimate itself.
// history: at most `count` estimates {angle, clean, noise}, the newest first.
function* multistep(count, denoise, x, levels, move) {
  let history = [];
  for (const [level, following] of pairwise(levels)) {
    const estimate = denoise(x, level);
    history = [{ angle: level.angle, ...estimate }, ...history.slice(0, count - 1)];
    x = following.sigma === 0 ? estimate.clean : move(history, level, following, x);
    yield { level: following, x, clean: estimate.clean };
  }
}

// The points and weights of Gauss-Legendre quadrature over [-1, 1], twelve of each: the roots of P_12 by Newton's method.
const [GAUSS_POINTS, GAUSS_WEIGHTS] = (() => {
  const n = 12, points = [], weights = [];
  for (let i = 1; i <= n; i++) {
    let z = -Math.cos((Math.PI * (i - 0.25)) / (n + 0.5)), slope = 0;
    for (let turn = 0; turn < 50; turn++) {
      let [p, before] = [1, 0];
      for (let k = 1; k <= n; k++) [p, before] = [((2 * k - 1) * z * p - (k - 1) * before) / k, p];
      slope = (n * (z * p - before)) / (z * z - 1);
      z -= p / slope;
    }
    points.push(z);
    weights.push(2 / ((1 - z * z) * slope * slope));
  }
  return [points, weights];
})();

const quadraturePoints = (start, end) => GAUSS_POINTS.map((point) => start + ((end - start) * (1 + point)) / 2);

// The Lagrange polynomial of a node at some points.
const lagrange = (nodes, node, at) => at.map((point) =>
  nodes.reduce((product, other) => (other === node ? product : (product * (point - other)) / (node - other)), 1));

const dot = (first, second) => first.reduce((sum, value, i) => sum + value * second[i], 0);

// The integral of the velocity over the angle, as pairs for `combine`.
function velocityIntegral(history, start, end) {
  const estimates = wellSpaced(history, Math.abs(end - start));
  const angles = quadraturePoints(start, end);
  const nodes = estimates.map((estimate) => estimate.angle);
  return estimates.flatMap(({ angle, clean, noise }) => {
    const weights = lagrange(nodes, angle, angles).map((w, i) => (w * GAUSS_WEIGHTS[i] * (end - start)) / 2);
    return [[dot(weights, angles.map(Math.cos)), noise], [-dot(weights, angles.map(Math.sin)), clean]];
  });
}

// The data term of one step of sa_solver, as pairs for `combine`.
function dataTerm(history, shrink, end, eta) {
  const estimates = wellSpaced(history, Math.abs(history[0].angle - end.angle));
  const points = quadraturePoints(shrink, 1);
  const density = points.map((w, i) => GAUSS_WEIGHTS[i] * w ** (eta ** 2));
  const total = density.reduce((sum, value) => sum + value, 0);
  const scale = (end.alpha * (1 - shrink ** (1 + eta ** 2))) / total;
  const angles = points.map((w) => Math.atan2(end.sigma, end.alpha * w));
  const nodes = estimates.map((estimate) => estimate.angle);
  return estimates.map(({ angle, clean }) => [scale * dot(lagrange(nodes, angle, angles), density), clean]);
}

// The estimates before the first gap of at most half a step.
function wellSpaced(history, step) {
  const close = history.findIndex((estimate, i) => i && 2 * Math.abs(estimate.angle - history[i - 1].angle) <= step);
  return close < 0 ? history : history.slice(0, close);
}

const SAMPLERS = {
  ddpm: { run: (denoise, x, levels, draw) => ddim(denoise, x, levels, draw, 1), grid: "trailing" },
  ddim: { run: ddim, grid: "trailing", eta: 0, maxEta: 1 },
  heun: { run: heun, grid: "angle" },
  dpmpp_2m: { run: dpmpp2m, grid: "rho" },
  abm: { run: abm, grid: "angle" },
  sa_solver: { run: saSolver, grid: "angle", eta: 1.5, maxEta: 1.5 },
};
