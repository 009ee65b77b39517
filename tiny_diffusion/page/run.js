// The sections that only show: the run, and how its images were judged.

function showRun({ run }) {
  const find = (id) => document.getElementById(id);
  if (run.text) find("run-text").append(`${run.text} `, button("Reload", () => location.reload(), true));
  const facts = make("div", {}, make("h3", {}, "What it is"), table(null, run.facts));
  const rows = run.changed.length ? table(["option", "value", "default"], run.changed)
    : make("p", {}, "None: every option has its default.");
  find("facts").append(facts, make("div", {}, make("h3", {}, "Options that differ from the defaults"), rows));
  find("options").append(make("div", { className: "options" }, table(null, run.options)));
  for (const curve of run.curves) {
    find("curves").append(make("h3", {}, curve.title), chart(curve).element);
  }
  if (run.epochs.length) showEpochs(find("epochs"), run.epochs);
}

// Samples by epoch.  epochs: [epoch, address of the picture].
function showEpochs(place, epochs) {
  const image = make("img", { className: "picture", alt: "" });
  const epoch = slider("After epoch", { min: 0, max: epochs.length - 1, value: epochs.length - 1, whole: true,
    shown: (i) => epochs[i][0] });
  const show = () => {
    const [number, address] = epochs[epoch.number];
    image.src = address;
    image.alt = `Samples after epoch ${number}, always from the same noise`;
  };
  epoch.input.addEventListener("input", show);
  show();
  place.append(make("h3", {}, "Samples by epoch, always from the same noise"),
    ...(epochs.length > 1 ? [make("div", { className: "controls" }, epoch.element)] : []), make("figure", {}, image));
}

function showJudged({ judged }) {
  const place = document.getElementById("judged-body");
  if (judged.missing) {
    const command = make("code", {}, ...commandParts(judged.command.split(" ")));
    place.append(make("p", { className: "note" }, judged.missing, make("br"), command));
    return;
  }
  place.append(make("p", {}, judged.text));
  for (const { title, rows } of judged.tables) {
    place.append(make("h3", {}, title),
      make("div", { className: "scroll" }, table(["measure", "samples", "real images"], rows, [1, 2])));
  }
  for (const { title, text, address } of judged.pictures) {
    place.append(make("h3", {}, title), make("p", {}, text), make("figure", {},
      make("img", { className: "picture", src: address, alt: title })));
  }
}
