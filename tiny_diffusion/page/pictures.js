// Images on canvases, and the controls that the sections share.

// A canvas of images side by side.  shape: {channels, height, width} of each.
class Pictures {
  constructor(shape, label, columns = 1, count = columns) {
    const rows = Math.ceil(count / columns), gap = count > 1 ? 1 : 0;
    Object.assign(this, { shape, columns, gap });
    this.canvas = make("canvas", { className: "pixels", role: "img", "aria-label": label,
      width: columns * (shape.width + gap) - gap, height: rows * (shape.height + gap) - gap });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
  }

  // Shows image i.  values: (C, H, W) in [-1, 1].
  show(values, i = 0) {
    const { channels, height, width } = this.shape;
    const picture = this.context.createImageData(width, height);
    const plane = height * width;
    for (let pixel = 0; pixel < plane; pixel++) {
      for (let channel = 0; channel < 3; channel++) {
        picture.data[4 * pixel + channel] = greyLevel(values[(channels === 3 ? channel : 0) * plane + pixel]);
      }
      picture.data[4 * pixel + 3] = 255;
    }
    const column = i % this.columns, row = Math.floor(i / this.columns);
    this.context.putImageData(picture, column * (width + this.gap), row * (height + this.gap));
  }

  showAll(images) {
    images.forEach((values, i) => this.show(values, i));
  }
}

let names = 0;

// A control with its label.  Returns {element, input, value, set(value)}.
function control(text, input, { shown = null, whole = false } = {}) {
  input.id ||= `control-${(names += 1)}`;
  const output = make("output", { htmlFor: input.id });
  const label = make("label", { htmlFor: input.id }, `${text} `, ...(shown ? [output] : []));
  const update = () => { if (shown) output.textContent = shown(input.value); };
  input.addEventListener("input", update);
  update();
  const element = make("div", { className: whole ? "control whole" : "control" }, label, input);
  return {
    element,
    input,
    update,
    get value() { return input.value; },
    get number() { return Number(input.value); },
    set(value) { input.value = value; update(); },
  };
}

function slider(text, { min, max, step = 1, value, shown = (v) => v, whole = false }) {
  const input = make("input", { type: "range" });
  Object.assign(input, { min, max, step });
  input.value = value;
  return control(text, input, { shown, whole });
}

// pairs: [value, name].
function choice(text, pairs, value) {
  const select = make("select", {}, ...pairs.map(([key, name]) => make("option", { value: String(key) }, name)));
  select.value = String(value);
  return control(text, select);
}

function numberField(text, value, max) {
  return control(text, make("input", { type: "number", min: 0, max, step: 1, value }));
}

function button(text, call, second = false) {
  const element = make("button", { type: "button", className: second ? "second" : "" }, text);
  element.addEventListener("click", call);
  return element;
}

// The words of a command for an element `code`.  A line breaks between them and not within an option.
const commandParts = (words) =>
  words.flatMap((word) => [word.startsWith("--") ? make("span", {}, word) : word, " "]);

function figure(canvas, caption) {
  return make("figure", {}, canvas, make("figcaption", {}, caption));
}

function table(head, rows, numbers = []) {
  const cells = (tag, row) => row.map((text, i) =>
    make(tag, { className: numbers.includes(i) ? "number" : "", ...(tag === "th" ? { scope: "col" } : {}) }, text));
  return make("table", {}, ...(head ? [make("thead", {}, make("tr", {}, ...cells("th", head)))] : []),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row)))));
}
