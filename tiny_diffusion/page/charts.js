// Curves as SVG, with axes that can be read and a mark that shows the values under the pointer or the arrow keys.

const COLOURS = ["var(--first)", "var(--second)", "var(--third)"];
const SIZE = { left: 56, right: 14, top: 10, bottom: 42 };

// A new element with properties, attributes (those with a dash, and of SVG) and children.
function make(tag, properties = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "g", "circle"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (svg || name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

// Round values from low to high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(i * step);
  return values;
}

// Powers of ten and, where there are few, their doubles and fives.
function logTicks(low, high) {
  const factors = high / low > 1000 ? [1] : [1, 2, 5];
  const values = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) values.push(value);
    }
  }
  return values.length > 1 ? values : ticks(low, high, 4).filter((value) => value > 0);
}

function shortNumber(value) {
  if (value === 0) return "0";
  if (Math.abs(value) >= 10000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return String(Number(value.toPrecision(3)));
}

// A chart.  series: [{name, points: [[x, y], ...], dots}].   onMark: called with x when the reader moves the mark.
// shares: how many charts stand side by side where there is room.   Returns {element, mark(x)}.
function chart({ label, x: xName, series, logarithmic = false, shares = 1, onMark = () => {} }) {
  const all = series.flatMap(({ points }) => points).filter(([, y]) => Number.isFinite(y));
  const scaleY = logarithmic ? Math.log : (y) => y;
  const range = (values) => [Math.min(...values), Math.max(...values)];
  const [left, right] = range(all.map(([x]) => x));
  let [low, high] = range(all.map(([, y]) => y));
  if (!logarithmic && low > 0 && low < 0.5 * high) low = 0;
  if (low === high) [low, high] = logarithmic ? [low / 2, high * 2] : [low - 1, high + 1];
  const room = Math.min(window.innerWidth - 32, 736); // so that the letters have their size on a phone too
  const width = shares > 1 && window.innerWidth > 900 ? 460 : Math.max(room, 300), height = Math.min(260, width * 0.55);
  const placeX = (x) => SIZE.left + ((x - left) / (right - left || 1)) * (width - SIZE.left - SIZE.right);
  const placeY = (y) => height - SIZE.bottom
    - ((scaleY(y) - scaleY(low)) / (scaleY(high) - scaleY(low))) * (height - SIZE.top - SIZE.bottom);
  const svg = make("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "slider",
    "aria-label": label, "aria-valuemin": left, "aria-valuemax": right });
  for (const value of logarithmic ? logTicks(low, high) : ticks(low, high, 5)) {
    const y = placeY(value);
    svg.append(make("line", { class: "axis", x1: SIZE.left, x2: width - SIZE.right, y1: y, y2: y }),
      make("text", { x: SIZE.left - 8, y: y + 4, "text-anchor": "end" }, shortNumber(value)));
  }
  for (const value of ticks(left, right, width / 110)) {
    svg.append(make("text", { x: placeX(value), y: height - SIZE.bottom + 18, "text-anchor": "middle" }, shortNumber(value)));
  }
  svg.append(make("text", { x: width - SIZE.right, y: height - 6, "text-anchor": "end" }, xName));
  series.forEach(({ points, dots, pale }, i) => {
    const kept = points.filter(([, y]) => Number.isFinite(y) && (!logarithmic || y > 0));
    const path = kept.map(([x, y], k) => `${k ? "L" : "M"}${placeX(x).toFixed(1)},${placeY(y).toFixed(1)}`).join("");
    const colour = pale ? "var(--pale)" : COLOURS[i % COLOURS.length];
    svg.append(make("path", { d: path, fill: "none", stroke: colour, "stroke-width": pale ? 1 : 2 }));
    if (dots) kept.forEach(([x, y]) => svg.append(make("circle", { cx: placeX(x), cy: placeY(y), r: 3, fill: colour })));
  });
  const line = make("line", { class: "mark", y1: SIZE.top, y2: height - SIZE.bottom });
  svg.append(line);
  const readout = make("p", { className: "quiet" });
  const key = make("ul", { className: "key" }, ...series.map(({ name, pale }, i) =>
    make("li", {}, make("i", { style: `background:${pale ? "var(--pale)" : COLOURS[i % COLOURS.length]}` }), name)));
  let at = right;

  function mark(x) {
    at = Math.min(Math.max(x, left), right);
    const values = series.map(({ name, points, dots }) => {
      const [there, y] = nearest(points, at);
      const elsewhere = dots && Math.round(there) !== Math.round(at) ? ` of ${xName} ${Math.round(there)}` : "";
      return `${name} ${Number.isFinite(y) ? shortNumber(y) : "none"}${elsewhere}`;
    });
    line.setAttribute("x1", placeX(at));
    line.setAttribute("x2", placeX(at));
    readout.textContent = `${xName} ${Math.round(at)}: ${values.join(", ")}`;
    svg.setAttribute("aria-valuenow", at);
    svg.setAttribute("aria-valuetext", readout.textContent);
  }

  const move = (x) => { mark(x); onMark(at); };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * width;
    move(left + ((place - SIZE.left) / (width - SIZE.left - SIZE.right)) * (right - left));
  });
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -0.01, ArrowRight: 0.01, ArrowDown: -0.01, ArrowUp: 0.01, PageDown: -0.1, PageUp: 0.1, Home: -1, End: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    move(at + by * (right - left));
  });
  mark(at);
  return { element: make("figure", {}, key, svg, readout), mark };
}

// The point whose x is nearest.
function nearest(points, x) {
  return points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best), points[0]);
}
