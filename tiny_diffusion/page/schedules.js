// Schedules, levels and grids: tiny_diffusion/diffusion/schedules.py and grids.py, where their sources are named.
//
// A level is {time, alpha, sigma, angle, radius}: x = alpha * x_0 + sigma * noise.

const CLEAN = makeLevel(0, 1, 0);

function makeLevel(time, alpha, sigma) {
  return { time, alpha, sigma, angle: Math.atan2(sigma, alpha), radius: Math.hypot(alpha, sigma) };
}

const linspace = (first, last, count) =>
  Array.from({ length: count }, (_, i) => (count > 1 ? first + ((last - first) * i) / (count - 1) : first));
const fromCurve = (curve, steps) =>
  Array.from({ length: steps }, (_, t) => 1 - curve((t + 1) / steps) / curve(t / steps));
const logistic = (z) => 1 / (1 + Math.exp(-z));

const BETAS = {
  linear: linspace,
  cosine: (_, __, steps) => fromCurve((s) => Math.cos((((s + 0.008) / 1.008) * Math.PI) / 2) ** 2, steps),
  sigmoid: (_, __, steps) => fromCurve(
    (s) => (logistic(3 - 6 * s) - logistic(-3)) / (logistic(3) - logistic(-3)), steps),
  exponential: (first, last, steps) => linspace(Math.log(first), Math.log(last), steps).map(Math.exp),
  flow: null, // alpha + sigma = 1
};
const BETA_ENDS = { linear: [1e-4, 0.02], exponential: [1e-4, 0.065] }; // at T = 1000

class Schedule {
  // shift: what is added to log-SNR at every t.   ends: the first and the last beta at T = 1000.   betas: all of them.
  constructor({ name, timesteps, shift = 0, ends = BETA_ENDS[name] ?? [], betas: given }) {
    Object.assign(this, { name, timesteps, shift, straight: BETAS[name] === null });
    if (this.straight) {
      this.logSnr = Float64Array.from({ length: timesteps }, (_, t) => {
        const sigma = (t + 1) / timesteps;
        return 2 * (Math.log(1 - sigma) - Math.log(sigma)) + shift;
      });
      return;
    }
    const betas = given ?? BETAS[name](...[0, 1].map((i) => ((ends[i] ?? 0) * 1000) / timesteps), timesteps);
    let logCumprod = 0; // of 1 - beta, which is alpha^2
    this.logSnr = Float64Array.from(betas, (beta) => {
      logCumprod += Math.log1p(-Math.min(Math.max(beta, 0), 0.999));
      return logCumprod - Math.log(-Math.expm1(logCumprod)) + shift;
    });
  }

  // The level at a real-valued t; between two entries log-SNR is linear.
  level(t) {
    if (this.straight) {
      const sigma = (t + 1) / this.timesteps;
      const ratio = Math.exp(-this.shift / 2);
      const total = 1 - sigma + ratio * sigma;
      return makeLevel((ratio / total) * (t + 1), (1 - sigma) / total, (ratio / total) * sigma);
    }
    const below = Math.min(Math.floor(t), this.timesteps - 2);
    const logSnr = this.logSnr[below] + (t - below) * (this.logSnr[below + 1] - this.logSnr[below]);
    return makeLevel(t, Math.exp(-0.5 * softplus(-logSnr)), Math.exp(-0.5 * softplus(logSnr)));
  }

  // The inverse: the t of this log-SNR, within the table.
  timeAt(logSnr) {
    const last = this.timesteps - 1;
    if (this.straight) {
      const t = this.timesteps * Math.exp(-softplus((logSnr - this.shift) / 2)) - 1;
      return Math.min(Math.max(t, 0), last);
    }
    if (logSnr >= this.logSnr[0]) return 0;
    if (logSnr <= this.logSnr[last]) return last;
    let low = 0, high = last; // the table falls
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.logSnr[middle] >= logSnr) low = middle;
      else high = middle;
    }
    return low + (logSnr - this.logSnr[low]) / (this.logSnr[high] - this.logSnr[low]);
  }

  // The angle of the level at t before the shift.
  angleBeforeShift(t) {
    const { alpha, sigma } = this.level(t);
    return Math.atan2(sigma, alpha * Math.exp(-this.shift / 2));
  }
}

function softplus(x) {
  return x > 0 ? x + Math.log1p(Math.exp(-x)) : Math.log1p(Math.exp(x));
}

// Round half to even, as numpy does.
function rounded(x) {
  const nearest = Math.round(x);
  return nearest - x === 0.5 && nearest % 2 ? nearest - 1 : nearest;
}

const GRIDS = {
  trailing: (schedule, steps) => Array.from({ length: steps },
    (_, i) => rounded(schedule.timesteps - (i * schedule.timesteps) / steps) - 1),
  leading: (schedule, steps) => {
    const every = Math.floor(schedule.timesteps / steps);
    const times = Array.from({ length: steps }, (_, i) => (steps - 1 - i) * every);
    return Math.cos(schedule.angleBeforeShift(times[0])) > 0.1 ? GRIDS.trailing(schedule, steps) : times;
  },
  angle: (schedule, steps) => {
    const noisiest = schedule.angleBeforeShift(schedule.timesteps - 1);
    const cleanest = Math.max(schedule.angleBeforeShift(0), noisiest / steps);
    return fromEnd(schedule, linspace(noisiest, cleanest, steps).map((a) => -2 * Math.log(Math.tan(a)) + schedule.shift));
  },
  log_snr: (schedule, steps) => fromEnd(schedule, linspace(...logSnrRange(schedule), steps)),
  rho: (schedule, steps) => {
    const [noisiest, cleanest] = logSnrRange(schedule).map((logSnr) => Math.exp(-logSnr / 2) ** (1 / 7));
    return fromEnd(schedule, linspace(noisiest, cleanest, steps).map((root) => -14 * Math.log(root)));
  },
};

function logSnrRange(schedule) {
  const last = schedule.logSnr[schedule.timesteps - 1];
  return [Math.max(last, schedule.shift - 2 * Math.log(80)), schedule.logSnr[0]];
}

function fromEnd(schedule, logSnrs) {
  return [schedule.timesteps - 1, ...logSnrs.slice(1).map((logSnr) => schedule.timeAt(logSnr))];
}

// The levels of a grid, the noisiest first, and CLEAN after them.
function makeLevels(schedule, grid, steps) {
  return [...GRIDS[grid](schedule, steps).map((t) => schedule.level(t)), CLEAN];
}

// The levels from `strength` of the angle of pure noise down to CLEAN: levels_from of diffusion/editing.py.
function levelsFrom(schedule, grid, steps, strength) {
  if (strength <= 0) return [CLEAN];
  if (strength >= 1) return makeLevels(schedule, grid, steps);
  const logSnr = -2 * Math.log(Math.tan((strength * Math.PI) / 2));
  const start = schedule.level(schedule.timeAt(logSnr));
  const below = (count) => makeLevels(schedule, grid, count).filter((level) => level.angle < start.angle);
  let fewest = steps, most = schedule.timesteps;
  while (fewest < most) {
    const middle = (fewest + most) >> 1;
    if (below(middle).length >= steps) most = middle;
    else fewest = middle + 1;
  }
  return [start, ...below(fewest).slice(-steps)];
}
